"""The registry of methods. A method registers itself with the decorator `method`; nothing here names one.

Built-in methods are the modules of this package; other packages offer theirs as entry points of the group
``grafts.methods``, each naming a module that registers a method when imported. Modules are imported when first needed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TypeVar

from torch import nn

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, did_you_mean
from grafts.sites.module import Part
from grafts.weights import Layer, LayerKind

Build = Callable[..., Part]
B = TypeVar("B", bound=Build)


@dataclass(frozen=True)
class Method:
    """A kind of adapter and what it can do; the core, the tests, the command line and the docs read this record.

    Attributes:
        name: its name on the command line and in tables, ``"lora"``.
        title: its name in sentences, ``"LoRA"``.
        peft_type: its name in ``adapter_config.json``.
        config: its config class.
        build: ``build(config, path, layer, host)`` makes the part for the layer at ``path``, on the default device.
        layers: the kinds of layer that it can stand beside.
        default_roles: the roles of the layers that it takes when no targets are named.
        inert: a fresh adapter leaves the output bitwise as it was, with the config's defaults.
        mergeable: it can be folded into the base weights.
        source: the paper.
    """

    name: str
    title: str
    peft_type: str
    config: type[AdapterConfig]
    build: Callable[[AdapterConfig, str, Layer, nn.Module], Part]
    layers: frozenset[LayerKind]
    default_roles: tuple[str, ...]
    inert: bool
    mergeable: bool
    source: str


_registered: dict[str, Method] = {}


def method(
    name: str,
    *,
    title: str,
    peft_type: str,
    config: type[AdapterConfig],
    layers: set[LayerKind],
    default_roles: tuple[str, ...],
    inert: bool,
    mergeable: bool,
    source: str,
) -> Callable[[B], B]:
    """Register the decorated builder of parts as a method; the arguments are those of `Method`.

    Raises:
        ConfigError: the name, the file type or the config class is registered already.
    """

    def register(build: B) -> B:
        made = Method(name, title, peft_type, config, build, frozenset(layers), default_roles, inert, mergeable, source)
        for other in _registered.values():
            if {name, peft_type, config} & {other.name, other.peft_type, other.config}:
                raise ConfigError(f"method {name!r} is registered already, by {other.build.__module__}")
        _registered[name] = made
        return build

    return register


def method_names() -> list[str]:
    """The names of all methods that can be had, sorted."""
    return sorted(known.name for known in methods())


def methods() -> list[Method]:
    """All methods, the built-in ones and those of other packages, sorted by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="grafts.methods"):
        entry.load()
    return sorted(_registered.values(), key=lambda known: known.name)


def method_named(name: str) -> Method:
    """The method of that name, as on the command line or as in ``adapter_config.json`` (``"lora"``, ``"LORA"``).

    Raises:
        ConfigError: there is none; names the nearest.
    """
    for known in methods():
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
        f"{type(config).__module__}.{type(config).__name__} is not the config of a method; known: {known_configs}"
    )
