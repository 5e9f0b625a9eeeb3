"""The registry of methods. A method registers itself with the decorator `method`; nothing here names one.

Built-in methods are the modules of the package `grafts.methods` whose names do not begin with an underscore;
other packages offer theirs as entry points of the group ``grafts.methods``, each naming a module that
registers a method when imported. Modules are imported when first needed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, did_you_mean
from grafts.methods._tensor_merging import TensorMerging
from grafts.modules.layers import Layer, LayerKind
from grafts.sites.arguments import CallSignature, Kind
from grafts.sites.site import Part
from grafts.structure.residual_stream import Stream, Sublayer

Build = Callable[[Any, "Place"], Part]
B = TypeVar("B", bound=Build)


@dataclass(frozen=True)
class Place:
    """Where one part of an adapter stands.

    Attributes:
        path: the module's path in the base model.
        layer: what the module is.
        role: what it is there for, one of the words in `grafts.structure.roles`; on the stream what the part
            is to do there.
        host: the module.
        sublayer: the step of a layer that the part belongs to, on the stream.
        number: of its layer, on the stream.
        others: every place where the adapter has a part of the method, this one among them, in order.
    """

    path: str
    layer: Layer
    role: str
    host: nn.Module = field(compare=False)
    sublayer: Sublayer | None = field(default=None, compare=False)
    number: int = field(default=0, compare=False)
    others: tuple[Place, ...] = field(default=(), compare=False, repr=False)

    def takes(self, kind: Kind) -> bool:
        """Whether the module's ``forward`` takes an argument of this kind."""
        return CallSignature(type(self.host).forward).takes(kind)


Parts = Mapping[str, Part]
Check = Callable[[Any, Sequence[Place]], None]
Values = Callable[[Mapping[str, Any], Parts], Mapping[str, Any]]
Attached = Callable[[Any, Parts], None]
Roles = tuple[frozenset[str], ...]
Places = Callable[[Any, "Stream", "Callable[[str], nn.Module]", Sequence["Place"]], Sequence["Place"]]
Narrow = Callable[[Any, Sequence[Place], Sequence[Place]], Sequence[Place]]
FileTarget = tuple[
    str, Mapping[str, Any], str
]  # the path of a target, the shapes of its tensors by name, its role
Combine = Callable[
    [Sequence[tuple[Any, Parts, float]], TensorMerging], tuple[AdapterConfig, Mapping[str, Tensor]]
]


@dataclass(frozen=True)
class Files:
    """How a method's tensors lie in a file, where that is not one by one under the path of their module.

    Attributes:
        prefix: what the names of other tensors (a trained head) begin with.
        pack: ``pack(config, parts)`` gives the tensors of the method's parts by their whole names in the
            file.
        unpack: ``unpack(config, tensors, targets)`` is its inverse: all tensors of a file by path and name.
        config: ``config(config, tensors)`` gives the config as the tensors of a file show it.
    """

    prefix: str
    pack: Callable[[Any, Parts], Mapping[str, Tensor]]
    unpack: Callable[[Any, Mapping[str, Tensor], Sequence[FileTarget]], Mapping[str, Tensor]]
    config: Callable[[Any, Mapping[str, Tensor]], AdapterConfig]


