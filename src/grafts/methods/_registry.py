"""The registry of methods, and the record of what a method is and can do.

A method registers itself with the decorator `method`; nothing here names one. Built-in methods are the
modules of the package `grafts.methods` whose names do not begin with an underscore; other packages offer
theirs as entry points of the group ``grafts.methods``, each naming a module that registers a method when
imported. Modules are imported when first needed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, did_you_mean
from grafts.methods._files import MethodFiles, Parts
from grafts.methods._tensor_merging import TensorMerging
from grafts.modules.layers import Layer, LayerKind
from grafts.sites.arguments import CallSignature, Kind
from grafts.sites.site import Part
from grafts.structure.residual_stream import Sublayer
from grafts.structure.view import ModelView

C = TypeVar("C", bound=AdapterConfig)


@dataclass(frozen=True)
class Place:
    """Where one part of an adapter stands.

    Attributes:
        path: the module's path in the base model.
        layer: what the module is.
        role: what it is there for, one of the words in `grafts.structure.roles`; on the residual stream what
            the part is to do there.
        host: the module; in `others` nothing that says anything.
        sublayer: the step of a layer that the part belongs to, on the stream.
        number: of its layer, on the stream.
        others: every place where the adapter has a part of the method, this one among them, in order; empty
            for the projections inside of `nn.MultiheadAttention`.
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


def place_at(view: ModelView, path: str) -> Place:
    """The place beside the layer at ``path``."""
    return Place(path, view.layers[path], view.roles[path], view.modules[path])


def stream_place(
    view: ModelView, path: str, role: str, width: int, sublayer: Sublayer | None = None, number: int = 0
) -> Place:
    """A place on the residual stream.

    Args:
        view: the model.
        path: the module's.
        role: what the part is to do there (the words of `grafts.structure.residual_stream`).
        width: the size of the stream there.
        sublayer: the step of a layer that it belongs to, where it belongs to one.
        number: of its layer.
    """
    host = view.modules[path]
    return Place(
        path, Layer("stream", width, width, False, type(host).__name__), role, host, sublayer, number
    )


class Source(NamedTuple, Generic[C]):
    """One of the adapters that are combined: its config, its parts by path, and its weight."""

    config: C
    parts: Parts
    weight: float


