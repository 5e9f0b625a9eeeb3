"""Resolving a config against a model: which modules get which parts. Pure; the result is a
`grafts.lifecycle.plan.Plan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, InterfaceError, UnmatchedTargetError, UnsupportedTargetError
from grafts.lifecycle.plan import Key, Plan, Target
from grafts.lifecycle.targets import (
    _NO_HOST,
    _bias_targets,
    _copy_target,
    _method_target,
    _token_target,
    _with_tied,
)
from grafts.methods._presets import config_from
from grafts.methods._registry import Method, Place, method_of
from grafts.modules.patterns import layer_index, matches, nearest_modules, unmatched, within
from grafts.modules.tree import base_parameters
from grafts.sites.site import Part, Site, site_of
from grafts.structure.infer import inferred
from grafts.structure.interface import METHODS, AdapterModelInterface
from grafts.structure.residual_stream import OUTPUTS, Stream
from grafts.structure.roles import HEAD, ROUTER, ModelView, look_at, roles_named, with_roles

ALL_LINEAR = "all-linear"


def plan(
    model: nn.Module, config: AdapterConfig | str, *, interface: AdapterModelInterface | None = None
) -> Plan:
    """Resolve ``config`` against ``model`` without touching either.

    Modules inside those of ``modules_to_save`` are trained as a whole and so are no targets.

    Args:
        model: the base model, with or without adapters.
        config: what to add; or a text, as `grafts.config_from` takes it.
        interface: what the model's modules are, where that is not to be worked out.

    Returns:
        The plan; ``print`` it for a table.

    Raises:
        InterfaceError: the interface does not fit the model, or the method needs one and none can be worked
            out.
        UnmatchedTargetError: a pattern selects no module, or nothing is selected at all; names the nearest.
        UnsupportedTargetError: a selected module is of a kind that the method cannot serve.
    """
    return resolve(model, config_from(config), interface=interface)


def resolve(
    model: nn.Module,
    config: AdapterConfig,
    *,
    lenient: bool = False,
    replaced: Sequence[str] = (),
    view: ModelView | None = None,
    blanks: dict[Key, Part] | None = None,
    interface: AdapterModelInterface | None = None,
    member: int = 0,
) -> Plan:
    """`plan`, with what reading a file needs.

    Args:
        model: the base model.
        config: what to add.
        lenient: let patterns that select nothing pass: the file's tensors are checked one by one.
        replaced: paths of modules whose base weights the file brings along (a resized embedding); the adapter
            gets a copy of each, beneath its own part if it has one.
        view: how the model is built, where that was looked at already.
        blanks: gets the method's parts as they were planned, without memory, by the key of their target.
        interface: what the model's modules are.
        member: the number of the config in a union.
    """
    method = method_of(config)
    view = look_at(model) if view is None else view
    if method.members is not None:
        each = [
            resolve(model, one, lenient=lenient, view=view, blanks=blanks, interface=interface, member=number)
            for number, one in enumerate(method.members(config))
        ]
        targets = [target for one in each for target in one.targets]
        interfaces = [one.interface for one in each if one.interface is not None]
        return replace(
            each[0],
            config=config,
            method=method,
            targets=_in_order(targets, view),
            members=tuple(each),
            interface=interfaces[0] if interfaces else None,
        )
    if interface is None and method.places is not None:
        interface = inferred(view)
    stream = None if interface is None else _stream(view, method, interface)
    if stream is not None:
        view = with_roles(view, stream.roles)
    copied = _copied_modules(view, config, lenient)
    places: Sequence[Place] = ()
    if method.places is not None and stream is not None:
        places = _stream_places(view, config, method, stream, lenient)
        chosen = [place.path for place in places]
    else:
        try:
            chosen = _chosen(view, config, method, copied, lenient)
        except UnmatchedTargetError:
            found = None if interface is not None or config.target_modules is not None else _inferred(view)
            if found is None or (method.name in METHODS and method.name not in found.adapter_methods):
                raise
            return resolve(
                model,
                config,
                lenient=lenient,
                replaced=replaced,
                view=view,
                blanks=blanks,
                interface=found,
                member=member,
            )
        places = [_place(view, path) for path in chosen]
    if method.check is not None:
        method.check(config, places)
    tokens = _token_rows(view, config)
    targets = [_copy_target(view, path) for path in copied]
    targets += [_copy_target(view, path, "base_layer." if path in chosen else "") for path in replaced]
    with torch.device("meta"):
        others = tuple(replace(place, host=_NO_HOST) for place in places)
        targets += [
            _method_target(place, view.modules[place.path], config, method, others, blanks, member)
            for place in others
        ]
    targets += [_token_target(view, path, rows, chosen) for path, rows in tokens.items()]
    targets += _bias_targets(view, getattr(config, "bias", "none"), chosen, copied)
    targets = _with_tied(view, targets, everything=bool(getattr(config, "ensure_weight_tying", False)))
    targets = [replace(target, member=member) for target in targets] if member else targets
    for target in targets:
        _check_child_name(view.modules[target.path], target.path, target.site)
    return Plan(
        model_name=view.name,
        base_parameters=sum(p.numel() for p in {id(p): p for p in base_parameters(model).values()}.values()),
        config=config,
        method=method,
        targets=_in_order(targets, view),
        interface=interface,
    )


def _inferred(view: ModelView) -> AdapterModelInterface | None:
    """What can be worked out of a model whose names and structure do not say enough."""
    try:
        return inferred(view)
    except InterfaceError:
        return None


def _stream(view: ModelView, method: Method, interface: AdapterModelInterface) -> Stream:
    """The residual stream of a model, as an interface says it.

    Raises:
        InterfaceError: it is none, does not fit, or does not offer the method.
    """
    if not isinstance(interface, AdapterModelInterface):
        raise InterfaceError(
            f"interface is a {type(interface).__name__}; it must be an AdapterModelInterface"
        )
    if method.name in METHODS and method.name not in interface.adapter_methods:
        raise InterfaceError(
            f"the interface does not offer {method.name!r}: its adapter_methods are "
            f"{list(interface.adapter_methods)}"
        )
    return interface.resolve(view)


def _in_order(targets: Sequence[Target], view: ModelView) -> tuple[Target, ...]:
    order = {path: index for index, path in enumerate(view.modules)}
    return tuple(sorted(targets, key=lambda target: order[target.path]))


def _stream_places(
    view: ModelView, config: AdapterConfig, method: Method, stream: Stream, lenient: bool
) -> list[Place]:
    """The places of a method on the residual stream; ``target_modules`` and ``exclude_modules`` choose among
    them.

    Raises:
        UnmatchedTargetError: a pattern selects no module, or nothing is selected at all.
    """
    assert method.places is not None
    if config.target_roles is not None:
        raise ConfigError(
            f"target_roles has no meaning for {method.title}: its own options say where it stands"
        )
    candidates = [_place(view, path) for path in view.layers]
    places = list(method.places(config, stream, view.modules.__getitem__, candidates))
    for option in ("target_modules", "exclude_modules"):
        wanted = getattr(config, option)
        if wanted is None:
            continue
        matched = set(_matched(view, option, wanted, lenient))
        kept = [place for place in places if (place.path in matched) == (option == "target_modules")]
        owners = {place.sublayer for place in kept if place.role in OUTPUTS}
        places = [
            p
            for p in places
            if p in kept or (p.role not in OUTPUTS and (p.sublayer is None or p.sublayer in owners))
        ]
    if not any(place.role in OUTPUTS for place in places):
        raise UnmatchedTargetError(
            f"{type(config).__name__} selects no place on the stream of {view.name} ({len(stream.layers)} "
            f"layers, {len(stream.sublayers())} steps; target_modules={config.target_modules!r})"
        )
    return places


def _chosen(
    view: ModelView, config: AdapterConfig, method: Method, copied: Sequence[str], lenient: bool
) -> list[str]:
    """Paths of the modules that get the method's part."""
    wanted = config.target_modules
    default_roles = method.default_roles(config)
    free = {path: role for path, role in view.roles.items() if not within(path, copied)}
    if config.target_roles is not None:
        default_roles = tuple(roles_named(name) for name in config.target_roles)
    if wanted is None:
        for roles in default_roles:
            if not roles & set(free.values()):
                raise UnmatchedTargetError(
                    f"{view.name} has no modules that are recognised as {' or '.join(sorted(roles))}: "
                    f"name them in target_modules; candidates: {view.candidates(method.layers)}"
                )
        paths = [path for path, role in free.items() if any(role in roles for roles in default_roles)]
    elif wanted == ALL_LINEAR:
        paths = [
            path for path, role in free.items() if view.layers[path].is_linear and role not in (HEAD, ROUTER)
        ]
    else:
        paths = _matched(view, "target_modules", wanted, lenient, apart_from=copied)
    excluded = _matched(view, "exclude_modules", config.exclude_modules or (), lenient)
    paths = _in_layers([path for path in paths if path not in excluded], config)
    if method.layers <= {
        "attending",
        "input",
    }:  # a name may be that of attention and of what stands around it
        paths = [
            path for path in paths if path in view.layers and view.layers[path].kind in method.layers
        ] or paths
    extras = getattr(config, "trainable_token_indices", None) is not None and wanted == ()
    if not paths and not (lenient and copied) and not extras:
        raise UnmatchedTargetError(
            f"{type(config).__name__} selects no module of {view.name} (target_modules={wanted!r}, "
            f"exclude_modules={config.exclude_modules!r}); candidates: {view.candidates(method.layers)}"
        )
    for path in paths:
        if path not in view.layers or view.layers[path].kind not in method.layers:
            raise UnsupportedTargetError(
                f"{path!r} is a {type(view.modules[path]).__name__}, which {method.title} cannot stand "
                f"beside; it takes {', '.join(sorted(method.layers))} layers: "
                f"{view.candidates(method.layers)}"
            )
    if method.narrow is not None:
        places = {path: _place(view, path) for path in view.layers}
        paths = [
            place.path
            for place in method.narrow(config, [places[path] for path in paths], list(places.values()))
        ]
    return paths


