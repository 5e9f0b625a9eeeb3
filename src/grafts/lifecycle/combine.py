"""Making several adapters into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import AdapterNameError, ConfigError, StateError, did_you_mean
from grafts.lifecycle.attach import attach_parts
from grafts.lifecycle.build import build_part, build_parts, prepare_plan
from grafts.lifecycle.plan import Plan
from grafts.lifecycle.registry import registry_of, unwrapped
from grafts.methods._tensor_merging import TensorMerging
from grafts.modules.patterns import join

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def combine(
    model: M,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    name: str = "combined",
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    generator: torch.Generator | None = None,
    activate: bool = True,
    train: bool = False,
) -> M:
    """Make several adapters of one method into a new one; they stay as they are.

    What it means is the method's affair; each page of the docs says it. One adapter with weight 1 gives that
    adapter's output, whatever the way. Trained copies, biases and tokens are moved from the base's values by
    the weighted sum of how far the adapters have moved them.

    Args:
        model: the model that carries them.
        names: the adapters.
        weights: one for each; 1 for each if not given.
        name: what to call the new one.
        method: the way: ``"linear"``, ``"cat"``, ``"svd"``, ``"ties"`` ..., of those that the adapters'
            method declares.
        rank: the rank of the result of the svd forms; the largest of the adapters' if not given.
        density: the share of values that ties, dare and magnitude_prune keep.
        majority_sign: what ties goes by: the ``"total"`` of the values or the ``"frequency"`` of the signs.
        generator: where the random choice of dare comes from.
        activate: make it the active adapter.
        train: make it the only trainable one; else it is frozen.

    Returns:
        The same model.

    Raises:
        AdapterNameError: a name is unknown, or the new one taken.
        ConfigError: the way does not exist for these adapters, or an option is missing or without meaning.
        StateError: adapters are merged.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    registry.require_unmerged("combine adapters")
    if isinstance(names, str) or not names:
        raise AdapterNameError(f"names is a list of adapters, not {names!r}")
    plans = [registry.require(source) for source in names]
    shares = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(names):
        raise ConfigError(f"{len(names)} adapters and {len(shares)} weights; give one for each")
    kind = plans[0].method
    if different := [source for source, made in zip(names, plans, strict=True) if made.method is not kind]:
        raise ConfigError(
            f"{names[0]!r} is {kind.title} and {different[0]!r} is not; adapters of one method can be made "
            f"into one"
        )
    if kind.combine is None or method not in kind.combinations:
        known = did_you_mean(method, kind.combinations)
        raise ConfigError(f"{kind.title} adapters cannot be combined by {method!r}; {known}")
    blend = TensorMerging(method, rank, density, majority_sign, generator)
    sources = [
        (made.config, registry.own_parts(source), share)
        for source, made, share in zip(names, plans, shares, strict=True)
    ]
    config, tensors = kind.combine(sources, blend)
    made = prepare_plan(inner, _config_for_all(config, plans), name=name, interface=plans[0].interface)
    tensors = {**tensors, **_extras(inner, made, names, shares)}
    needed = {join(t.path, key) for t in made.targets if t.tied_to is None for key in t.tensors}
    if needed != set(tensors):
        raise StateError(f"cannot combine {list(names)}: no one has {sorted(needed ^ set(tensors))[:3]}")
    return attach_parts(
        model, name, made, build_parts(inner, made, name, tensors), activate=activate, train=train
    )


_BIASES = ("none", "lora_only", "all")  # each trains what those before it train, and more


def _config_for_all(config: AdapterConfig, plans: Sequence[Plan]) -> AdapterConfig:
    """``config`` with every module that one of the adapters has, by its path."""
    if len({str(getattr(p.config, "trainable_token_indices", None)) for p in plans}) > 1:
        raise ConfigError(
            "adapters that train different tokens (trainable_token_indices) cannot be made into one"
        )
    copies = dict.fromkeys(t.path for p in plans for t in p.targets if t.kind == "copy" and t.tied_to is None)
    own = dict.fromkeys(
        t.path
        for p in plans
        for t in p.targets
        if t.kind == p.method.name and t.tied_to is None and t.tensors
    )
    named: dict[str, Any] = {"target_modules": tuple(own), "exclude_modules": None, "target_roles": None}
    changes: dict[str, Any] = {
        **(named if plans[0].method.places is None else {}),
        "modules_to_save": tuple(copies) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if "bias" in config.field_names():
        changes["bias"] = max((p.config.bias for p in plans), key=_BIASES.index)  # type: ignore[attr-defined]
    return dataclasses.replace(
        config, **{key: value for key, value in changes.items() if key in config.field_names()}
    )


def _extras(
    model: nn.Module, made: Plan, names: Sequence[str], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The tensors of copies, biases and tokens: the base's, moved by the weighted sum of the adapters'
    moves.
    """
    registry = registry_of(model)
    result = {}
    for target in made.targets:
        if target.kind == made.method.name or target.tied_to is not None:
            continue
        host = model.get_submodule(target.path)
        untrained = build_part(target, host, None)
        untrained.from_base(host, fresh=True)
        start = untrained.file_tensors()
        for key in target.tensors:
            moved = start[key].clone()
            for name, weight in zip(names, weights, strict=True):
                for other, (_, part) in zip(registry.plans[name].targets, registry.parts[name], strict=True):
                    if (other.path, other.kind) == (target.path, target.kind):
                        # A file says "base_layer." where the adapter has a part of its own at the module; not
                        # all may have.
                        values = {_at_module(own): tensor for own, tensor in part.file_tensors().items()}
                        moved += weight * (values[_at_module(key)] - start[key])
            result[join(target.path, key)] = moved
    return result


def _at_module(key: str) -> str:
    """The name of a tensor at its module, whether or not the file names the module as the base of a part."""
    return key.removeprefix("base_layer.")
