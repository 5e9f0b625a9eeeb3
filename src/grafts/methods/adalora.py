"""AdaLoRA: low-rank updates whose ranks are allotted by importance (Zhang et al. 2023,
https://arxiv.org/abs/2303.10512).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from grafts.config import config, option
from grafts.errors import AdapterNameError, ConfigError, StateError
from grafts.methods._files import MethodFiles, Parts
from grafts.methods._registry import Place, Source, method
from grafts.methods._tensor_merging import TensorMerging
from grafts.methods.shared.low_rank import is_transposed, product
from grafts.methods.shared.low_rank_config import LowRankConfig
from grafts.modules.layers import Layer
from grafts.modules.patterns import join
from grafts.sites.module import ModulePart
from grafts.sites.site import Part, sites_in
from grafts.structure.roles import FUSED, KEY_VALUE, QUERY, VALUE


@config
class AdaLoraConfig(LowRankConfig):
    """What an AdaLoRA adapter is: ``y + scaling * P Λ Q x``, and how its ranks shrink while it is trained.

    Ranks stay at ``init_r`` for ``tinit`` optimizer steps, fall until ``total_step - tfinal`` to ``target_r``
    on average, and then stay. Steps are counted by themselves, whenever an optimizer that holds the adapter
    steps.

    >>> AdaLoraConfig(init_r=12, target_r=4, tinit=10, tfinal=20, total_step=100).init_r
    12
    """

    target_r: int = option(8, "The rank that targets have on average at the end.")
    init_r: int = option(12, "The rank of every target at the start.")
    tinit: int = option(0, "Optimizer steps before the ranks begin to fall.")
    tfinal: int = option(0, "Optimizer steps at the end in which the ranks stay.")
    deltaT: int = option(1, "Optimizer steps between two allotments.")  # noqa: N815 (the file format's name)
    beta1: float = option(0.85, "The decay of the smoothed sensitivity, between 0 and 1 (eq. 8).")
    beta2: float = option(0.85, "The decay of the smoothed uncertainty, between 0 and 1 (eq. 9).")
    orth_reg_weight: float = option(0.5, "The weight of the penalty that keeps P and Q orthogonal (eq. 4).")
    total_step: int | None = option(
        None, "Optimizer steps in all; the Trainer of transformers tells it where it is not given."
    )
    rank_pattern: dict[str, list[bool]] | None = option(
        None,
        "Which of the init_r ranks of each target were kept, by its name and .lora_E; written after "
        "training.",
    )
    init_lora_weights: bool = option(
        True, "True: P and Q normal with deviation 0.02, the diagonal zero; False: all normal."
    )
    r: int = option(8, "Not used here; written for other libraries.")

    peft_type: ClassVar[str] = "ADALORA"
    elsewhere: ClassVar[Mapping[str, Any]] = {"qalora_group_size": 16, "megatron_core": "megatron.core"}

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        for name, least in (("init_r", 1), ("target_r", 1), ("deltaT", 1), ("tinit", 0), ("tfinal", 0)):
            value = getattr(self, name)
            self.require(
                name, isinstance(value, int) and value >= least, f"a whole number of at least {least}"
            )
        for name in ("beta1", "beta2"):
            self.require(name, 0 < getattr(self, name) < 1, "above 0 and below 1")
        self.require("orth_reg_weight", self.orth_reg_weight >= 0, "at least 0")
        self.require("target_r", self.target_r <= self.init_r, f"at most init_r, which is {self.init_r}")
        self.require("init_lora_weights", isinstance(self.init_lora_weights, bool), "True or False")
        if self.total_step is not None:
            self.check_schedule(self.total_step)

    def check_schedule(self, total_step: int) -> None:
        """Refuse a training that is too short for the schedule.

        Args:
            total_step: how many steps the optimizer will take.

        Raises:
            ConfigError: nothing is left between ``tinit`` and ``tfinal``.
        """
        if not isinstance(total_step, int) or self.tinit >= total_step - self.tfinal:
            raise ConfigError(
                f"AdaLoraConfig: tinit={self.tinit} and tfinal={self.tfinal} leave no step of "
                f"total_step={total_step} in which the ranks could fall: make tinit + tfinal less than "
                "total_step"
            )

    def kept(self, path: str) -> list[bool]:
        """Which of the ranks the target at ``path`` has, ``init_r`` of them: all before training, and what a
        file says after it.
        """
        every_rank = [True] * self.init_r
        if self.rank_pattern is None:
            return every_rank
        return self.rank_pattern.get(join(path, "lora_E"), every_rank)


class AdaLoraPart(ModulePart):
    """AdaLoRA beside one layer.

    Attributes:
        lora_A: Q, ``(r, in)``, in a convolution flattened.
        lora_E: the diagonal of Λ, ``(r, 1)``.
        lora_B: P, ``(out, r)``.
        scaling: the factor of the update, ``lora_alpha / init_r``.
        allocator: what allots the ranks of this adapter; set when the adapter has got its place.
    """

    def __init__(self, config: AdaLoraConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.path = place.path
        self.product = product(place.layer, place.host)
        rank = sum(config.kept(place.path))
        rows, columns = place.layer.matrix
        # The factor, with its small number, is that of `peft`, whose files say nothing of it.
        alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
        self.scaling = alpha / (config.init_r + 1e-5)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else None
        # A diagonal of zeros leaves the output as it is, and gets a gradient all the same.
        diagonal = torch.zeros if config.init_lora_weights else torch.randn
        self.lora_A = nn.Parameter(torch.randn(rank, columns) * 0.02)
        self.lora_E = nn.Parameter(diagonal(rank, 1))
        self.lora_B = nn.Parameter(torch.randn(rows, rank) * 0.02)
        self.allocator: RankAllocator | None = None

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Get what allots the ranks: one for the whole adapter, which the first part makes.

        Args:
            parts: those of the adapter, by path.
        """
        adapter = {}
        for path, part in parts.items():
            if isinstance(part, AdaLoraPart):
                adapter[path] = part
        first = next(iter(adapter.values()))
        if first is self:
            self.allocator = RankAllocator(self.config, adapter)
            if self.allocator.waits_for_trainer and "transformers" in sys.modules:
                _listen_to_trainers()
        else:
            self.allocator = first.allocator

    def factors(self) -> tuple[Tensor, Tensor]:
        """``Λ Q`` and ``P``, in the shapes that the layer's product has them: beside a linear ``(r, in)`` and
        ``(out, r)``.
        """
        a, b = self.product.shapes(self.lora_E.shape[0])
        return (self.lora_A * self.lora_E).view(a), self.lora_B.view(b)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the update to the base output.

        Args:
            x: input of the target, ``(*batch, in_features)``.
            y: output of the frozen target, ``(*batch, out_features)``.

        Returns:
            ``y + scaling * P Λ Q x``  (Zhang et al. 2023, eq. 3).
        """
        if self.lora_E.numel() == 0:
            return y
        return self.product.add(y, self._input(x, y), *self.factors(), self.scaling)

    def forward_(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """`forward`, written into ``y``.

        Args:
            x: input of the target, ``(*batch, in_features)``.
            y: its output, ``(*batch, out_features)``, which nobody else holds.
            base: not needed.
        """
        if self.lora_E.numel() == 0:
            return y
        return self.product.add_(y, self._input(x, y), *self.factors(), self.scaling)

    def _input(self, x: Tensor, y: Tensor) -> Tensor:
        """The input of the update: on the device of the output, and with dropout."""
        x = x.to(y.device)
        if self.dropout is None:
            return x
        dropped: Tensor = self.dropout(x)
        return dropped

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The three tensors, as `peft` calls them; once the ranks are final, only those of the ranks that
        were kept.
        """
        kept = None
        if self.allocator is not None:
            kept = self.allocator.final.get(self.path)
        if kept is None:
            return {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_E": self.lora_E}
        return {"lora_A": self.lora_A[kept], "lora_B": self.lora_B[:, kept], "lora_E": self.lora_E[kept]}

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``W + scaling * P Λ Q``, in the layout in which ``tensors`` has the weight; a bias stays as it
        is.
        """
        return {"weight": self.product.plus(tensors["weight"], *self.factors(), self.scaling)}


class RankAllocator:
    """Allots the ranks of one adapter while it is trained, at each step of the optimizer that trains it.

    Before a step it adds the gradient of the orthogonality penalty, so that no loss has to contain it; after
    the step it updates the importance of each rank from the step's gradients, and takes ranks away as the
    budget falls (algorithm 1).

    Attributes:
        config: the adapter's config.
        parts: the adapter's parts, by path.
        total_step: optimizer steps of the whole training, or None as long as nobody has told.
        step: optimizer steps so far.
        final: path -> which ranks were kept, ``(init_r,)`` of bool; empty until the ranks are final.
    """

    def __init__(self, config: AdaLoraConfig, parts: Mapping[str, AdaLoraPart]) -> None:
        self.config = config
        self.parts: dict[str, AdaLoraPart] = dict(parts)
        self.total_step: int | None = config.total_step
        self.step: int = 0
        self.final: dict[str, Tensor] = {}
        self._by_hand = False
        self._sensitivity: dict[tuple[str, str], Tensor] = {}
        self._uncertainty: dict[tuple[str, str], Tensor] = {}
        _live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take part in the copy of a model, or in an unpickled one, as in the first."""
        self.__dict__.update(state)
        _live.add(self)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each target now: how many of its ranks are not zero; before the first step all of
        them.
        """
        has_begun = self.step > 0 or bool(self.final)
        ranks = {}
        for path, part in self.parts.items():
            ranks[path] = int(part.lora_E.count_nonzero()) if has_begun else len(part.lora_E)
        return ranks

    @property
    def allots(self) -> bool:
        """Whether ranks are still to be taken away; not for an adapter that was loaded with the ranks it had
        kept.
        """
        return self.config.rank_pattern is None

    @property
    def waits_for_trainer(self) -> bool:
        """Whether somebody has to tell it how long the training is: its config does not say it, and there are
        ranks to take away.
        """
        return self.allots and self.total_step is None

    def belongs_to(self, parameters: set[int]) -> bool:
        """Whether the adapter is among some parameters.

        Args:
            parameters: their ids, as of those that an optimizer holds.
        """
        return any(id(part.lora_E) in parameters for part in self.parts.values())

    def set_total_step(self, total_step: int) -> None:
        """Say how long the training is, where the config does not.

        Args:
            total_step: how many steps the optimizer will take.

        Raises:
            ConfigError: it is too short for the schedule.
        """
        self.config.check_schedule(total_step)
        self.total_step = total_step

    def drive_by_hand(self) -> None:
        """Leave the budget to calls of `update_and_allocate`, as `peft` has it, in place of the optimizer's
        own steps.

        Raises:
            StateError: the optimizer has driven it already.
        """
        if self.step and not self._by_hand:
            raise StateError(
                f"the budget has followed {self.step} steps of the optimizer already; say it before training"
            )
        self._by_hand = True

    def update_and_allocate(self, step: int) -> None:
        """One step of the budget by hand: after ``optimizer.step()`` and before the gradients go, with steps
        from 1.

        Raises:
            StateError: the optimizer's steps drive it; `drive_by_hand` was not called.
            ConfigError: ``total_step`` is not known.
        """
        if not self._by_hand:
            raise StateError(
                "the budget follows the optimizer's own steps by itself, so this call would count each step "
                "twice: remove it, or call rank_allocator(model).drive_by_hand() before training"
            )
        self._require_total_step()
        self._advance(step)

    def budget(self, step: int) -> int:
        """How many ranks all targets have together after some steps: the cubic schedule of eq. 12.

        Args:
            step: how many steps of the optimizer there were.

        Raises:
            ConfigError: ``total_step`` is not known.
        """
        total, config = self._require_total_step(), self.config
        first, last = config.init_r * len(self.parts), config.target_r * len(self.parts)
        if step <= config.tinit:
            return first
        if step >= total - config.tfinal:
            return last
        # The share of the steps in between that is still to come.
        left = 1 - (step - config.tinit) / (total - config.tfinal - config.tinit)
        return int((first - last) * left**3 + last)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of the orthogonality penalty (eq. 4), so that no loss has to contain it.

        Args:
            optimizer: the one that is about to take a step.

        Raises:
            ConfigError: ``total_step`` is not known; nothing has been trained yet.
        """
        if self.allots:
            self._require_total_step()
        # The mean over all targets, of which each has two matrices.
        weight = self.config.orth_reg_weight / (2 * len(self.parts))
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it itself
        if scale is not None:
            weight = weight * scale
        with torch.no_grad():
            for part in self.parts.values():
                _add_to_gradient(part.lora_A, weight, _orthogonality_slope)
                _add_to_gradient(part.lora_B, weight, lambda matrix: _orthogonality_slope(matrix.T).T)

    def after_step(self) -> None:
        """Count a step of the optimizer, and let the budget follow it, unless that is done by hand or the
        ranks are given.
        """
        if self.allots and not self._by_hand:
            self._advance(self.step + 1)

    def state(self) -> dict[str, Tensor]:
        """What training has to go on from, by name: the step, the importance so far, and the ranks that were
        kept.
        """
        tensors = {"steps": torch.tensor([self.step, self.total_step or 0])}
        for (path, name), value in self._sensitivity.items():
            tensors[f"sensitivity.{path}.{name}"] = value
        for (path, name), value in self._uncertainty.items():
            tensors[f"uncertainty.{path}.{name}"] = value
        for path, mask in self.final.items():
            tensors[f"final.{path}"] = mask
        return tensors

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`.

        Args:
            tensors: as `state` has given them; they come to the device of the adapter.
        """
        step, total_step = tensors["steps"].tolist()
        self.step = step
        self.total_step = total_step or None
        self.final, self._sensitivity, self._uncertainty = {}, {}, {}
        device = next(iter(self.parts.values())).lora_E.device
        for key, tensor in tensors.items():
            kind, _, path = key.partition(".")
            owner, _, name = path.rpartition(".")
            if kind == "final":
                self.final[path] = tensor.to(device)
            elif kind == "sensitivity":
                self._sensitivity[owner, name] = tensor.to(device)
            elif kind == "uncertainty":
                self._uncertainty[owner, name] = tensor.to(device)

    def _require_total_step(self) -> int:
        """How long the training is.

        Raises:
            ConfigError: nobody has said it.
        """
        if self.total_step is None:
            raise ConfigError(
                "AdaLoRA has to know how long the training is: give total_step in AdaLoraConfig, or add the "
                "adapter before making the Trainer of transformers, which then tells it"
            )
        return self.total_step

    @torch.no_grad()
    def _advance(self, step: int) -> None:
        """What follows a step of the optimizer (algorithm 1)."""
        self.step = step
        last = self._require_total_step() - self.config.tfinal
        if step < last:
            self._update_importance()
            # Between two of these steps every rank is trained, also one that was taken away: it may come
            # back.
            if step > self.config.tinit and step % self.config.deltaT == 0:
                self._keep(self._most_important(self.budget(step)))
        elif step == last or not self.final:
            # The last choice stands; what it was made from is of no use any more.
            self.final = self._most_important(self.budget(step))
            self._keep(self.final)
            self._sensitivity, self._uncertainty = {}, {}
        else:
            self._keep(self.final)

    def _update_importance(self) -> None:
        """Smooth the sensitivity ``|w dL/dw|`` and its uncertainty (eq. 8 and 9)."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for path, part in self.parts.items():
            for name, parameter in part.named_parameters():
                if parameter.grad is None:
                    continue
                key = (path, name)
                sensitivity = (parameter * parameter.grad).abs()
                smooth = self._sensitivity.get(key, torch.zeros_like(sensitivity))
                smooth = beta1 * smooth + (1 - beta1) * sensitivity
                self._sensitivity[key] = smooth
                doubt = self._uncertainty.get(key, torch.zeros_like(sensitivity))
                self._uncertainty[key] = beta2 * doubt + (1 - beta2) * (sensitivity - smooth).abs()

    def _importance(self, path: str) -> Tensor:
        """The importance of each rank of a target, ``(r,)``: of its singular value, and the means of its
        vectors' (eq. 7).
        """
        part = self.parts[path]
        if (path, "lora_E") not in self._sensitivity:
            return torch.zeros(len(part.lora_E), device=part.lora_E.device)
        of_vectors, of_values, of_outputs = (
            self._sensitivity[path, name] * self._uncertainty[path, name]
            for name in ("lora_A", "lora_E", "lora_B")
        )
        return of_values[:, 0] + of_vectors.mean(1) + of_outputs.mean(0)

    def _most_important(self, budget: int) -> dict[str, Tensor]:
        """Which ranks are above the threshold that leaves ``budget`` of all."""
        # The budget is one for the whole model: targets compete for it.
        importance = {path: self._importance(path) for path in self.parts}
        everything = torch.cat([score.cpu() for score in importance.values()])
        drop = len(everything) - budget
        if drop <= 0:
            return {path: torch.ones_like(score, dtype=torch.bool) for path, score in importance.items()}
        threshold = everything.kthvalue(drop).values.item()
        return {path: score > threshold for path, score in importance.items()}

    def _keep(self, kept: Mapping[str, Tensor]) -> None:
        """Let the values of all other ranks be zero."""
        for path, mask in kept.items():
            values = self.parts[path].lora_E
            values.masked_fill_(~mask[:, None].to(values.device), 0.0)


def _add_to_gradient(parameter: Tensor, weight: float | Tensor, slope: Callable[[Tensor], Tensor]) -> None:
    """Add the gradient of a penalty to that of a parameter, where it has one.

    Args:
        parameter: the parameter, which may have no elements.
        weight: the penalty's.
        slope: gives the penalty's gradient at the parameter.
    """
    if parameter.grad is not None and parameter.numel() > 0:
        parameter.grad.add_(weight * slope(parameter).to(parameter.grad.dtype))


def _orthogonality_slope(matrix: Tensor) -> Tensor:
    """The gradient of ``|M M' - I|``, how far the rows of a matrix are from orthonormal (eq. 4)."""
    identity = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    distance = matrix @ matrix.T - identity
    slope: Tensor = 2 * (distance @ matrix) / distance.norm().clamp_min(torch.finfo(distance.dtype).tiny)
    return slope


# Every allocator of a model that is in use, for the hooks of all optimizers.
_live: WeakSet[RankAllocator] = WeakSet()


def _held_by(optimizer: torch.optim.Optimizer) -> list[RankAllocator]:
    """The allocators of the adapters that this step trains; none where a loss scaler lets it do nothing."""
    overflow = getattr(optimizer, "found_inf", None)
    if not _live or (overflow is not None and bool(overflow)):
        return []
    parameters: set[int] = set()
    for group in optimizer.param_groups:
        parameters.update(map(id, group["params"]))
    return [allocator for allocator in _live if allocator.belongs_to(parameters)]


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """PyTorch calls this before every step of every optimizer."""
    for allocator in _held_by(optimizer):
        allocator.before_step(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """PyTorch calls this behind every step of every optimizer."""
    for allocator in _held_by(optimizer):
        allocator.after_step()


# For all optimizers, those of a Trainer or an accelerator too, which nobody would have to tell.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def rank_allocator(model: nn.Module, name: str = "default") -> RankAllocator:
    """What allots the ranks of the AdaLoRA adapter ``name`` of ``model``.

    Raises:
        AdapterNameError: the model has no AdaLoRA adapter of that name.
    """
    for _, site in sites_in(model):
        for part in site.parts(name):
            if isinstance(part, AdaLoraPart) and part.allocator is not None:
                return part.allocator
    raise AdapterNameError(f"no AdaLoRA adapter is called {name!r}")


def _listen_to_trainers() -> None:
    """Let every Trainer made from now on say how many steps it will take."""
    try:
        from transformers.trainer import DEFAULT_CALLBACKS  # noqa: PLC0415 (an optional backend)
        from transformers.trainer_callback import TrainerCallback  # noqa: PLC0415
    except ImportError:
        return

    class TellTotalStep(TrainerCallback):  # type: ignore[misc]
        """Tells AdaLoRA adapters without ``total_step`` how long the training is, before it begins."""

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any
        ) -> None:
            _tell_total_step(model, state.max_steps)

    if not any(getattr(known, "__name__", "") == TellTotalStep.__name__ for known in DEFAULT_CALLBACKS):
        DEFAULT_CALLBACKS.append(TellTotalStep)


def _tell_total_step(model: nn.Module, total_step: int) -> None:
    """Tell the adapters that a Trainer trains how many steps it will take, where they do not know.

    Args:
        model: what is trained, in whatever wrappers.
        total_step: how many steps.
    """
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for allocator in _live:
        if allocator.waits_for_trainer and allocator.belongs_to(trained):
            allocator.set_total_step(total_step)


class AdaLoraFiles(MethodFiles[AdaLoraConfig]):
    """The files of AdaLoRA, which hold what training has decided."""

    has_training_state: ClassVar[bool] = True

    def config_values(
        self, config: AdaLoraConfig, values: Mapping[str, Any], parts: Parts, layers: Mapping[str, Layer]
    ) -> Mapping[str, Any]:
        """The ranks that were kept, how long the training was, and how weights are laid out; the arguments
        are those of `MethodFiles`.
        """
        changed: dict[str, Any] = {"fan_in_fan_out": is_transposed(layers)}
        allocator = _allocator(parts)
        if allocator is None:
            return changed
        changed["total_step"] = allocator.total_step
        if allocator.final:
            pattern = {}
            for path, mask in allocator.final.items():
                pattern[join(path, "lora_E")] = mask.tolist()
            changed["rank_pattern"] = pattern
        return changed

    def training_state(self, parts: Parts) -> Mapping[str, Tensor]:
        """What the allocator has to go on from: `RankAllocator.state`.

        Args:
            parts: the adapter's, which all know the same allocator.
        """
        allocator = _allocator(parts)
        assert allocator is not None
        return allocator.state()

    def resume(self, parts: Parts, tensors: Mapping[str, Tensor]) -> None:
        """Let the allocator go on from there: `RankAllocator.resume`.

        Args:
            parts: the adapter's, which are in their places.
            tensors: as `training_state` has given them.
        """
        allocator = _allocator(parts)
        assert allocator is not None
        allocator.resume(tensors)


def _allocator(parts: Parts) -> RankAllocator | None:
    """What allots the ranks of an adapter; None before its parts are in their places."""
    for part in parts.values():
        return cast("AdaLoraPart", part).allocator
    return None


def combined(
    sources: Sequence[Source[AdaLoraConfig]], merging: TensorMerging
) -> tuple[AdaLoraConfig, dict[str, Tensor]]:
    """One AdaLoRA adapter made from several, their ranks side by side: the exact weighted sum of the
    updates.

    Args:
        sources: the adapters.
        merging: the way, of which there is one.
    """
    groups: dict[str, list[tuple[AdaLoraPart, float]]] = {}
    for source in sources:
        for path, part in source.parts.items():
            groups.setdefault(path, []).append((cast("AdaLoraPart", part), source.weight))
    # A target of fewer ranks than the others keeps the first ones of a pattern of that many.
    ranks = {path: sum(len(part.lora_E) for part, _ in group) for path, group in groups.items()}
    most = max(ranks.values())
    first = sources[0].config
    config = dataclasses.replace(
        first,
        init_r=most,
        target_r=min(first.target_r, most),
        lora_alpha=most,
        rank_pattern={
            join(path, "lora_E"): [True] * rank + [False] * (most - rank) for path, rank in ranks.items()
        },
    )
    # Each update comes with its weight and its own factor, and leaves with that of the new adapter.
    scaling = most / (most + 1e-5)
    tensors = {}
    for path, group in groups.items():
        values = [weight * part.scaling / scaling * part.lora_E for part, weight in group]
        tensors[join(path, "lora_A")] = torch.cat([part.lora_A for part, _ in group])
        tensors[join(path, "lora_B")] = torch.cat([part.lora_B for part, _ in group], dim=1)
        tensors[join(path, "lora_E")] = torch.cat(values)
    return config, tensors


@method(
    "adalora",
    title="AdaLoRA",
    config=AdaLoraConfig,
    layers={"linear", "transposed-linear", "convolution"},
    default_roles=({QUERY, VALUE, KEY_VALUE, FUSED},),
    inert=True,
    mergeable=True,
    source="Zhang et al. 2023, https://arxiv.org/abs/2303.10512",
    combinations=("cat",),
    combine=combined,
    example=partial(AdaLoraConfig, target_modules="all-linear", total_step=100),
    files=AdaLoraFiles(),
)
def adalora_part(config: AdaLoraConfig, place: Place) -> Part:
    """The part for one layer.

    Args:
        config: the adapter's; where it was read from a file, it knows which ranks are left.
        place: beside a linear or a convolution.
    """
    return AdaLoraPart(config, place)
