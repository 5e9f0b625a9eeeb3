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
            # JSON has no numbers as keys, so layers are named by text everywhere.
            object.__setattr__(self, "reduction_factor", {str(name): value for name, value in factor.items()})
        super().__post_init__()
        self._require_reduction_factor()
        self._require_scaling()
        self.require(
            "non_linearity", is_activation(self.non_linearity), "an activation of transformers, or None"
        )
        self._require_one_of("init_weights", _INITS)
        self._require_one_of("phm_c_init", ("normal", "uniform"), "normal or uniform")
        self._require_one_of("hypercomplex_nonlinearity", _HYPERCOMPLEX_INITS)
        self._require_one_of("residual_before_ln", (True, False, "post_add"), "True, False or 'post_add'")
        self._require_one_of("inv_adapter", (None, *BLOCKS), f"None or one of {', '.join(BLOCKS)}")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self.require("stochastic_depth", 0 <= self.stochastic_depth < 1, "at least 0 and below 1")
        stands_somewhere = self.mh_adapter or self.output_adapter or self.cross_adapter
        self.require("output_adapter", stands_somewhere, "True where neither mh_adapter nor cross_adapter is")

    def _require_reduction_factor(self) -> None:
        """Refuse a factor, or one of several, that is no number above 0."""
        factors: list[object] = [self.reduction_factor]
        if isinstance(self.reduction_factor, dict):
            factors = list(self.reduction_factor.values())
        are_positive = all(isinstance(factor, (int, float)) and factor > 0 for factor in factors)
        self.require(
            "reduction_factor", len(factors) > 0 and are_positive, "a number above 0, or layer -> number"
        )

    def _require_scaling(self) -> None:
        """Refuse a scaling that is neither a number nor a learned one."""
        is_number = isinstance(self.scaling, (int, float)) and not isinstance(self.scaling, bool)
        is_learned = self.scaling in ("learned", "channel")
        self.require("scaling", is_number or is_learned, "a number, 'learned' or 'channel'")

    def _require_one_of(self, field: str, values: tuple[object, ...], may_be: str | None = None) -> None:
        """Refuse a value that is none of several."""
        self.require(field, getattr(self, field) in values, may_be or f"one of {', '.join(map(str, values))}")

    def reduction(self, layer: int) -> float:
        """The reduction factor of a layer: its own, or else the default.

        Args:
            layer: its number, counted over the whole model.

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
        """Whether a step of a layer gets an adapter.

        Args:
            sublayer: the step; its layer may be among those that are left out.
        """
        wanted = {"self": self.mh_adapter, "cross": self.cross_adapter, "ffn": self.output_adapter}
        return wanted[sublayer.kind] and sublayer.layer not in self.leave_out

    @property
    def needs_residual(self) -> bool:
        """Whether it has to know what the step's output is added to: where it reads that, goes through the
        layer's norm, or takes the sum out again.
        """
        return self.is_parallel or self.uses_norm

    @property
    def uses_norm(self) -> bool:
        """Whether it goes through the norm that the layer has behind the sum, or stands in its place."""
        return self.original_ln_before or not self.original_ln_after

    def hypercomplex(self) -> Hypercomplex:
        """How its linears are made, where they are hypercomplex (Compacter): the options of this config that
        say so, by their names there.
        """
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
        self.adapter_down = nn.Sequential()
        if config.ln_before:
            self.adapter_down.append(nn.LayerNorm(size))
        self.adapter_down.append(_linear(config, size, inner))
        self.adapter_up = _linear(config, inner, size)
        self.act = activation(config.non_linearity)
        self.scaling = _scaling(config, size)
        self.adapter_norm_after = nn.LayerNorm(size) if config.ln_after else None
        self.gate = nn.Linear(size, 1) if config.use_gating else None
        # The layer's norm of the sum, where the bottleneck has to do with it.
        self._norm: Reference[NormPart] | None = None
        # What the step's output will be added to, from when it is observed until it is used.
        self._residual: Tensor | None = None
        if not next(self.parameters()).is_meta:
            self._start()

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Find the layer's norm, what observes the stream for this part, and what all layers share.

        Args:
            parts: those of the adapter, by path.
        """
        norm = parts.get(self.sublayer.norm or "")
        if isinstance(norm, NormPart):
            self._norm = Reference(norm)
        before = parts.get(self.sublayer.before or "")
        if isinstance(before, ResidualPart):
            before.add_reader(self)
        # The first bottleneck keeps what all of them share.
        bottlenecks = [part for part in parts.values() if isinstance(part, BottleneckPart)]
        if bottlenecks[0].shared is not None:
            self._share(bottlenecks[0].shared)

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
        # Hypercomplex linears have started in their own way; there only what is to be zero is left.
        if isinstance(down, nn.Linear):
            nn.init.zeros_(down.bias)
            _start_down(down.weight, way)
        if isinstance(up, nn.Linear):
            nn.init.zeros_(up.bias)
            _start_up(up.weight, way)
        elif isinstance(up, HypercomplexLinear) and way == "mam_adapter":
            for tensor in up.weight.values():
                nn.init.zeros_(tensor)
        if gate is not None:
            nn.init.zeros_(gate.bias)
            nn.init.normal_(gate.weight, std=0.02)

    def observe(self, residual: Tensor) -> None:
        """A call of the layer has come to where the stream is read for this part.

        Args:
            residual: what the step's output will be added to, ``(*batch, hidden)``.
        """
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
        # Told once a call, and forgotten: what a layer keeps would keep its graph.
        residual = x if self.reads_stream else self._residual
        self._residual = None
        if not config.needs_residual:
            return self._bottleneck(y, y)
        assert residual is not None
        residual = residual.to(y.device)
        if config.is_parallel:
            output = y + self._bottleneck(residual, None)
        elif config.original_ln_before:
            if self._cancels_residual():
                # (y + r + u) - r without rounding twice
                return y + self._bottleneck(y + residual, None)
            output = self._after_sum(y, residual)
        else:
            output = self._bottleneck(y, y)
        if config.original_ln_after:
            return output
        # The layer will add the stream and norm: what it is to give in the end goes past its norm, and the
        # stream is taken out before it is added.
        if self._norm is not None:
            self._norm.module.replacement = output
        return output - residual

    def _cancels_residual(self) -> bool:
        """Whether the sum with the stream is only added to, and the stream taken out of it again."""
        config = self.config
        is_plain_sum = config.residual_before_ln == "post_add" and not config.ln_after and self._norm is None
        return is_plain_sum and not config.original_ln_after

    def _after_sum(self, y: Tensor, residual: Tensor) -> Tensor:
        """The bottleneck on the sum of a step's output and the stream, through the layer's own norm.

        Args:
            y: the step's output, ``(*batch, hidden)``.
            residual: the stream, likewise.
        """
        total = y + residual
        normed = total
        if self._norm is not None:
            normed = self._norm.module.normed(total)
        if self.config.residual_before_ln == "post_add":
            return self._bottleneck(normed, total)
        if self.config.residual_before_ln:
            return self._bottleneck(normed, y)
        return self._bottleneck(normed, normed)

    def _bottleneck(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """``norm(scaling * up(act(down(norm(x)))) + kept)``, the norms where there are some.

        Args:
            x: the input, ``(*batch, hidden)``.
            kept: what is added to what comes out; None for nothing.
        """
        up = self._scaled(self._up(x))
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

    def _up(self, x: Tensor) -> Tensor:
        """``up(act(down(norm(x))))``, in training without some of the rows."""
        hidden = x
        for module in self.adapter_down:
            hidden = _applied(module, hidden)
        up = _applied(self.adapter_up, self.act(hidden))
        if self.training and self.config.stochastic_depth:
            return _rows_dropped(up, self.config.stochastic_depth)
        return up

    def _scaled(self, up: Tensor) -> Tensor:
        """What comes out of the bottleneck, times its scaling."""
        if isinstance(self.scaling, Tensor):
            return up * self.scaling.to(up.dtype)
        if self.scaling != 1.0:
            return up * self.scaling
        return up

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``(I + s U D) W`` where no activation and no norm is in between; beside a single linear
        ``W + s U D``.

        Raises:
            MergeError: it is not linear in what its module gives, or that has no bias to take its own.
        """
        # Parallel to one linear it adds to what that computes; behind one it acts on what that gives.
        is_beside = self.reads_stream and self.config.is_parallel
        if not self._acts_linearly(is_beside, tensors.get("weight")):
            raise MergeError(
                "a bottleneck that does not act linearly on the output of one linear has no exact merge"
            )
        weight, bias = tensors["weight"], tensors.get("bias")
        update, offset = self._affine_update(weight.dtype)
        if bias is None and bool(offset.any()):
            raise MergeError(
                "its module has no bias that the bottleneck's could be merged into: it has no exact merge"
            )
        if is_beside:
            result = {"weight": weight + update}
            if bias is not None:
                result["bias"] = bias + offset
            return result
        result = {"weight": weight + update @ weight}
        if bias is not None:
            result["bias"] = bias + (update @ bias + offset)
        return result

    def _affine_update(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What it adds as a matrix, ``s U D``, ``(hidden, hidden)``, and a bias, ``s (U d + u)``,
        ``(hidden,)``.

        Args:
            dtype: what to compute in.
        """
        down, down_bias = _affine(self.adapter_down[-1], dtype)
        up, up_bias = _affine(self.adapter_up, dtype)
        scale: Tensor | float = self.scaling
        if isinstance(scale, Tensor):
            scale = scale.to(dtype)[:, None]
        update = scale * (up @ down)
        offset = (scale * (up @ down_bias + up_bias)[:, None])[:, 0]
        return update, offset

    def _acts_linearly(self, is_beside: bool, weight: Tensor | None) -> bool:
        """Whether it is linear in what its module computes, and that is one linear of the stream's size.

        Args:
            is_beside: it reads what the module reads, and adds to what that gives.
            weight: the module's, or None where it has none.
        """
        if not is_linear_in_its_input(self.config) or weight is None:
            return False
        if self.config.is_parallel and not is_beside:
            return False
        return weight.dim() == 2 and weight.shape[0] == self.width[0]


class ResidualPart(ModulePart):
    """Tells bottlenecks what their step's output will be added to, from the module that is given it."""

    when = "sees"

    def __init__(self) -> None:
        super().__init__()
        self._readers: list[Reference[BottleneckPart]] = []

    def add_reader(self, part: BottleneckPart) -> None:
        """Tell one more bottleneck of the stream from now on.

        Args:
            part: a bottleneck of the same adapter, whose step adds to what this part sees.
        """
        self._readers.append(Reference(part))

    def forward(self, x: Tensor) -> None:
        """Tell all bottlenecks that read here of the stream.

        Args:
            x: the stream, ``(*batch, hidden)``, as the module is given it.
        """
        for reader in self._readers:
            reader.module.observe(x)

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing: it only observes, and whether the bottlenecks that it tells can be merged they say
        themselves.
        """
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
        """Keep a reference to the norm, to compute it for bottlenecks in front of it.

        Args:
            host: the norm.
            fresh: it makes no difference.
        """
        self._host = Reference(host)

    def normed(self, x: Tensor) -> Tensor:
        """The norm of ``x``, past all hooks of adapters, which are for the layer's own call of it.

        Args:
            x: a sum of step and stream, ``(*batch, hidden)``.
        """
        assert self._host is not None
        result: Tensor = self._host.module.forward(x)
        return result

    def forward(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """The norm's output, or what a bottleneck has put in its place for this call.

        Args:
            x: the norm's input, ``(*batch, hidden)``.
            y: its output, likewise.
            base: not needed.
        """
        replacement, self.replacement = self.replacement, None
        if replacement is None:
            return y
        return replacement

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing: where it does something the bottleneck that it serves has no exact merge."""
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


def _start_down(weight: Tensor, way: str) -> None:
    """Fill the weight of the linear down, as ``init_weights`` says."""
    if way == "houlsby":
        nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
    elif way == "mam_adapter":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    else:
        nn.init.normal_(weight, std=0.02)


def _start_up(weight: Tensor, way: str) -> None:
    """Fill the weight of the linear up, as ``init_weights`` says."""
    if way == "houlsby":
        nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)
    elif way == "mam_adapter":
        nn.init.zeros_(weight)
    else:
        nn.init.normal_(weight, std=0.02)