def _token_rows(view: ModelView, config: AdapterConfig) -> dict[str, Sequence[int]]:
    """Which rows of which embeddings the adapter trains, by path."""
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return {}
    if not isinstance(wanted, dict):
        path = view.input_embedding
        if path is None:
            raise UnmatchedTargetError(
                f"{view.name} names no input embedding: give trainable_token_indices as a dictionary of "
                f"names; candidates: {view.candidates({'embedding'})}"
            )
        return {path: tuple(wanted)}
    by_weight: dict[int, tuple[str, tuple[int, ...]]] = {}
    for name, rows in wanted.items():
        for path in _matched(view, "trainable_token_indices", [name], False):
            weight = view.modules[path]._parameters.get("weight")
            first, there = by_weight.setdefault(
                id(weight if weight is not None else path), (path, tuple(rows))
            )
            if there != tuple(rows):
                raise ConfigError(
                    f"trainable_token_indices: {first!r} and {path!r} share one weight; give both the same "
                    f"rows"
                )
    return dict(by_weight.values())


def _matched(
    view: ModelView,
    option: str,
    patterns: str | Sequence[str],
    lenient: bool,
    *,
    apart_from: Sequence[str] = (),
) -> list[str]:
    """Paths of the modules that ``patterns`` select, those inside of ``apart_from`` left out.

    Raises:
        UnmatchedTargetError: one of them selects nothing; names the nearest. Not if ``lenient``.
    """
    root = not isinstance(patterns, str) and "" in patterns
    free = [path for path in view.modules if (path or root) and not within(path, apart_from)]
    missing = [] if lenient else unmatched(free, patterns)
    if missing:
        outside = (
            f" outside modules_to_save={list(apart_from)}"
            if unmatched(view.modules, patterns) != missing
            else ""
        )
        raise UnmatchedTargetError(
            f"no module matches {option}={missing[0]!r} in {view.name}{outside}\n"
            f"  nearest names: {nearest_modules(missing[0], free)}\n"
            "  see all targets with: grafts inspect <model>"
        )
    return [path for path in free if matches(path, patterns)]


