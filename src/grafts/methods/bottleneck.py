"""Bottleneck adapters: small feed-forward networks on what is added to the residual stream.

Sequential after the feed-forward (Pfeiffer et al. 2020, arXiv:2005.00247), after attention as well (Houlsby
et al. 2019, arXiv:1902.00751), parallel (He et al. 2021, arXiv:2110.04366), AdapterPlus (Steitz & Roth 2024,
arXiv:2406.06820), and Compacter with hypercomplex linears (Karimi Mahabadi et al. 2021, arXiv:2106.04647).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, config, option
from grafts.errors import ConfigError, MergeError
from grafts.methods._registry import Place, method, stream_place
from grafts.methods.invertible import BLOCKS, CouplingPart, coupling_places
from grafts.methods.shared.activations import activation, is_activation
from grafts.methods.shared.kronecker import Hypercomplex, HypercomplexLinear
from grafts.methods.shared.seeding import seeded
from grafts.methods.shared.token_positions import WholeInput, observer_places
from grafts.methods.shared.weighted_average import averaged
from grafts.sites.module import ModulePart
from grafts.sites.site import Part, Reference
from grafts.structure.residual_stream import (
    ADDED,
    BEGIN,
    END,
    NORMED,
    RESIDUAL,
    Sublayer,
    require_width,
)
from grafts.structure.view import ModelView

_INITS = ("bert", "mam_adapter", "houlsby")
_HYPERCOMPLEX_INITS = ("glorot-uniform", "glorot-normal", "normal", "phm")


@config
class BnConfig(AdapterConfig):
    """What a bottleneck adapter is: ``up(act(down(x)))`` on what a step of a layer adds to the residual
    stream.

    The fields and defaults are those of AdapterHub's `BnConfig`; the presets of `grafts.config_from` name the
    usual ones.

    >>> BnConfig(reduction_factor={"0": 8, "default": 16}).reduction(0), BnConfig().reduction(5)
    (8, 16)
    """

    mh_adapter: bool = option(False, "After self-attention.")
    output_adapter: bool = option(True, "After the feed-forward.")
    cross_adapter: bool = option(False, "After cross-attention.")
    reduction_factor: float | dict[str, float] = option(
        16, "Hidden size divided by the bottleneck's; or layer -> factor, with 'default' for the others."
    )
    non_linearity: str | None = option(
        "relu", "The activation, by its name in `transformers`; 'linear' or none for none."
    )
    original_ln_before: bool = option(
        False, "The input is the sum with the residual stream, through the layer's own norm."
    )
    original_ln_after: bool = option(
        True, "The layer adds the residual stream, and norms, after it; False leaves both out."
    )
    ln_before: bool = option(False, "A norm of its own before it.")
    ln_after: bool = option(False, "A norm of its own after it.")
    init_weights: str = option("bert", f"How it starts: {', '.join(_INITS)}.")
    init_weights_seed: int | None = option(
        None, "Start from this seed; PyTorch's own random numbers are left alone."
    )
    is_parallel: bool = option(False, "Beside the step, from the residual stream, and not after it.")
    scaling: float | str = option(
        1.0, "A factor, 'learned', or 'channel' for a learned one for each channel."
    )
    use_gating: bool = option(False, "A learned gate, averaged over the tokens.")
    residual_before_ln: bool | str = option(
        True,
        "Add its input as it was before the layer's norm; 'post_add': with the residual stream; False: after "
        "the norm.",
    )
    adapter_residual_before_ln: bool = option(False, "Add that before its own norm after it.")
    inv_adapter: str | None = option(
        None, f"An invertible adapter after the embeddings as well: {' or '.join(BLOCKS)}."
    )
    inv_adapter_reduction_factor: float | None = option(None, "Its reduction factor.")
    leave_out: tuple[int, ...] = option((), "Layers that get none, counted over the whole model.")
    dropout: float = option(0.0, "Dropout of its output.")
    phm_layer: bool = option(False, "Hypercomplex linears (Compacter).")
    phm_dim: int = option(4, "How many Kronecker products they sum.")
    factorized_phm_W: bool = option(True, "Their W_i are products of two thin matrices.")  # noqa: N815 - the file's name
    shared_W_phm: bool = option(False, "All layers share W.")  # noqa: N815 - the file's name
    shared_phm_rule: bool = option(True, "All layers share C.")
    factorized_phm_rule: bool = option(False, "Their C_i are products of a column and a row.")
    phm_c_init: str = option("normal", "How C starts: normal or uniform.")
    phm_init_range: float = option(0.0001, "The deviation of C at the start.")
    learn_phm: bool = option(True, "Train C.")
    hypercomplex_nonlinearity: str = option(
        "glorot-uniform", f"How W starts: {', '.join(_HYPERCOMPLEX_INITS)}."
    )
    phm_rank: int = option(1, "The rank of W_i.")
    phm_bias: bool = option(True, "A bias.")
    stochastic_depth: float = option(0.0, "The chance that a row goes without it, while training.")

    peft_type: ClassVar[str] = "BOTTLENECK"

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        factor = self.reduction_factor
        if isinstance(factor, dict):
            object.__setattr__(self, "reduction_factor", {str(name): value for name, value in factor.items()})
        super().__post_init__()
        if isinstance(factor, dict):
            factors = list(factor.values())
        else:
            factors = [factor]
        are_positive = all(isinstance(value, (int, float)) and value > 0 for value in factors)
        self.require(
            "reduction_factor", bool(factors) and are_positive, "a number above 0, or layer -> number"
        )
        self.require(
            "non_linearity", is_activation(self.non_linearity), "an activation of transformers, or None"
        )
        is_number = isinstance(self.scaling, (int, float)) and not isinstance(self.scaling, bool)
        is_learned = self.scaling in ("learned", "channel")
        self.require("scaling", is_number or is_learned, "a number, 'learned' or 'channel'")
        self._require_one_of("init_weights", _INITS)
        self._require_one_of("phm_c_init", ("normal", "uniform"), "normal or uniform")
        self._require_one_of("hypercomplex_nonlinearity", _HYPERCOMPLEX_INITS)
        self._require_one_of("residual_before_ln", (True, False, "post_add"), "True, False or 'post_add'")
        self._require_one_of("inv_adapter", (None, *BLOCKS), f"None or one of {', '.join(BLOCKS)}")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self.require("stochastic_depth", 0 <= self.stochastic_depth < 1, "at least 0 and below 1")
        stands_somewhere = self.mh_adapter or self.output_adapter or self.cross_adapter
        self.require("output_adapter", stands_somewhere, "True where neither mh_adapter nor cross_adapter is")

    def _require_one_of(self, field: str, values: tuple[object, ...], may_be: str | None = None) -> None:
        """Refuse a value that is none of several."""
        self.require(field, getattr(self, field) in values, may_be or f"one of {', '.join(map(str, values))}")

    def reduction(self, layer: int) -> float:
        """The reduction factor of a layer.

        Raises:
            ConfigError: the mapping has neither the layer nor a default.
        """
        if not isinstance(self.reduction_factor, dict):
            return self.reduction_factor
        factor = self.reduction_factor.get(str(layer), self.reduction_factor.get("default"))
        if factor is None:
            raise ConfigError(
                f"reduction_factor has neither {str(layer)!r} nor 'default': {self.reduction_factor}"
            )
        return factor

    def takes(self, sublayer: Sublayer) -> bool:
        """Whether a step of a layer gets an adapter."""
        wanted = {"self": self.mh_adapter, "cross": self.cross_adapter, "ffn": self.output_adapter}
        return wanted[sublayer.kind] and sublayer.layer not in self.leave_out

    @property
    def needs_residual(self) -> bool:
        """Whether it has to know what the step's output is added to."""
        return self.is_parallel or self.original_ln_before or not self.original_ln_after

    def hypercomplex(self) -> Hypercomplex:
        """How its linears are made, where they are hypercomplex."""
        return Hypercomplex(
            self.phm_dim,
            self.phm_rank,
            self.factorized_phm_W,
            self.factorized_phm_rule,
            self.phm_init_range,
            self.learn_phm,
            self.phm_c_init,
            self.hypercomplex_nonlinearity,
            self.phm_bias,
        )


