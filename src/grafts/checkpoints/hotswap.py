"""`grafts.hotswap`: a checkpoint takes the place of an adapter, in the very tensors that are there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from grafts.checkpoints.atomic_write import find
from grafts.checkpoints.load import LoadReport, prepare, read_checkpoint
from grafts.checkpoints.peft_format import Checkpoint, read_tensors
from grafts.checkpoints.save import STATE_FILE
from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.lifecycle.plan import Key, Plan
from grafts.lifecycle.registry import M, Registry, registry_of, unwrapped
from grafts.methods._registry import method_of
from grafts.sites.site import Part, RankedPart
from grafts.structure.interface import AdapterModelInterface

# The fields that say where an adapter stands. One that takes another's place takes it where that stands.
_PLACE = (
    "target_modules",
    "target_roles",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "feedforward_modules",
)
# The fields that say for which base and task an adapter is; they stay as well.
_ABOUT = ("task_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "revision")


def reserve(model: M, name: str, rank: int) -> M:
    """Make room for adapters of other ranks in the place of ``name``; its own update stays what it is.

    To be called before the model is compiled or an optimizer is made, since the adapter gets new tensors.

    Args:
        model: the model.
        name: which adapter.
        rank: the highest rank that is to come.

    Raises:
        AdapterNameError: there is no such adapter.
        ConfigError: the rank is not above 0, or below what the adapter has now.
        StateError: the adapter is merged.
    """
    registry = registry_of(unwrapped(model))
    registry.require(name)
    registry.require_unmerged(f"make room in {name!r}")
    check_reservable(registry.parts[name], rank)
    reserve_rank(registry.parts[name], rank)
    return model


def check_reservable(parts: Sequence[tuple[str, Part]], rank: int | None) -> None:
    """Refuse a rank up to which nothing can be reserved in these parts; those without a rank have one size.

    Args:
        parts: of an adapter, with their paths.
        rank: the highest rank that is to come; None for nothing to reserve.

    Raises:
        ConfigError: the rank is not above 0, or below what a part has now.
    """
    for _, part in parts:
        if rank is not None and isinstance(part, RankedPart):
            part.check_reservable(rank)


def reserve_rank(parts: Sequence[tuple[str, Part]], rank: int | None) -> None:
    """Reserve tensors for ranks up to this one in those parts that have a rank.

    Args:
        parts: of an adapter, with their paths; `check_reservable` holds for them.
        rank: the highest rank that is to come; None for nothing to reserve.
    """
    for _, part in parts:
        if rank is not None and isinstance(part, RankedPart):
            part.reserve_rank(rank)


def hotswap(
    model: nn.Module,
    path: str | os.PathLike[str] | Checkpoint,
    *,
    name: str = "default",
    allow_pickle: bool = False,
    interface: AdapterModelInterface | None = None,
) -> LoadReport:
    """Put another adapter in the place of ``name``, into the tensors that are there, so that compiled code
    stays good.

    What is active and trainable stays so. LoRA may be of another scaling and, up to the rank that `reserve`
    has made room for, of another rank. At targets that the new adapter does not have, the model computes as
    its base.

    Args:
        model: the model.
        path: a directory that `save` or `peft` wrote, or a checkpoint that was read already.
        name: which adapter to replace.
        allow_pickle: accept an ``adapter_model.bin``, read with ``torch.load(weights_only=True)``.
        interface: what the model's modules are.

    Returns:
        What was loaded.

    Raises:
        AdapterNameError: there is no such adapter.
        CheckpointError: the files are broken, or hold what the old adapter has no place for.
        ConfigError: the new adapter is of another method or build, or needs more room.
        StateError: the adapter is merged.
    """

    def fitting(config: AdapterConfig) -> AdapterConfig:
        return _in_place_of(registry.plans[name].config, config, name)

    inner = unwrapped(model)
    registry = registry_of(inner)
    registry.require(name)
    if isinstance(path, Checkpoint):
        checkpoint = path
    else:
        checkpoint = read_checkpoint(Path(path), allow_pickle=allow_pickle)
    return _swapped(inner, registry, name, checkpoint, interface, fitting, fill=True)


def restore(model: nn.Module, name: str, path: Path) -> LoadReport:
    """Give an adapter the tensors of a checkpoint of itself, and what its training goes on from; its config
    stays.

    Raises:
        AdapterNameError: there is no such adapter.
        CheckpointError: the files are broken, or are not of this adapter.
        StateError: the adapter is merged.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    config = registry.require(name).config
    file = find(path, STATE_FILE)
    state = {} if file is None else read_tensors(file)
    stateful = []
    for member, single in enumerate(registry.plans[name].single_plans):
        if single.method.files.has_training_state:
            stateful.append((member, single.method.files))
    # Said before anything is changed: with half of a state training would go on from somewhere else.
    if stateful and not state:
        raise CheckpointError(
            f"{str(path)!r} holds no {STATE_FILE}, which the training of {name!r} goes on from"
        )
    report = _swapped(inner, registry, name, read_checkpoint(path), None, lambda of_file: config)
    for member, files in stateful:
        files.resume(registry.own_parts(name, member), _of_member(state, member))
    return report


