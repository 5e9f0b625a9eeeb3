"""Folding adapters into the base weights, and getting the base back bitwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from grafts.errors import MergeError, StateError
from grafts.lifecycle.activate import activate, deactivate
from grafts.lifecycle.registry import Merge, Undo, parts_of, registry_of, unwrapped
from grafts.modules.tree import base_modules
from grafts.modules.weights import read_weights, to_finite_storage
from grafts.sites.module import fold
from grafts.sites.site import Part

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


@torch.no_grad()
def merge(model: M, names: str | Sequence[str] | None = None, *, untie: bool = False) -> M:
    """Fold adapters into the base weights, so that the plain model computes what the adapted one did.

    The sum is made in float32 (float64 for a float64 base) whatever the weights are stored in, and rounded
    once. All modules are merged or none. The originals are kept, so `unmerge` gives the base back bitwise.

    Args:
        model: the model.
        names: which adapters, in the order in which they act; the active ones if not given.
        untie: give a weight that other modules share (an embedding tied to the head) storage of its own
            first.

    Returns:
        The same model, computing with these adapters through its weights.

    Raises:
        AdapterNameError: a name is unknown.
        StateError: adapters are merged already.
        MergeError: a module's weights cannot be merged: shared with others, quantized, offloaded, or not
            finite.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    registry.require_unmerged("merge")
    before = registry.setup.active
    wanted = before if names is None else (names,) if isinstance(names, str) else tuple(names)
    if not wanted:
        raise MergeError("no adapter is active: name the one to merge")
    with_parts: dict[str, list[Part]] = defaultdict(list)
    for name in wanted:
        for one in registry.require(name).each():
            if not one.method.can_merge(one.config):
                raise MergeError(f"adapter {name!r}: {one.method.title} has no exact merge")
        for path, part in parts_of(inner, name):
            with_parts[path].append(part)
    ready = {path: _merged_tensors(inner, path, parts) for path, parts in with_parts.items()}
    shared = _shared(inner, ready)
    if not untie:
        shared = {name: others for name, others in shared.items() if not _alike(ready, name, others)}
    if shared and not untie:
        path, others = next(iter(shared.items()))
        raise MergeError(
            f"{path!r} shares its storage with {others}, which merging would change as well: "
            "leave it out of the adapter's targets, or give it a copy of its own with grafts.merge(..., "
            "untie=True)"
        )
    activate(model, wanted)
    tensors = {name: tensor for path in ready for name, tensor in _full_names(path, ready[path]).items()}
    undo = [
        _put(inner, name, tensor, name in shared)
        for name, tensor in _once_each(inner, tensors, shared).items()
    ]
    if shared:
        undo.append(_untie_config(inner))
    registry.merge = Merge(undo, before)
    registry.setup.set(active=wanted, merged=wanted)
    return model


def unmerge(model: M) -> M:
    """Give the base weights back, bitwise; the inverse of `merge`, down to what was active before it.

    Raises:
        StateError: nothing is merged.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    merged = registry.merge
    if merged is None:
        raise StateError("nothing is merged")
    for step in merged.undo:
        step(inner)
    registry.merge = None
    registry.setup.set(active=merged.active)
    return model


def _merged_tensors(model: nn.Module, path: str, parts: list[Part]) -> dict[str, Tensor]:
    """The tensors of one module that the parts change, ready to be put in its place."""
    module = model.get_submodule(path)
    try:
        return to_finite_storage(module, fold(read_weights(module), parts))
    except MergeError as error:
        raise MergeError(f"cannot merge into {path!r}: {error}") from error


def _shared(model: nn.Module, ready: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[str]]:
    """Which of the tensors to be changed share storage with others of the model: name -> the others'
    names.
    """
    by_storage: dict[tuple[torch.device, int], list[str]] = defaultdict(list)
    for path, module in base_modules(model):  # each once, by the path that planning knows it by
        for name, tensor in _full_names(path, module._parameters).items():
            if tensor is not None and tensor.device.type != "meta":
                by_storage[tensor.device, tensor.untyped_storage().data_ptr()].append(name)
    groups = {name: names for names in by_storage.values() for name in names}
    changed = [name for path, tensors in ready.items() for name in _full_names(path, tensors)]
    return {
        name: others for name in changed if (others := [other for other in groups[name] if other != name])
    }


def _alike(ready: Mapping[str, Mapping[str, Tensor]], name: str, others: Sequence[str]) -> bool:
    """Whether all modules that share a tensor are merged to the same values, up to rounding: they can go on
    sharing it.
    """
    tensors = {key: tensor for path in ready for key, tensor in _full_names(path, ready[path]).items()}
    here = tensors[name]
    rounding = 4 * torch.finfo(here.dtype).eps
    return all(
        other in tensors
        and torch.allclose(tensors[other], here, rtol=rounding, atol=rounding * float(here.abs().max()))
        for other in others
    )


def _once_each(
    model: nn.Module, tensors: Mapping[str, Tensor], untied: Mapping[str, object]
) -> dict[str, Tensor]:
    """``tensors`` without those whose parameter stands there under another name already and stays shared."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        if name in untied or id(parameter) not in seen:
            result[name] = tensor
        seen.add(id(parameter))
    return result