class BottleneckPart(ModulePart):
    """One bottleneck, on what one step of a layer adds to the residual stream.

    Attributes:
        adapter_down: a norm if wanted, and the linear from the stream's size to the bottleneck's.
        adapter_up: the linear back.
        scaling: a number, or a learned one, ``(1,)``, or one for each channel, ``(hidden,)``.
        adapter_norm_after: a norm behind it, or None.
        gate: makes the gate, ``(1, hidden)``, or None.
        shared: what all layers share of hypercomplex linears; at the first part only.
        reads_stream: the stream that its step's output is added to is the input of the module beside which it
            stands.
    """

    def __init__(self, config: BnConfig, place: Place) -> None:
        super().__init__()
        assert place.sublayer is not None
        self.config = config
        self.sublayer = place.sublayer
        size = place.layer.out_features
        inner = max(int(size // config.reduction(place.sublayer.layer)), 1)
        self.width = size, inner
        self.reads_stream = place.sublayer.before == place.path
        self.shared = _shared(config, size, inner) if _is_first(place) else None
        norms: list[nn.Module]
        if config.ln_before:
            norms = [nn.LayerNorm(size)]
        else:
            norms = []
        self.adapter_down = nn.Sequential(*norms, _linear(config, size, inner))
        self.adapter_up = _linear(config, inner, size)
        self.act = activation(config.non_linearity)
        self.scaling: nn.Parameter | float
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if config.scaling == "learned" else size))
        else:
            self.scaling = float(config.scaling)
        self.adapter_norm_after = nn.LayerNorm(size) if config.ln_after else None
        self.gate = nn.Linear(size, 1) if config.use_gating else None
        # The layer's norm of the sum, where the bottleneck has to do with it.
        self._norm: Reference[NormPart] | None = None
        # What the step's output will be added to, from when it is observed until it is used.
        self._residual: Tensor | None = None
        if not next(self.parameters()).is_meta:
            self._start()

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Find the layer's norm, what observes the stream for this part, and what all layers share."""
        norm = parts.get(self.sublayer.norm or "")
        if isinstance(norm, NormPart):
            self._norm = Reference(norm)
        before = parts.get(self.sublayer.before or "")
        if isinstance(before, ResidualPart):
            before.add_reader(self)
        for part in parts.values():
            if isinstance(part, BottleneckPart):
                if part.shared is not None:
                    self._share(part.shared)
                return

    def _share(self, tensors: nn.ParameterDict) -> None:
        """Use what all layers share of hypercomplex linears."""
        for linear, name in ((self.adapter_down[-1], "W_down"), (self.adapter_up, "W_up")):
            assert isinstance(linear, HypercomplexLinear)
            linear.share(tensors, name)

    def _start(self) -> None:
        """Start as BERT does, or with zeros behind (He et al. 2021), or near zero (Houlsby et al. 2019,
        section 3.2).
        """
        way = self.config.init_weights
        down, up, gate = self.adapter_down[-1], self.adapter_up, self.gate
        for linear in (down, up, gate):
            if not isinstance(linear, nn.Linear):
                continue
            nn.init.zeros_(linear.bias)
            if way == "houlsby" and linear is not gate:
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            elif way == "mam_adapter" and linear is down:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            elif way == "mam_adapter" and linear is up:
                nn.init.zeros_(linear.weight)
            else:
                nn.init.normal_(linear.weight, std=0.02)
        if way == "mam_adapter" and isinstance(up, HypercomplexLinear):
            with torch.no_grad():
                for tensor in up.weight.values():
                    tensor.zero_()

    def observe(self, residual: Tensor) -> None:
        """What the step's output will be added to, ``(*batch, hidden)``."""
        self._residual = residual

    def forward(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """Change what a step adds to the residual stream.

        Args:
            x: input of the module that gives it.
            y: what it gives, h, ``(*batch, hidden)``.
            base: not needed.

        Returns:
            ``h'``, ``(*batch, hidden)``, so that the layer computes ``norm(h' + r)``, or ``h' + r``, from the
            stream r.
        """
        config = self.config
        require_width(y, self.width[0], self.sublayer.out)
        residual = x if self.reads_stream else self._residual
        self._residual = None
        if not config.needs_residual:
            return self._bottleneck(y, y)
        assert residual is not None
        residual = residual.to(y.device)
        if config.is_parallel:
            output = y + self._bottleneck(residual, None)
        elif config.original_ln_before:
            total = y + residual
            if self._norm is None:
                normed = total
            else:
                normed = self._norm.module.normed(total)
            if config.residual_before_ln == "post_add":
                kept = total
            elif config.residual_before_ln:
                kept = y
            else:
                kept = normed
            is_plain_sum = kept is total and not config.ln_after and self._norm is None
            if is_plain_sum and not config.original_ln_after:
                # (y + r + u) - r without rounding twice
                return y + self._bottleneck(normed, None)
            output = self._bottleneck(normed, kept)
        else:
            output = self._bottleneck(y, y)
        if config.original_ln_after:
            return output
        if self._norm is not None:
            self._norm.module.replacement = output
        return output - residual

    def _bottleneck(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """``norm(scaling * up(act(down(norm(x)))) + kept)``, the norms where there are some."""
        hidden = x
        for module in self.adapter_down:
            hidden = _applied(module, hidden)
        up = _applied(self.adapter_up, self.act(hidden))
        if self.training and self.config.stochastic_depth:
            up = _rows_dropped(up, self.config.stochastic_depth)
        if isinstance(self.scaling, Tensor):
            up = up * self.scaling.to(up.dtype)
        elif self.scaling != 1.0:
            up = up * self.scaling
        up = nn.functional.dropout(up, self.config.dropout, self.training)
        if self.gate is not None:
            up = up * torch.sigmoid(_applied(self.gate, x)).mean(1, keepdim=True)
        if kept is not None and self.config.adapter_residual_before_ln:
            up = up + kept
        if self.adapter_norm_after is not None:
            up = _applied(self.adapter_norm_after, up)
        if kept is not None and not self.config.adapter_residual_before_ln:
            up = up + kept
        return up.to(x.dtype)

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``(I + s U D) W`` where no activation and no norm is in between; beside a single linear
        ``W + s U D``.

        Raises:
            MergeError: it is not linear in what its module gives, or that has no bias to take its own.
        """
        config = self.config
        # Parallel to one linear it adds to what that computes; behind one it acts on what that gives.
        is_beside = self.reads_stream and config.is_parallel
        is_linear = is_linear_in_its_input(config) and (is_beside or not config.is_parallel)
        if not is_linear or "weight" not in tensors or not self._fits(tensors["weight"]):
            raise MergeError(
                "a bottleneck that does not act linearly on the output of one linear has no exact merge"
            )
        weight = tensors["weight"]
        down, down_bias = _affine(self.adapter_down[-1], weight.dtype)
        up, up_bias = _affine(self.adapter_up, weight.dtype)
        scale: Tensor | float = self.scaling
        if isinstance(scale, Tensor):
            scale = scale.to(weight.dtype)[:, None]
        update = scale * (up @ down)
        offset = (scale * (up @ down_bias + up_bias)[:, None])[:, 0]
        result = {"weight": weight + (update if is_beside else update @ weight)}
        if "bias" in tensors:
            bias = tensors["bias"]
            result["bias"] = bias + (offset if is_beside else update @ bias + offset)
        elif bool(offset.any()):
            raise MergeError(
                "its module has no bias that the bottleneck's could be merged into: it has no exact merge"
            )
        return result

    def _fits(self, weight: Tensor) -> bool:
        """Whether a weight is that of a linear that gives states of the stream's size."""
        return weight.dim() == 2 and weight.shape[0] == self.width[0]


class ResidualPart(ModulePart):
    """Tells bottlenecks what their step's output will be added to, from the module that is given it."""

    when = "sees"

    def __init__(self) -> None:
        super().__init__()
        self._readers: list[Reference[BottleneckPart]] = []

    def add_reader(self, part: BottleneckPart) -> None:
        """Tell one more bottleneck."""
        self._readers.append(Reference(part))

    def forward(self, x: Tensor) -> None:
        """Pass on ``x``, ``(*batch, hidden)``."""
        for reader in self._readers:
            reader.module.observe(x)

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}


class NormPart(ModulePart):
    """The layer's norm of the sum, for bottlenecks that go through it first, or replace it.

    Attributes:
        replacement: what a bottleneck has put in place of the norm's next output, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self._host: Reference[nn.Module] | None = None
        self.replacement: Tensor | None = None

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Know the norm."""
        self._host = Reference(host)

    def normed(self, x: Tensor) -> Tensor:
        """The norm of ``x``, past all hooks of adapters."""
        assert self._host is not None
        result: Tensor = self._host.module.forward(x)
        return result

    def forward(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """The norm's output, or what is to stand in its place."""
        replacement, self.replacement = self.replacement, None
        if replacement is None:
            return y
        return replacement

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}


def _applied(module: nn.Module, x: Tensor) -> Tensor:
    """A linear or a norm in the format of its input."""
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, module.weight.to(x.dtype), module.bias.to(x.dtype))
    if isinstance(module, nn.LayerNorm):
        wide = nn.functional.layer_norm(
            x.to(module.weight.dtype), module.normalized_shape, module.weight, module.bias, module.eps
        )
        return wide.to(x.dtype)
    result: Tensor = module(x)
    return result


