"""The targets of a plan: what each part holds, and how it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Size, nn

from grafts.config import AdapterConfig, Biases
from grafts.errors import ConfigError
from grafts.lifecycle.plan import Target
from grafts.lifecycle.selection import Selection
from grafts.methods._registry import Method, Place
from grafts.methods.shared.auxiliary import BiasOffset, TrainableCopy, TrainableTokens
from grafts.methods.shared.multihead import MultiheadPart
from grafts.modules.layers import Layer
from grafts.modules.patterns import within
from grafts.modules.tree import base_parameters, device_and_dtype
from grafts.sites.site import Part
from grafts.structure.roles import EMBEDDING, HEAD
from grafts.structure.view import ModelView

# Stands for the host in the places of a plan, which holds on to no module of the model.
_NO_HOST = nn.Module()


def method_targets(selection: Selection, places: Sequence[Place], member: int) -> list[tuple[Target, Part]]:
    """The targets of the method's own parts, each with its part as it was planned: on the meta device,
    without memory.

    Args:
        selection: what the config selects.
        places: where the parts stand, in order.
        member: the number of the config in a union.
    """
    view, method, config = selection.view, selection.method, selection.config
    # A plan may outlive the model, and holds on to no module of it: the host comes back when a part is built.
    without_hosts = tuple(replace(place, host=_NO_HOST) for place in places)
    targets = []
    for place in without_hosts:
        build = partial(_build_method_part, method, config, replace(place, others=without_hosts))
        with torch.device("meta"):
            part = build(view.modules[place.path])
        target = Target(
            path=place.path,
            kind=method.name,
            role=place.role,
            shape=_sizes(place.layer),
            tensors=_shapes(part),
            build=build,
            site=part.site,
            member=member,
            frozen=part.frozen,
        )
        targets.append((target, part))
    return targets


def _build_method_part(method: Method[Any], config: AdapterConfig, place: Place, host: nn.Module) -> Part:
    """The part for one place, beside this host."""
    if place.layer.kind == "attention":
        in_proj, out_proj = MultiheadPart.projections(host)
        part: Part = MultiheadPart(
            _build_projection_part(method, config, place, in_proj),
            _build_projection_part(method, config, place, out_proj),
        )
    else:
        part = method.build(config, replace(place, host=host))
    part.store_in(device_and_dtype(host)[1])
    return part


def _build_projection_part(
    method: Method[Any], config: AdapterConfig, place: Place, linear: nn.Linear
) -> Part:
    """The part for a projection inside an attention module."""
    layer = Layer("linear", linear.in_features, linear.out_features, linear.bias is not None, "Linear")
    return method.build(config, Place(place.path, layer, place.role, linear))


def copy_target(view: ModelView, path: str, prefix: str = "") -> Target:
    """The target of a trainable copy of a module.

    Args:
        view: the model.
        path: the module's.
        prefix: what the names of the copy's tensors begin with in a file.
    """
    module = view.modules[path]
    shapes = {f"{prefix}{name}": tensor.shape for name, tensor in base_parameters(module).items()}
    build = partial(TrainableCopy, file_prefix=prefix)
    role = view.roles.get(path, HEAD)
    return Target(path, "copy", role, _sizes_at(view, path), shapes, build)


def token_targets(selection: Selection, chosen: Sequence[str]) -> list[Target]:
    """The targets of trained rows of embeddings.

    Args:
        selection: what the config selects.
        chosen: paths of the modules that have a part of the method.

    Raises:
        ConfigError: one of them is both.
    """
    view = selection.view
    targets = []
    for path, rows in selection.token_rows().items():
        if path in chosen:
            raise ConfigError(
                f"trainable_token_indices and target_modules both name {path!r}: its rows are trained one "
                "way or the other"
            )
        with torch.device("meta"):
            shapes = _shapes(TrainableTokens(view.modules[path], rows))
        build = partial(_build_token_part, rows)
        role = view.roles.get(path, EMBEDDING)
        targets.append(Target(path, "tokens", role, _sizes(view.layers[path]), shapes, build))
    return targets


def _build_token_part(rows: Sequence[int], host: nn.Module) -> Part:
    part = TrainableTokens(host, rows)
    part.store_in(device_and_dtype(host)[1])
    return part


def bias_targets(
    view: ModelView, biases: Biases, chosen: Sequence[str], copies: Sequence[str]
) -> list[Target]:
    """The targets of trainable biases; the file names those of the method's targets after their
    ``base_layer``.

    Args:
        view: the model.
        biases: which biases are trained.
        chosen: paths of the modules that have a part of the method.
        copies: paths of the modules that are trained as a whole.
    """
    if biases == "none":
        return []
    candidates = view.modules if biases == "all" else chosen
    targets = []
    for path in view.modules:
        bias = view.modules[path]._parameters.get("bias")
        if path not in candidates or bias is None or within(path, copies):
            continue
        name = "base_layer.bias" if path in chosen else "bias"
        build = partial(BiasOffset, file_name=name)
        targets.append(Target(path, "bias", "bias", _sizes_at(view, path), {name: bias.shape}, build))
    return targets


def with_tied_targets(view: ModelView, targets: Sequence[Target], *, everything: bool) -> list[Target]:
    """``targets``, and those of modules that share a target's weight and have to follow.

    A target that follows comes after the one that it follows, and stands in its own place if it was chosen
    itself.

    Args:
        view: the model.
        targets: of one config.
        everything: all kinds of targets are followed, but for biases; else trained tokens only.
    """
    sharing = _layers_by_weight(view)
    result: dict[tuple[str, str], Target] = {}
    for target in targets:
        # A module that follows an earlier target is that target's, though it was chosen itself.
        if (target.path, target.kind) in result:
            continue
        result[target.path, target.kind] = target
        is_followed = target.kind == "tokens" or (everything and target.kind != "bias")
        weight = view.modules[target.path]._parameters.get("weight")
        if not is_followed or weight is None:
            continue
        for path in sharing.get(weight, ()):
            if path != target.path:
                result[path, target.kind] = _tied_target(view, target, path)
    return list(result.values())


def _layers_by_weight(view: ModelView) -> dict[nn.Parameter, list[str]]:
    """The paths of the layers that compute with each weight; convolutions are left out, as no method follows
    theirs.
    """
    sharing: dict[nn.Parameter, list[str]] = {}
    for path, layer in view.layers.items():
        weight = view.modules[path]._parameters.get("weight")
        if weight is not None and layer.kind != "convolution":
            sharing.setdefault(weight, []).append(path)
    return sharing


def _tied_target(view: ModelView, target: Target, path: str) -> Target:
    """The target of a module that follows another one, whose weight it shares."""
    with torch.device("meta"):
        twin = target.build(view.modules[target.path]).tied(view.modules[path])
    return replace(
        target,
        path=path,
        role=view.roles[path],
        shape=_sizes(view.layers[path]),
        tensors=_shapes(twin),
        tied_to=target.path,
    )


def _shapes(part: Part) -> Mapping[str, Size]:
    """The shapes of a part's tensors by the names that a file gives them."""
    return {name: tensor.shape for name, tensor in part.file_tensors().items()}


def _sizes(layer: Layer) -> str:
    """A layer's sizes for people."""
    return f"{layer.in_features} -> {layer.out_features}"


def _sizes_at(view: ModelView, path: str) -> str:
    """The sizes of the layer at ``path`` for people; of another module its class."""
    if path in view.layers:
        return _sizes(view.layers[path])
    return type(view.modules[path]).__name__
