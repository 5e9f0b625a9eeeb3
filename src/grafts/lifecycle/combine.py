"""Making several adapters into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grafts.config import BIASES, AdapterConfig
from grafts.errors import AdapterNameError, ConfigError, StateError, did_you_mean
from grafts.lifecycle.attach import attach_parts
from grafts.lifecycle.build import build_fresh, build_parts, draft_adapter, require_new_name, tensor_name
from grafts.lifecycle.plan import Plan, Target
from grafts.lifecycle.registry import M, Registry, registry_of, unwrapped
from grafts.methods._registry import Method, Source
from grafts.methods._tensor_merging import TensorMerging
from grafts.structure.view import look_at


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
    shares = _shares(names, weights)
    record = _common_method(names, plans)
    if record.combine is None or method not in record.combinations:
        known = did_you_mean(method, record.combinations)
        raise ConfigError(f"{record.title} adapters cannot be combined by {method!r}; {known}")

    # The method says what the new adapter is; what else the adapters train is the same for all methods.
    merging = TensorMerging(method, rank, density, majority_sign, generator)
    sources = []
    for source, plan, share in zip(names, plans, shares, strict=True):
        sources.append(Source(plan.config, registry.own_parts(source), share))
    config, own_tensors = record.combine(sources, merging)

    # From here on it is added as one that was read from a file.
    require_new_name(inner, name)
    view = look_at(inner)
    joint_config = _config_for_all(config, plans)
    plan = draft_adapter(view, joint_config, name, interface=plans[0].interface).plan
    tensors = {**own_tensors, **_auxiliary_tensors(inner, registry, plan, names, shares)}
    needed = _names_needed(plan)
    if needed != set(tensors):
        raise StateError(f"cannot combine {list(names)}: no one has {sorted(needed ^ set(tensors))[:3]}")
    parts = build_parts(view, plan, name, tensors)
    attach_parts(view, name, plan, parts, activate=activate, train=train)
    return model


def _shares(names: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """The weight of each adapter: 1 where none are given.

    Raises:
        ConfigError: there are more or fewer weights than adapters.
    """
    if weights is None:
        return [1.0] * len(names)
    shares = [float(weight) for weight in weights]
    if len(shares) != len(names):
        raise ConfigError(f"{len(names)} adapters and {len(shares)} weights; give one for each")
    return shares


def _names_needed(plan: Plan) -> set[str]:
    """The names of the tensors that an adapter of this plan has; what follows another target has none."""
    needed: set[str] = set()
    for target in plan.targets:
        if target.tied_to is None:
            needed.update(tensor_name(plan, target, key) for key in target.tensors)
    return needed


def _common_method(names: Sequence[str], plans: Sequence[Plan]) -> Method[Any]:
    """The method that all of the adapters have.

    Raises:
        ConfigError: one has another.
    """
    method = plans[0].method
    for name, plan in zip(names, plans, strict=True):
        if plan.method is not method:
            raise ConfigError(
                f"{names[0]!r} is {method.title} and {name!r} is not; adapters of one method can be made "
                "into one"
            )
    return method


def _config_for_all(config: AdapterConfig, plans: Sequence[Plan]) -> AdapterConfig:
    """``config`` with every module that one of the adapters has, by its path.

    Raises:
        ConfigError: the adapters train different tokens.
    """
    auxiliaries = [plan.config.auxiliary() for plan in plans]
    if any(auxiliary.tokens != auxiliaries[0].tokens for auxiliary in auxiliaries):
        raise ConfigError(
            "adapters that train different tokens (trainable_token_indices) cannot be made into one"
        )
    # The most that one of them trains: what another has not trained stays there as the base has it.
    biases = max((auxiliary.biases for auxiliary in auxiliaries), key=BIASES.index)
    targets: dict[str, None] = {}  # ordered, each once
    copies: dict[str, None] = {}
    for plan in plans:
        for target in plan.targets:
            if target.is_own and target.tensors:
                targets[target.path] = None
            elif target.kind == "copy" and target.tied_to is None:
                copies[target.path] = None
    stands_on_stream = plans[0].method.places is not None
    return config.for_modules(None if stands_on_stream else tuple(targets), tuple(copies), biases)


def _auxiliary_tensors(
    model: nn.Module, registry: Registry, plan: Plan, names: Sequence[str], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The tensors of copies, biases and tokens: the base's, moved by the weighted sum of the adapters' moves.

    Args:
        model: the base model.
        registry: what it carries.
        plan: of the new adapter.
        names: of the adapters.
        weights: one for each.
    """
    tensors = {}
    for target in plan.targets:
        if target.kind == plan.method.name or target.tied_to is not None:
            continue
        host = model.get_submodule(target.path)
        untrained = build_fresh(target, host)
        untrained.from_base(host, fresh=True)
        for key, start in untrained.file_tensors().items():
            moved = start.clone()
            for name, weight in zip(names, weights, strict=True):
                trained = _trained_value(registry, name, target, key)
                if trained is not None:
                    moved += weight * (trained - start)
            tensors[tensor_name(plan, target, key)] = moved
    return tensors


def _trained_value(registry: Registry, name: str, target: Target, key: str) -> Tensor | None:
    """What adapter ``name`` has trained a tensor of a copy, a bias or tokens to; None where it has none
    there.
    """
    for other, (_, part) in zip(registry.plans[name].targets, registry.parts[name], strict=True):
        if (other.path, other.kind) != (target.path, target.kind):
            continue
        # A file says "base_layer." where the adapter has a part of its own at the module; not all may have.
        for other_key, tensor in part.file_tensors().items():
            if _at_module(other_key) == _at_module(key):
                return tensor
    return None


def _at_module(key: str) -> str:
    """The name of a tensor at its module, whether or not the file names the module as the base of a part."""
    return key.removeprefix("base_layer.")