def _affine(linear: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix ``(out, in)`` and the bias of a linear."""
    if isinstance(linear, HypercomplexLinear):
        matrix = linear.matrix().T
        if linear.b is None:
            bias = matrix.new_zeros(matrix.shape[0])
        else:
            bias = linear.b
        return matrix.to(dtype), bias.to(dtype)
    assert isinstance(linear, nn.Linear)
    return linear.weight.to(dtype), linear.bias.to(dtype)


def _rows_dropped(x: Tensor, chance: float) -> Tensor:
    """Stochastic depth: whole rows zero, the others scaled up (Huang et al. 2016)."""
    keep = torch.empty(x.shape[0], *[1] * (x.dim() - 1), device=x.device).bernoulli_(1 - chance)
    return x * (keep / (1 - chance)).to(x.dtype)


def _linear(config: BnConfig, inputs: int, outputs: int) -> nn.Module:
    """One of the two linears."""
    if not config.phm_layer:
        return nn.Linear(inputs, outputs)
    has_rule, has_weight = not config.shared_phm_rule, not config.shared_W_phm
    return HypercomplexLinear(config.hypercomplex(), inputs, outputs, has_rule, has_weight)


def _is_first(place: Place) -> bool:
    """Whether a bottleneck is the first of its adapter, which keeps what all of them share."""
    for other in place.others:
        if other.role == ADDED:
            return other.path == place.path
    return True


def _shared(config: BnConfig, size: int, inner: int) -> nn.ParameterDict | None:
    """What all layers share of hypercomplex linears; None where that is nothing."""
    if not config.phm_layer:
        return None
    kind = config.hypercomplex()
    tensors = nn.ParameterDict()
    if config.shared_phm_rule:
        tensors.update(kind.rule_tensors(shared=True))
    if config.shared_W_phm:
        tensors.update(kind.weight_tensors(size, inner, "W_down"))
        tensors.update(kind.weight_tensors(inner, size, "W_up"))
    if len(tensors) > 0:
        return tensors
    return None


def is_linear_in_its_input(config: BnConfig) -> bool:
    """Whether it is linear in what its module gives, and so can be merged."""
    has_activation = config.non_linearity not in (None, "linear")
    goes_through_norm = config.original_ln_before or not config.original_ln_after
    has_norm = config.ln_before or config.ln_after
    has_more = config.use_gating or config.inv_adapter is not None
    return not (has_activation or goes_through_norm or has_norm or has_more)


def check(config: BnConfig, places: Sequence[Place]) -> None:
    """Refuse a model in which a step's residual stream is not known, where that is needed.

    Raises:
        ConfigError: naming the step.
    """
    if not config.needs_residual:
        return
    for place in places:
        if place.role != ADDED or place.sublayer is None or place.sublayer.before is not None:
            continue
        name = {"self": "self_attn", "cross": "cross_attn", "ffn": "ffn"}[place.sublayer.kind]
        raise ConfigError(
            f"{place.path!r}: the interface does not say what its output is added to: give "
            f"layer_pre_{name}, or a config without is_parallel, original_ln_before and "
            "original_ln_after=False"
        )


def places(config: BnConfig, view: ModelView, candidates: Sequence[Place]) -> list[Place]:
    """Every step that gets a bottleneck, what observes the stream before it, and the norm behind it."""
    stream = view.stream
    assert stream is not None
    stream.require_layers(config.leave_out, "leave_out")
    if isinstance(config.reduction_factor, dict):
        named = []
        for name in config.reduction_factor:
            if name != "default":
                named.append(name)
        stream.require_layers(named, "reduction_factor")
    uses_norm = config.original_ln_before or not config.original_ln_after
    chosen: dict[str, Place] = {}
    for sublayer in stream.sublayers():
        if not config.takes(sublayer):
            continue
        wanted = [(sublayer.out, ADDED)]
        if config.needs_residual and sublayer.before is not None and sublayer.before != sublayer.out:
            wanted.append((sublayer.before, RESIDUAL))
        if uses_norm and sublayer.norm is not None:
            wanted.append((sublayer.norm, NORMED))
        for path, role in wanted:
            place = stream_place(view, path, role, sublayer.width, sublayer, sublayer.layer)
            chosen.setdefault(path, place)
    result = list(chosen.values())
    if config.inv_adapter is not None:
        result += coupling_places(view, candidates)
    if config.use_gating:
        result += observer_places(view, candidates)
    return result


@method(
    "bottleneck",
    title="Bottleneck adapter",
    config=BnConfig,
    layers={"stream"},
    default_roles=(),
    inert=False,
    mergeable=True,
    merges=is_linear_in_its_input,
    source="Houlsby et al. 2019, https://arxiv.org/abs/1902.00751",
    combinations=("linear",),
    combine=averaged,
    example=partial(
        BnConfig, reduction_factor=4, non_linearity="gelu", original_ln_before=True, mh_adapter=True
    ),
    places=places,
    check=check,
)
def bottleneck_part(config: BnConfig, place: Place) -> Part:
    """The part for one place on the stream."""
    if place.role == RESIDUAL:
        return ResidualPart()
    if place.role == NORMED:
        return NormPart()
    if place.role in (BEGIN, END):
        factor = config.inv_adapter_reduction_factor or 2
        return CouplingPart(str(config.inv_adapter), factor, config.non_linearity, place)
    if place.role != ADDED:
        return WholeInput()
    assert place.sublayer is not None
    number = 3 * place.sublayer.layer + ("self", "cross", "ffn").index(place.sublayer.kind)
    with seeded(config.init_weights_seed, number):
        return BottleneckPart(config, place)