def _scaling(config: BnConfig, size: int) -> nn.Parameter | float:
    """What the output of a bottleneck is multiplied with: a number, or a learned one, or one a channel."""
    if config.scaling == "learned":
        return nn.Parameter(torch.ones(1))
    if config.scaling == "channel":
        return nn.Parameter(torch.ones(size))
    return float(config.scaling)


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
    """Whether it is linear in what its module gives, and so can be merged: no activation, norm or gate is in
    between, and there is no invertible adapter.
    """
    has_activation = config.non_linearity not in (None, "linear")
    has_norm = config.ln_before or config.ln_after or config.uses_norm
    has_more = config.use_gating or config.inv_adapter is not None
    return not (has_activation or has_norm or has_more)


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
    """Every step that gets a bottleneck, what observes the stream before it, and the norm behind it.

    Args:
        config: the adapter's.
        view: the model, whose stream is known.
        candidates: the places beside all layers, for what stands at the embeddings.

    Raises:
        ConfigError: an option names a layer that there is not.
    """
    stream = view.stream
    assert stream is not None
    stream.require_layers(config.leave_out, "leave_out")
    if isinstance(config.reduction_factor, dict):
        named = [name for name in config.reduction_factor if name != "default"]
        stream.require_layers(named, "reduction_factor")
    chosen: dict[str, Place] = {}
    for sublayer in stream.sublayers():
        if not config.takes(sublayer):
            continue
        for path, role in _around(config, sublayer):
            place = stream_place(view, path, role, sublayer.width, sublayer, sublayer.layer)
            chosen.setdefault(path, place)
    result = list(chosen.values())
    if config.inv_adapter is not None:
        result += coupling_places(view, candidates)
    if config.use_gating:
        result += observer_places(view, candidates)
    return result


def _around(config: BnConfig, sublayer: Sublayer) -> list[tuple[str, str]]:
    """The modules at which one step has a part, by path, with what each part is to do there."""
    wanted = [(sublayer.out, ADDED)]
    if config.needs_residual and sublayer.before is not None and sublayer.before != sublayer.out:
        wanted.append((sublayer.before, RESIDUAL))
    if config.uses_norm and sublayer.norm is not None:
        wanted.append((sublayer.norm, NORMED))
    return wanted


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
    """The part for one place on the stream: the bottleneck itself, or what serves it there.

    Args:
        config: the adapter's.
        place: of the roles that `places` gives.
    """
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
    # Each step of each layer starts from a seed of its own, which does not depend on which others there are.
    number = 3 * place.sublayer.layer + ("self", "cross", "ffn").index(place.sublayer.kind)
    with seeded(config.init_weights_seed, number):
        return BottleneckPart(config, place)
