"""What the layouts of all methods in AdapterHub's files have in common, and which of them a file has."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import ConfigError
from grafts.methods._files import Parts
from grafts.methods.union import UnionConfig
from grafts.structure.infer import inferred
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.residual_stream import ResidualStream, StreamLayer
from grafts.structure.roles import KEY, QUERY, VALUE
from grafts.structure.view import ModelView

C = TypeVar("C", bound=AdapterConfig)

# What the names of tensors in this library's own files begin with.
OURS = "base_model.model."
# What AdapterHub calls the projections of attention.
ATTENTION_MATRICES = {QUERY: "q", KEY: "k", VALUE: "v"}
_UNION = "union"


class HubModel:
    """A model that files are read for or written from.

    Attributes:
        view: how it is built; the roles of its modules are told by their names.
        root: the path of its base model.
    """

    def __init__(self, view: ModelView, interface: AdapterModelInterface | None = None) -> None:
        self.view = view
        self.root = view.base
        self._interface = interface

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.view.model

    @cached_property
    def stream(self) -> ResidualStream:
        """Its residual stream, by the interface or what is worked out.

        Raises:
            InterfaceError: none can be worked out.
        """
        interface = self._interface or inferred(self.view)
        return interface.resolve(self.view)

    @property
    def model_type(self) -> str | None:
        """What `transformers` calls its type."""
        return getattr(getattr(self.model, "config", None), "model_type", None)

    def path_of(self, name: str) -> str | None:
        """The path of a module in this model, where the file was saved from the model within it, or one
        around it; None where there is none.
        """
        if name in self.view.modules:
            return name
        inner = [path for path in self.view.modules if path and name.endswith(f".{path}")]
        if inner:
            return max(inner, key=len)
        outer = [path for path in self.view.modules if path.endswith(f".{name}")]
        if outer:
            return min(outer, key=len)
        return None

    def layer(self, name: str) -> tuple[StreamLayer, str] | None:
        """The layer that a tensor's name begins with, and the rest of the name; None where it lies in
        none.
        """
        steps = name.split(".")
        layers = {layer.path: layer for layer in self.stream.layers}
        for end in range(len(steps), 0, -1):
            path = self.path_of(".".join(steps[:end]))
            if path is not None and path in layers:
                return layers[path], ".".join(steps[end:])
        return None


Values = dict[str, Any]
Tensors = dict[str, Tensor]


class Layout(abc.ABC, Generic[C]):
    """One method in that layout.

    Attributes:
        architecture: what a file calls it.
        config_class: the config here.
    """

    architecture: ClassVar[str | None]
    config_class: ClassVar[type[AdapterConfig]]

    def reads(self, values: Mapping[str, Any]) -> bool:
        """Whether this is the method of a config of a file."""
        return values.get("architecture") == self.architecture

    def of_version(self, values: Values, version: Sequence[str]) -> Values:
        """The config of a file as the newest version writes it.

        Args:
            values: the config.
            version: the numbers of the version that wrote it, as text; none for the oldest.
        """
        return values

    @abc.abstractmethod
    def config(self, values: Mapping[str, Any]) -> C:
        """The config of this library.

        Raises:
            ConfigError: an option cannot be honoured.
        """

    @abc.abstractmethod
    def read(self, config: C, left: MutableMapping[str, Tensor], model: HubModel) -> tuple[C, Tensors]:
        """The config and the tensors as this library's own files have them.

        Args:
            config: as the file's config says it.
            left: the tensors of the file; what is used is taken out.
            model: the model that they are read for.

        Raises:
            CheckpointError: a tensor lies where this model has nothing.
        """

    @abc.abstractmethod
    def write(self, config: C, parts: Parts, model: HubModel, name: str) -> tuple[Values, Tensors]:
        """The config and the tensors of that layout.

        Args:
            config: the adapter's.
            parts: the adapter's, by path.
            model: the model that carries it.
            name: the adapter's.

        Raises:
            ConfigError: something has no place there.
        """


# The layouts, in the order in which a file is compared with them.
_layouts: list[Layout[Any]] = []


def layout(cls: type[Layout[Any]]) -> type[Layout[Any]]:
    """Register the layout of a method."""
    _layouts.append(cls())
    return cls


def layout_for(values: Mapping[str, Any]) -> Layout[Any]:
    """The layout of a config of a file.

    Raises:
        ConfigError: it is that of a method that is not known here.
    """
    for known in _layouts:
        if known.reads(values):
            return known
    names = [known.architecture for known in _layouts if known.architecture is not None]
    raise ConfigError(
        f"an adapter of AdapterHub with architecture {values.get('architecture')!r} cannot be honoured here; "
        f"of that layout this version reads {', '.join(dict.fromkeys(names))}, union and bottlenecks"
    )


def layout_of(config: AdapterConfig) -> Layout[Any]:
    """The layout of a config of this library.

    Raises:
        ConfigError: its method is none of AdapterHub's.
    """
    for known in _layouts:
        if known.config_class is type(config):
            return known
    raise ConfigError(f"a {type(config).__name__} has no place in the layout of AdapterHub")


def config_from(values: Mapping[str, Any], version: object) -> AdapterConfig:
    """The config of a file.

    Args:
        values: the config as the file has it.
        version: what the file says of the version that wrote it; None for those before any said it.

    Raises:
        ConfigError: the method or an option is not known.
    """
    if values.get("architecture") == _UNION:
        return joined_config([config_from(member, version) for member in values["configs"]])
    values = dict(values)
    if version is None:
        # Before any version said its number, ``gelu`` was another function.
        renamed = {"gelu": "gelu_new", "gelu_orig": "gelu"}
        values["non_linearity"] = renamed.get(values.get("non_linearity", ""), values.get("non_linearity"))
    if values.get("non_linearity") is None:
        values.pop("non_linearity", None)
    numbers = str(version or "").removeprefix("adapters.").split(".")
    known = layout_for(values)
    config: AdapterConfig = known.config(known.of_version(values, numbers))
    return config


def joined_config(configs: Sequence[AdapterConfig]) -> UnionConfig:
    """The config of an adapter that is made of several."""
    return UnionConfig.from_configs(configs)


def joined_values(configs: Sequence[Mapping[str, Any]]) -> Values:
    """What a file says of an adapter that is made of several."""
    return {"architecture": _UNION, "configs": list(configs)}


def wants_module_of_embeddings(tensors: Iterable[str], model: HubModel) -> bool:
    """Whether a file's invertible adapter stands behind the whole module of embeddings: so it is in models
    that AdapterHub's library has written itself.

    Args:
        tensors: the names of the file's tensors.
        model: the model that it is read for.
    """
    embeddings = getattr(model.view.modules[model.root], "embeddings", None)
    is_coupled = any(".invertible_adapters." in f".{name}" for name in tensors)
    return is_coupled and isinstance(embeddings, nn.Module)


def take(left: MutableMapping[str, Tensor], pattern: str) -> list[tuple[re.Match[str], Tensor]]:
    """The tensors whose whole names match a regular expression, each with its match, taken out of
    ``left``.
    """
    taken = []
    for name in list(left):
        match = re.fullmatch(pattern, name)
        if match is not None:
            taken.append((match, left.pop(name)))
    return taken


def require_off(values: Mapping[str, Any], **may_be: Any) -> None:
    """Refuse options of a file that have another value than those that mean nothing.

    Raises:
        ConfigError: naming the first.
    """
    for option, allowed in may_be.items():
        if values.get(option) not in allowed:
            raise ConfigError(f"{option}={values[option]!r} cannot be honoured here")


def own_fields(config: AdapterConfig) -> Values:
    """The fields that are the method's own, as plain data."""
    common = {field.name for field in dataclasses.fields(AdapterConfig)}
    result = {}
    for name, value in config.to_dict().items():
        if name not in common:
            result[name] = value
    return result


def lora_values(roles: set[str], **changes: Any) -> Values:
    """What a file says of LoRA, or of (IA)3, which is LoRA there in a mode that multiplies.

    Args:
        roles: what the adapted modules are there for.
        changes: the fields that are not as by default.
    """
    from_roles = []
    for role, short in ATTENTION_MATRICES.items():
        if role in roles:
            from_roles.append(short)
    values: Values = {
        "architecture": "lora",
        "selfattn_lora": len(from_roles) > 0,
        "intermediate_lora": False,
        "output_lora": False,
        "leave_out": [],
        "r": 8,
        "alpha": 8,
        "dropout": 0.0,
        "attn_matrices": from_roles,
        "composition_mode": "add",
        "init_weights": "lora",
        "init_weights_seed": None,
        "use_gating": False,
        "use_dora": False,
        "vera_d": None,
        "vera_b": None,
        "dtype": None,
    }
    return values | changes