def _of_member(state: Mapping[str, Tensor], member: int) -> dict[str, Tensor]:
    """What the training of one member of an adapter goes on from, without the member's number in front."""
    prefix = f"{member}."
    tensors = {}
    for key, tensor in state.items():
        if key.startswith(prefix):
            tensors[key.removeprefix(prefix)] = tensor
    return tensors


def _swapped(
    model: nn.Module,
    registry: Registry,
    name: str,
    checkpoint: Checkpoint,
    interface: AdapterModelInterface | None,
    instead: Callable[[AdapterConfig], AdapterConfig],
    *,
    fill: bool = False,
) -> LoadReport:
    """Make the new adapter apart, see that it fits, and copy it over; the arguments are those of `prepare`.

    Raises:
        ConfigError: it does not fit into the tensors that are there.
    """
    registry.require_unmerged(f"replace {name!r}")
    old = registry.plans[name]
    prepared = prepare(model, name, checkpoint, interface or old.interface, instead=instead, fill=fill)
    # Both have to have the same parts, and each of them the capacity, before the first value is copied.
    before = _parts_by_key(old, registry.parts[name])
    after = _parts_by_key(prepared.report.plan, prepared.parts)
    if before.keys() != after.keys():
        strays = sorted({path for path, _, _ in after.keys() ^ before.keys()})
        raise ConfigError(
            f"adapter {name!r} cannot be replaced: the other one differs in what it has at {strays[0]!r}"
        )
    for key, part in before.items():
        try:
            part.check_capacity(after[key])
        except ConfigError as error:
            raise ConfigError(f"adapter {name!r} cannot be replaced: {key[0]!r}: {error}") from error
    with torch.no_grad():
        for key, part in before.items():
            part.copy_from(after[key])
    registry.plans[name] = prepared.report.plan
    return prepared.report


def _parts_by_key(plan: Plan, parts: Sequence[tuple[str, Part]]) -> dict[Key, Part]:
    """The parts of an adapter by the keys of their targets."""
    return {target.key: part for target, (_, part) in zip(plan.targets, parts, strict=True)}


def _in_place_of(old: AdapterConfig, new: AdapterConfig, name: str) -> AdapterConfig:
    """The config of a new adapter where the old one stands.

    Raises:
        ConfigError: it is of another method, or differs where no adapter can be replaced.
    """
    method = method_of(old)
    if type(new) is not type(old):
        raise ConfigError(
            f"adapter {name!r} is {method.title}, and {method_of(new).title} cannot take its place"
        )
    if method.members is not None:
        raise ConfigError(f"adapter {name!r} is made of several, and cannot be replaced in place")
    # It stands where the old one stands, and is for whom that is.
    names = old.field_names()
    kept = {field: getattr(old, field) for field in names if field in _PLACE or field in _ABOUT}
    result = dataclasses.replace(new, **kept)
    for field in names:
        ours, theirs = getattr(old, field), getattr(result, field)
        if ours != theirs and field not in method.files.replaceable:
            raise ConfigError(
                f"adapter {name!r} cannot be replaced in place by one with another {field}\n"
                f"  here:   {ours!r}\n  there:  {theirs!r}\n  load it under a name of its own"
            )
    return result