class _Restore:
    """Puts one tensor back where a merge has replaced it; a class, so that it can be copied and pickled with
    the model.
    """

    def __init__(self, path: str, name: str, original: nn.Parameter | Tensor) -> None:
        self.path, self.name, self.original = path, name, original

    def __call__(self, model: nn.Module) -> None:
        owner = model.get_submodule(self.path)
        now = owner.get_parameter(self.name)
        if isinstance(self.original, nn.Parameter):
            owner._parameters[self.name] = self.original
        else:
            now.data = self.original.to(now.device, now.dtype)


class _RestoreConfig:
    """Says in a model's config again that its embedding and head are tied."""

    def __init__(self, tied: object) -> None:
        self.tied = tied

    def __call__(self, model: nn.Module) -> None:
        if self.tied is not None:
            model.config.tie_word_embeddings = self.tied  # type: ignore[union-attr]


def _full_names(path: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """A module's tensors by their names in the whole model."""
    return {f"{path}.{name}" if path else name: tensor for name, tensor in tensors.items()}


def _put(model: nn.Module, name: str, tensor: Tensor, untie: bool) -> Undo:
    """Put a merged tensor in its place and say how to get the old one back."""
    owner_path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_path)
    parameter = owner.get_parameter(leaf)
    if untie:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        return _Restore(owner_path, leaf, parameter)
    original, parameter.data = parameter.data, tensor
    return _Restore(owner_path, leaf, original)


def _untie_config(model: nn.Module) -> Undo:
    """Let a `transformers` model's config say that embedding and head are two now."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    if tied is not None:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return _RestoreConfig(tied)


@dataclass(frozen=True)
class MergeReport:
    """What merging costs on given inputs.

    Attributes:
        names: the adapters, in the order in which they act.
        max_error: the largest difference between an output unmerged and merged.
        mean_error: the mean of these differences.
        effect: the largest difference that the adapters make to the base's outputs.
        scale: the largest magnitude in the unmerged outputs.
    """

    names: tuple[str, ...]
    max_error: float
    mean_error: float
    effect: float
    scale: float

    def __str__(self) -> str:
        """Two lines for people."""
        share = self.max_error / self.effect if self.effect else float("inf")
        return (
            f"merging {', '.join(self.names)}: outputs differ by at most {self.max_error:.2g} (mean "
            f"{self.mean_error:.2g}), {self.max_error / max(self.scale, 1e-30):.1e} of their size\n"
            f"  the adapters themselves move them by {self.effect:.2g}, so the merge costs {share:.1e} of "
            "their effect"
        )


@torch.no_grad()
def verify_merge(model: nn.Module, inputs: Any, names: str | Sequence[str] | None = None) -> MergeReport:
    """Measure what merging costs: run the model bare, unmerged and merged, and compare. The model is left as
    it was.

    Args:
        model: the model; dropout is off while it runs.
        inputs: what to call it with: a tensor, a tuple of arguments or a dictionary of keyword arguments.
        names: which adapters; the active ones if not given.

    Returns:
        The report; ``print`` it.

    Raises:
        MergeError: what `merge` raises, and outputs without any floating-point tensor.
    """
    registry = registry_of(unwrapped(model))
    registry.require_unmerged("verify a merge")
    before, training = registry.setup.active, [module for module in model.modules() if module.training]
    wanted = before if names is None else (names,) if isinstance(names, str) else tuple(names)

    def outputs() -> list[Tensor]:
        called = (
            model(**inputs)
            if isinstance(inputs, Mapping)
            else model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
        )
        leaves = tree_leaves(dict(called) if isinstance(called, Mapping) else called)
        return [x.double() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]

    try:
        model.eval()
        deactivate(model)
        bare = outputs()
        activate(model, wanted)
        unmerged = outputs()
        merge(model, wanted)
        try:
            merged = outputs()
        finally:
            unmerge(model)
    finally:
        registry.setup.set(active=before)
        for module in training:
            module.training = True
    if not unmerged:
        raise MergeError("the model's output holds no floating-point tensor to compare")
    errors = [(a - b).abs() for a, b in zip(unmerged, merged, strict=True)]
    return MergeReport(
        names=wanted,
        max_error=max(float(e.max()) for e in errors),
        mean_error=float(torch.cat([e.flatten() for e in errors]).mean()),
        effect=max(float((a - b).abs().max()) for a, b in zip(unmerged, bare, strict=True)),
        scale=max(float(a.abs().max()) for a in unmerged),
    )