Roles = tuple[frozenset[str], ...]
Build = Callable[[C, Place], Part]
Narrow = Callable[[C, Sequence[Place], Sequence[Place]], Sequence[Place]]
StreamPlaces = Callable[[C, ModelView, Sequence[Place]], Sequence[Place]]
Combine = Callable[[Sequence[Source[C]], TensorMerging], tuple[C, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Method(Generic[C]):
    """A kind of adapter and what it can do; the core, the tests, the command line and the docs read this
    record.

    Attributes:
        name: its name on the command line and in tables, ``"lora"``.
        title: its name in sentences, ``"LoRA"``.
        config: its config class.
        source: the paper.
        build: ``build(config, place)`` makes the part for one place, on the default device.
        layers: the kinds of layer that it can stand beside.
        default_roles: ``default_roles(config)`` gives the roles of the layers that it takes when no targets
            are
            named: at least one layer of each set, and all layers of all sets.
        inert: a fresh adapter leaves the output bitwise as it was, with the config's defaults.
        mergeable: it can be folded into the base weights.
        example: ``example(**changes)`` gives a config with which it can be tried on a small model of any
            kind.
        check: ``check(config, places)`` refuses a config whose targets do not go together.
        narrow: ``narrow(config, places, candidates)`` gives the places that really get a part, in order: some
            of those that were selected, and what serves them, from all that the model has.
        places: of a method on the residual stream: ``places(config, view, candidates)`` gives the places of
            its parts, in order, from the view of the model and the places that all layers would be.
        members: ``members(config)`` gives the configs that an adapter of this method is made of; it has no
            parts of its own then.
        merges: ``merges(config)`` says whether adapters of that config can be merged, where not all are
            alike.
        routable: the rows of a batch can choose among adapters of it.
        combinations: the ways in which adapters of it can be made into one.
        combine: ``combine(sources, merging)`` gives the config of the new adapter and its tensors, by path
            and file name.
        files: how its config and tensors lie in files, and what training goes on from.
    """

    # What it is.
    name: str
    title: str
    config: type[C]
    source: str
    # How it is built, and where it stands.
    build: Build[C]
    layers: frozenset[LayerKind]
    default_roles: Callable[[C], Roles]
    # What it can do.
    inert: bool
    mergeable: bool
    example: Callable[..., C]
    # Where it stands, for methods that choose themselves.
    check: Callable[[C, Sequence[Place]], None] | None = None
    narrow: Narrow[C] | None = None
    places: StreamPlaces[C] | None = None
    members: Callable[[C], Sequence[AdapterConfig]] | None = None
    # What it can do, beyond the above.
    merges: Callable[[C], bool] | None = None
    routable: bool = True
    combinations: tuple[str, ...] = ()
    combine: Combine[C] | None = None
    # How it lies in files.
    files: MethodFiles[C] = field(default_factory=MethodFiles)

    def can_merge(self, config: C) -> bool:
        """Whether an adapter of that config can be folded into the base weights."""
        return self.mergeable and (self.merges is None or self.merges(config))

    def __reduce__(self) -> tuple[Callable[[str], Method[Any]], tuple[str]]:
        """Copied and pickled by name: a copy of a model has the methods that are registered where it is."""
        return method_named, (self.name,)

    @property
    def peft_type(self) -> str:
        """Its name in ``adapter_config.json``."""
        return self.config.peft_type


_PACKAGE = "grafts.methods"
_registered: dict[str, Method[Any]] = {}


def _built_in() -> list[str]:
    """The names of the modules of the package that are methods: neither private nor what several methods
    share.
    """
    folder = str(Path(__file__).parent)
    names = []
    for module in pkgutil.iter_modules([folder]):
        if not module.ispkg and not module.name.startswith("_"):
            names.append(module.name)
    return names


def method(
    name: str,
    *,
    title: str,
    config: type[C],
    layers: set[LayerKind],
    default_roles: Sequence[set[str]] | Callable[[C], Sequence[set[str]]],
    inert: bool,
    mergeable: bool,
    source: str,
    example: Callable[..., C] | None = None,
    check: Callable[[C, Sequence[Place]], None] | None = None,
    narrow: Narrow[C] | None = None,
    places: StreamPlaces[C] | None = None,
    members: Callable[[C], Sequence[AdapterConfig]] | None = None,
    merges: Callable[[C], bool] | None = None,
    routable: bool = True,
    combinations: tuple[str, ...] = (),
    combine: Combine[C] | None = None,
    files: MethodFiles[C] | None = None,
) -> Callable[[Build[C]], Build[C]]:
    """Register the decorated builder of parts as a method; the arguments are those of `Method`.

    Args:
        name: as in `Method`, and so the others.
        title: its name in sentences.
        config: its config class, with its ``peft_type``.
        layers: the kinds of layer that it can stand beside.
        default_roles: a function of the config, or the roles themselves where they are the same for every
            config.
        inert: a fresh adapter changes nothing.
        mergeable: it can be folded into the base weights.
        source: the paper.
        example: makes a config to try it with; by default one for every linear layer, where it stands beside
            those.
        check: refuses targets that do not go together.
        narrow: chooses among the selected places, and adds what serves them.
        places: chooses the places on the residual stream.
        members: gives the configs that an adapter is made of.
        merges: says of a config whether its adapters can be merged.
        routable: rows of a batch can choose among adapters of it.
        combinations: the ways of combining.
        combine: makes several adapters into one.
        files: how it lies in files.

    Raises:
        ConfigError: the name, the file type or the config class is registered already, or the config has no
            file type.
    """

    def roles(config: C) -> Roles:
        if callable(default_roles):
            sets = default_roles(config)
        else:
            sets = default_roles
        return tuple(frozenset(names) for names in sets)

    def any_config(**changes: Any) -> C:
        if "linear" in layers:
            targets = {"target_modules": "all-linear"}
        else:
            targets = {}
        return config(**{**targets, **changes})

    def register(build: Build[C]) -> Build[C]:
        record = Method(
            name=name,
            title=title,
            config=config,
            source=source,
            build=build,
            layers=frozenset(layers),
            default_roles=roles,
            inert=inert,
            mergeable=mergeable,
            example=example or any_config,
            check=check,
            narrow=narrow,
            places=places,
            members=members,
            merges=merges,
            routable=routable,
            combinations=combinations,
            combine=combine,
            files=files or MethodFiles(),
        )
        if not config.peft_type:
            raise ConfigError(
                f"{config.__name__} names no peft_type, the method's name in adapter_config.json"
            )
        for other in _registered.values():
            if {name, record.peft_type, config} & {other.name, other.peft_type, other.config}:
                raise ConfigError(f"method {name!r} is registered already, by {other.build.__module__}")
        _registered[name] = record
        return build

    return register


def method_names() -> list[str]:
    """The names of all methods that can be had, sorted."""
    return sorted(record.name for record in methods())


def methods() -> list[Method[Any]]:
    """All methods, the built-in ones and those of other packages, sorted by name."""
    for name in _built_in():
        importlib.import_module(f"{_PACKAGE}.{name}")
    for entry in entry_points(group="grafts.methods"):
        entry.load()
    return sorted(_registered.values(), key=lambda record: record.name)


def method_named(name: str) -> Method[Any]:
    """The method of that name, as on the command line or as in ``adapter_config.json`` (``"lora"``,
    ``"LORA"``).

    Raises:
        ConfigError: there is none; names the nearest.
    """
    # A built-in method is imported without the others.
    if name.lower() in _built_in():
        importlib.import_module(f"{_PACKAGE}.{name.lower()}")
    for record in _registered.values():
        if name in (record.name, record.peft_type):
            return record
    for record in methods():
        if name in (record.name, record.peft_type):
            return record
    raise ConfigError(f"no method is called {name!r}; {did_you_mean(name, method_names())}")


def method_of(config: AdapterConfig) -> Method[Any]:
    """The method that ``config`` belongs to.

    Raises:
        ConfigError: it is not the config of a registered method.
    """
    for record in _registered.values():
        if type(config) is record.config:
            return record
    known = ", ".join(f"{record.config.__module__}.{record.config.__name__}" for record in methods())
    cls = type(config)
    raise ConfigError(f"{cls.__module__}.{cls.__name__} is not the config of a method; known: {known}")
