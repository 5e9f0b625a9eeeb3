"""Folding adapters into the base weights, and getting the base back bitwise."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from grafts.errors import MergeError, StateError
from grafts.lifecycle.activate import activate, as_names, deactivate
from grafts.lifecycle.registry import M, Merge, Registry, Undo, registry_of, unwrapped
from grafts.modules.patterns import join
from grafts.modules.weights import read_weights, to_finite_storage
from grafts.sites.module import fold
from grafts.sites.site import Part
from grafts.structure.view import ModelView, look_at


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
    # All new tensors are computed before the first one is put in its place.
    inner = unwrapped(model)
    registry = registry_of(inner)
    registry.require_unmerged("merge")
    before = registry.setup.active
    wanted = before if names is None else as_names(names)
    if not wanted:
        raise MergeError("no adapter is active: name the one to merge")
    parts = _parts_by_path(registry, wanted)
    view = look_at(inner)
    tensors: dict[str, Tensor] = {}
    for path, of_module in parts.items():
        for name, tensor in _merged_tensors(view.modules[path], path, of_module).items():
            tensors[join(path, name)] = tensor

    # What shares its storage either gets one of its own, or all that share it have to come to the same.
    shared = _shared_storage(view, tensors)
    if not untie:
        _require_alike(tensors, shared)
        shared = {}
    # Refuses unknown names and those that stand twice, still before anything is changed.
    activate(model, wanted)
    undo = []
    for name, tensor in _once_each(inner, tensors, shared).items():
        undo.append(_put(inner, name, tensor, name in shared))
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


def _parts_by_path(registry: Registry, names: Sequence[str]) -> dict[str, list[Part]]:
    """The parts of several adapters at each module, in the order in which they act.

    Raises:
        AdapterNameError: a name is unknown.
        MergeError: a method cannot be merged.
    """
    parts: dict[str, list[Part]] = defaultdict(list)
    for name in names:
        for single in registry.require(name).single_plans:
            if not single.method.can_merge(single.config):
                raise MergeError(f"adapter {name!r}: {single.method.title} has no exact merge")
        for path, part in registry.parts[name]:
            parts[path].append(part)
    return parts


def _merged_tensors(module: nn.Module, path: str, parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors of one module that the parts change, ready to be put in its place.

    Raises:
        MergeError: naming the module.
    """
    try:
        return to_finite_storage(module, fold(read_weights(module), parts))
    except MergeError as error:
        raise MergeError(f"cannot merge into {path!r}: {error}") from error


def _shared_storage(view: ModelView, changed: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Which of the tensors to be changed share storage with others of the model.

    Args:
        view: the model.
        changed: the tensors by their names in the whole model.

    Returns:
        The names of the others, by the name of each that shares.
    """
    # Not by the tensors themselves: two of them may be views of one storage.
    storage_of: dict[str, tuple[torch.device, int]] = {}
    by_storage: dict[tuple[torch.device, int], list[str]] = defaultdict(list)
    for path, module in view.modules.items():
        for name, tensor in module._parameters.items():
            if tensor is None or tensor.device.type == "meta":
                continue
            storage = tensor.device, tensor.untyped_storage().data_ptr()
            by_storage[storage].append(join(path, name))
            storage_of[join(path, name)] = storage
    shared = {}
    for name in changed:
        others = [other for other in by_storage[storage_of[name]] if other != name]
        if others:
            shared[name] = others
    return shared


def _require_alike(tensors: Mapping[str, Tensor], shared: Mapping[str, Sequence[str]]) -> None:
    """Refuse to change a shared tensor, unless all modules that share it are merged to the same values, up to
    rounding: they can go on sharing it.

    Raises:
        MergeError: naming it, the others, and the way out.
    """
    for name, others in shared.items():
        ours = tensors[name]
        # The same sum is rounded another way where it is laid out another way (embedding and head).
        rounding = 4 * torch.finfo(ours.dtype).eps
        reach = rounding * float(ours.abs().max())
        for other in others:
            theirs = tensors.get(other)
            if theirs is None or not torch.allclose(theirs, ours, rtol=rounding, atol=reach):
                raise MergeError(
                    f"{name!r} shares its storage with {list(others)}, which merging would change as well: "
                    "leave it out of the adapter's targets, or give it a copy of its own with "
                    "grafts.merge(..., untie=True)"
                )


def _once_each(
    model: nn.Module, tensors: Mapping[str, Tensor], untied: Mapping[str, object]
) -> dict[str, Tensor]:
    """``tensors`` without those whose parameter stands there under another name already and stays shared."""
    seen: set[nn.Parameter] = set()
    result = {}
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        if name in untied or parameter not in seen:
            result[name] = tensor
        seen.add(parameter)
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
        # A parameter takes its old place; values go back into the parameter that is there, wherever it has
        # moved since.
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
        if self.effect:
            share = self.max_error / self.effect
        else:
            share = float("inf")
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
    wanted = registry.setup.active if names is None else as_names(names)
    with _evaluating(model, registry):
        deactivate(model)
        bare = _outputs(model, inputs)
        activate(model, wanted)
        unmerged = _outputs(model, inputs)
        merge(model, wanted)
        try:
            merged = _outputs(model, inputs)
        finally:
            unmerge(model)
    if not unmerged:
        raise MergeError("the model's output holds no floating-point tensor to compare")
    errors = _differences(unmerged, merged)
    effects = _differences(unmerged, bare)
    return MergeReport(
        names=wanted,
        max_error=max(float(error.max()) for error in errors),
        mean_error=float(torch.cat([error.flatten() for error in errors]).mean()),
        effect=max(float(effect.max()) for effect in effects),
        scale=max(float(output.abs().max()) for output in unmerged),
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module, registry: Registry) -> Iterator[None]:
    """Put a model into evaluation mode for the length of a ``with`` block; after it, modes and the active
    adapters are what they were.
    """
    active = registry.setup.active
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        registry.setup.set(active=active)
        for module in training:
            module.training = True


def _differences(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[Tensor]:
    """How far outputs are apart, number by number."""
    return [(our - their).abs() for our, their in zip(ours, theirs, strict=True)]


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors of floating-point numbers that a model gives, in float64.

    Args:
        model: the model.
        inputs: a tensor, a tuple of arguments or a dictionary of keyword arguments.
    """
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, tuple):
        output = model(*inputs)
    else:
        output = model(inputs)
    if isinstance(output, Mapping):
        output = dict(output)  # the tree of PyTorch does not know the classes of all outputs
    tensors = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            tensors.append(leaf.double())
    return tensors
