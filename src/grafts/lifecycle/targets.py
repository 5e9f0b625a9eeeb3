"""The targets of a plan: what each part holds, and how it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from grafts.config import AdapterConfig
from grafts.errors import ConfigError
from grafts.lifecycle.plan import Key, Target
from grafts.methods._registry import Method, Place
from grafts.methods.shared.auxiliary import BiasOffset, TrainableCopy, TrainableTokens
from grafts.methods.shared.multihead import MultiheadPart
from grafts.modules.layers import Layer
from grafts.modules.patterns import within
from grafts.modules.tree import base_parameters, device_and_dtype
from grafts.sites.site import Part
from grafts.structure.roles import EMBEDDING, HEAD, ModelView


def _with_tied(view: ModelView, targets: Sequence[Target], *, everything: bool) -> list[Target]:
    """``targets``, and those of modules that share a target's weight and have to follow: trained tokens
    always.

    A target that follows comes after the one that it follows, and stands in its own place if it was chosen
    itself.
    """
    sharing: dict[int, list[str]] = {}
    for path, layer in view.layers.items():
        weight = view.modules[path]._parameters.get("weight")
        if weight is not None and layer.kind != "convolution":
            sharing.setdefault(id(weight), []).append(path)
    result: dict[tuple[str, str], Target] = {}
    for target in targets:
        if (target.path, target.kind) in result:
            continue
        result[target.path, target.kind] = target
        if target.kind == "bias" or not (everything or target.kind == "tokens"):
            continue
        for other in sharing.get(id(view.modules[target.path]._parameters.get("weight")), []):
            if other != target.path:
                result[other, target.kind] = _tied_target(view, target, other)
    return list(result.values())


def _tied_target(view: ModelView, target: Target, path: str) -> Target:
    with torch.device("meta"):
        twin = target.build(view.modules[target.path]).tied(view.modules[path])
    return replace(
        target,
        path=path,
        role=view.roles[path],
        shape=_sizes(view.layers[path]),
        tensors={name: tensor.shape for name, tensor in twin.file_tensors().items()},
        tied_to=target.path,
    )


_NO_HOST = nn.Module()  # a plan holds on to no module of the model


def _method_target(
    place: Place,
    host: nn.Module,
    config: AdapterConfig,
    method: Method,
    others: tuple[Place, ...],
    blanks: dict[Key, Part] | None,
    member: int,
) -> Target:
    build = partial(_method_part, method, config, replace(place, others=others))
    part = build(host)
    if blanks is not None:
        blanks[place.path, method.name, member] = part
    shapes = {name: tensor.shape for name, tensor in part.file_tensors().items()}
    return Target(place.path, method.name, place.role, _sizes(place.layer), shapes, build, site=part.site)


def _method_part(method: Method, config: AdapterConfig, place: Place, host: nn.Module) -> Part:
    if place.layer.kind == "attention":
        part: Part = MultiheadPart(
            *(_projection(method, config, place, linear) for linear in MultiheadPart.projections(host))
        )
    else:
        part = method.build(config, replace(place, host=host))
    return in_dtype(part, device_and_dtype(host)[1])


def in_dtype(part: Part, dtype: torch.dtype) -> Part:
    """``part`` stored in ``dtype``; methods make float32."""
    return part if dtype == torch.float32 else part.to(dtype=dtype)


def _projection(method: Method, config: AdapterConfig, place: Place, linear: nn.Linear) -> Part:
    """The part for a projection inside an attention module."""
    layer = Layer("linear", linear.in_features, linear.out_features, linear.bias is not None, "Linear")
    return method.build(config, Place(place.path, layer, place.role, linear))


def _token_target(view: ModelView, path: str, rows: Sequence[int], chosen: Sequence[str]) -> Target:
    if path in chosen:
        raise ConfigError(
            f"trainable_token_indices and target_modules both name {path!r}: its rows are trained one way or "
            f"the other"
        )
    module = view.modules[path]
    with torch.device("meta"):
        part = TrainableTokens(module, rows)
    shapes = {name: tensor.shape for name, tensor in part.file_tensors().items()}
    build = partial(_token_part, rows)
    return Target(path, "tokens", view.roles.get(path, EMBEDDING), _sizes(view.layers[path]), shapes, build)


def _token_part(rows: Sequence[int], host: nn.Module) -> Part:
    return in_dtype(TrainableTokens(host, rows), device_and_dtype(host)[1])


def _copy_target(view: ModelView, path: str, prefix: str = "") -> Target:
    module = view.modules[path]
    shapes = {f"{prefix}{name}": tensor.shape for name, tensor in base_parameters(module).items()}
    shape = _sizes(view.layers[path]) if path in view.layers else type(module).__name__
    return Target(
        path, "copy", view.roles.get(path, HEAD), shape, shapes, partial(TrainableCopy, file_prefix=prefix)
    )


def _bias_targets(view: ModelView, wanted: str, chosen: Sequence[str], copied: Sequence[str]) -> list[Target]:
    """The trainable biases that ``config.bias`` asks for; the file names those of targets after their
    ``base_layer``.
    """
    targets = []
    for path, module in view.modules.items():
        bias = module._parameters.get("bias")
        if (
            wanted == "none"
            or bias is None
            or within(path, copied)
            or (wanted == "lora_only" and path not in chosen)
        ):
            continue
        name = "base_layer.bias" if path in chosen else "bias"
        shape = _sizes(view.layers[path]) if path in view.layers else type(module).__name__
        targets.append(
            Target(path, "bias", "bias", shape, {name: bias.shape}, partial(BiasOffset, file_name=name))
        )
    return targets


def _sizes(layer: Layer) -> str:
    return f"{layer.in_features} -> {layer.out_features}"