@dataclass(frozen=True)
class Method:
    """A kind of adapter and what it can do; the core, the tests, the command line and the docs read this
    record.

    Attributes:
        name: its name on the command line and in tables, ``"lora"``.
        title: its name in sentences, ``"LoRA"``.
        config: its config class.
        build: ``build(config, place)`` makes the part for one layer, on the default device.
        layers: the kinds of layer that it can stand beside.
        default_roles: ``default_roles(config)`` gives the roles of the layers that it takes when no targets
            are named: at least one layer of each set, and all layers of all sets.
        inert: a fresh adapter leaves the output bitwise as it was, with the config's defaults.
        mergeable: it can be folded into the base weights.
        source: the paper.
        routable: the rows of a batch can choose among adapters of it.
        combinations: the ways in which adapters of it can be made into one.
        combine: ``combine(adapters, blend)`` with each adapter's config, parts and weight gives the config of
            the new adapter and its tensors, by path and file name.
        check: ``check(config, places)`` refuses a config whose targets do not go together.
        file_values: ``file_values(values, parts)`` gives the fields that ``adapter_config.json`` must say
            otherwise than ``values``, the config with its targets resolved, because the model or the training
            has decided them.
        attached: ``attached(config, parts)`` is called when the parts of an adapter are in their places.
        narrow: ``narrow(config, places, candidates)`` gives the places that really get a part, in order, from
            those that were selected and all that the model has.
        files: how its tensors lie in a file, where that is not one by one.
        places: of a method on the residual stream: ``places(config, stream, module, candidates)`` gives the
            places of its parts, in order, from the model's stream, its modules by path, and the places that
            all layers would be.
        merges: ``merges(config)`` says whether adapters of that config can be merged, where not all are
            alike.
        members: ``members(config)`` gives the configs that an adapter of this method is made of; it has no
            parts of its own.
        swaps: the fields of the config in which an adapter may differ from the one whose place it takes
            (`grafts.hotswap`).
        training_state: ``training_state(parts)`` gives what training has to go on from besides the tensors of
            the file.
        resume: ``resume(parts, tensors)`` is its inverse.
    """

    name: str
    title: str
    config: type[AdapterConfig]
    build: Build
    layers: frozenset[LayerKind]
    default_roles: Callable[[Any], Roles]
    inert: bool
    mergeable: bool
    source: str
    routable: bool = True
    combinations: tuple[str, ...] = ()
    combine: Combine | None = None
    check: Check | None = None
    file_values: Values | None = None
    attached: Attached | None = None
    narrow: Narrow | None = None
    files: Files | None = None
    places: Places | None = None
    merges: Callable[[Any], bool] | None = None
    members: Callable[[Any], Sequence[AdapterConfig]] | None = None
    swaps: frozenset[str] = frozenset()
    training_state: Callable[[Parts], Mapping[str, Tensor]] | None = None
    resume: Callable[[Parts, Mapping[str, Tensor]], None] | None = None

    def can_merge(self, config: AdapterConfig) -> bool:
        """Whether an adapter of that config can be folded into the base weights."""
        return self.mergeable and (self.merges is None or self.merges(config))

    def __reduce__(self) -> tuple[Callable[[str], Method], tuple[str]]:
        """Copied and pickled by name: a copy of a model has the methods that are registered where it is."""
        return method_named, (self.name,)

    @property
    def peft_type(self) -> str:
        """Its name in ``adapter_config.json``."""
        return self.config.peft_type


_PACKAGE = "grafts.methods"
_registered: dict[str, Method] = {}


def _built_in() -> list[str]:
    """The names of the modules of the package that are methods: neither private nor what several methods
    share.
    """
    folder = str(Path(__file__).parent)
    return [
        module.name
        for module in pkgutil.iter_modules([folder])
        if not module.ispkg and not module.name.startswith("_")
    ]


def method(
    name: str,
    *,
    title: str,
    config: type[AdapterConfig],
    layers: set[LayerKind],
    default_roles: Sequence[set[str]] | Callable[[Any], Sequence[set[str]]],
    inert: bool,
    mergeable: bool,
    source: str,
    **more: Any,
) -> Callable[[B], B]:
    """Register the decorated builder of parts as a method; the arguments are those of `Method`.

    ``default_roles`` may be given as they are, where they are the same for every config.

    Raises:
        ConfigError: the name, the file type or the config class is registered already, or the config has no
            file type.
    """

    def register(build: B) -> B:
        def roles(config: Any) -> Roles:
            return tuple(map(frozenset, default_roles(config) if callable(default_roles) else default_roles))

        made = Method(name, title, config, build, frozenset(layers), roles, inert, mergeable, source, **more)
        if not config.peft_type:
            raise ConfigError(
                f"{config.__name__} names no peft_type, the method's name in adapter_config.json"
            )
        for other in _registered.values():
            if {name, made.peft_type, config} & {other.name, other.peft_type, other.config}:
                raise ConfigError(f"method {name!r} is registered already, by {other.build.__module__}")
        _registered[name] = made
        return build

    return register


def method_names() -> list[str]:
    """The names of all methods that can be had, sorted."""
    return sorted(known.name for known in methods())


def methods() -> list[Method]:
    """All methods, the built-in ones and those of other packages, sorted by name."""
    for name in _built_in():
        importlib.import_module(f"{_PACKAGE}.{name}")
    for entry in entry_points(group="grafts.methods"):
        entry.load()
    return sorted(_registered.values(), key=lambda known: known.name)


def method_named(name: str) -> Method:
    """The method of that name, as on the command line or as in ``adapter_config.json`` (``"lora"``,
    ``"LORA"``).

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name.lower() in _built_in():
        importlib.import_module(f"{_PACKAGE}.{name.lower()}")  # without the others
    for search in (_registered.values, methods):
        for known in search():
            if name in (known.name, known.peft_type):
                return known
    raise ConfigError(f"no method is called {name!r}; {did_you_mean(name, method_names())}")


def method_of(config: AdapterConfig) -> Method:
    """The method that ``config`` belongs to.

    Raises:
        ConfigError: it is not the config of a registered method.
    """
    for known in _registered.values():
        if type(config) is known.config:
            return known
    known_configs = ", ".join(f"{known.config.__module__}.{known.config.__name__}" for known in methods())
    raise ConfigError(
        f"{type(config).__module__}.{type(config).__name__} is not the config of a method; known: "
        f"{known_configs}"
    )