def _in_layers(paths: list[str], config: AdapterConfig) -> list[str]:
    """Those of ``paths`` that lie in the layers asked for."""
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None:
        return paths
    indices = (wanted,) if isinstance(wanted, int) else wanted
    pattern = getattr(config, "layers_pattern", None) or ()
    found = {path: layer_index(path, (pattern,) if isinstance(pattern, str) else pattern) for path in paths}
    if missing := [index for index in indices if index not in found.values()]:
        there = sorted({index for index in found.values() if index is not None})
        raise UnmatchedTargetError(
            f"no target lies in layers_to_transform={missing}; targets lie in layers {there}"
        )
    return [path for path, index in found.items() if index in indices]


def _copied_modules(view: ModelView, config: AdapterConfig, lenient: bool) -> list[str]:
    """Paths of the modules of which the adapter keeps a trainable copy; containers stand for what they
    hold.
    """
    paths = _matched(view, "modules_to_save", config.modules_to_save or (), lenient)
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS") and not lenient:  # a file names its heads itself
        paths += [path for path in view.heads if path not in paths]
    outermost = [path for path in paths if not within(path, [other for other in paths if other != path])]
    return [leaf for path in outermost for leaf in _callable_parts(path, view.modules)]


def _callable_parts(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules with parameters that ``path`` stands for: itself, or what a container holds.

    A site is a child of its module, and a child added to a container would be run or counted as one of its
    members.
    """
    module = modules[path]
    if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return [path] if base_parameters(module) else []
    children = [f"{path}.{name}" for name, _ in module.named_children()]
    return [leaf for child in children for leaf in _callable_parts(child, modules)]


def _place(view: ModelView, path: str) -> Place:
    return Place(path, view.layers[path], view.roles[path], view.modules[path])


def _check_child_name(module: nn.Module, path: str, kind: type[Site]) -> None:
    name = kind.child
    owned = (
        name in module._modules
        or name in module.__dict__
        or name in module._parameters
        or name in module._buffers
    )
    if (owned or hasattr(type(module), name)) and site_of(module, kind) is None:
        raise ConfigError(
            f"{path!r} has an attribute {name!r} of its own, which is the name that adapters need there"
        )
