"""Bottleneck adapters: small feed-forward networks on what is added to the residual stream.

Sequential after the feed-forward (Pfeiffer et al. 2020, arXiv:2005.00247), after attention as well (Houlsby
et al. 2019, arXiv:1902.00751), parallel (He et al. 2021, arXiv:2110.04366), AdapterPlus (Steitz & Roth 2024,
arXiv:2406.06820), and Compacter with hypercomplex linears (Karimi Mahabadi et al. 2021, arXiv:2106.04647).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, config, option
from grafts.errors import ConfigError, MergeError
from grafts.methods._registry import Parts, Place, method
from grafts.methods.invertible import BLOCKS, CouplingPart, coupling_places, link_couplings
from grafts.methods.shared.activations import activation, is_activation
from grafts.methods.shared.kronecker import Hypercomplex, HypercomplexLinear
from grafts.methods.shared.seeding import seeded
from grafts.methods.shared.token_positions import WholeInput, observer_places
from grafts.methods.shared.weighted_average import averaged
from grafts.modules.layers import Layer
from grafts.sites.module import ModulePart
from grafts.sites.site import Part
from grafts.structure.residual_stream import (
    ADDED,
    BEGIN,
    END,
    NORMED,
    RESIDUAL,
    Stream,
    Sublayer,
    require_width,
)

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
        factors = list(factor.values()) if isinstance(factor, dict) else [factor]
        fits = all(isinstance(value, (int, float)) and value > 0 for value in factors)
        self.require("reduction_factor", bool(factors) and fits, "a number above 0, or layer -> number")
        self.require(
            "non_linearity", is_activation(self.non_linearity), "an activation of transformers, or None"
        )
        self.require("init_weights", self.init_weights in _INITS, f"one of {', '.join(_INITS)}")
        number = isinstance(self.scaling, (int, float)) and not isinstance(self.scaling, bool)
        self.require(
            "scaling", number or self.scaling in ("learned", "channel"), "a number, 'learned' or 'channel'"
        )
        self.require(
            "residual_before_ln",
            self.residual_before_ln in (True, False, "post_add"),
            "True, False or 'post_add'",
        )
        self.require(
            "inv_adapter", self.inv_adapter in (None, *BLOCKS), f"None or one of {', '.join(BLOCKS)}"
        )
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self.require("stochastic_depth", 0 <= self.stochastic_depth < 1, "at least 0 and below 1")
        self.require("phm_c_init", self.phm_c_init in ("normal", "uniform"), "normal or uniform")
        inits = self.hypercomplex_nonlinearity in _HYPERCOMPLEX_INITS
        self.require("hypercomplex_nonlinearity", inits, f"one of {', '.join(_HYPERCOMPLEX_INITS)}")
        somewhere = self.mh_adapter or self.output_adapter or self.cross_adapter
        self.require("output_adapter", somewhere, "True where neither mh_adapter nor cross_adapter is")

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
        shared: what all layers share of hypercomplex linears; at the first part only.
    """

    def __init__(self, config: BnConfig, place: Place) -> None:
        super().__init__()
        assert place.sublayer is not None
        self.config, self.sublayer = config, place.sublayer
        size = place.layer.out_features
        inner = max(int(size // config.reduction(place.sublayer.layer)), 1)
        self.width = size, inner
        self.parallel_here = place.sublayer.before == place.path
        first = next((other.path for other in place.others if other.role == ADDED), place.path)
        self.shared = _shared(config, size, inner) if config.phm_layer and first == place.path else None
        steps: list[nn.Module] = [nn.LayerNorm(size)] if config.ln_before else []
        self.adapter_down = nn.Sequential(*steps, _linear(config, size, inner))
        self.adapter_up = _linear(config, inner, size)
        self.act = activation(config.non_linearity)
        self.scaling: nn.Parameter | float = (
            float(config.scaling) if not isinstance(config.scaling, str) else 1.0
        )
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if config.scaling == "learned" else size))
        self.adapter_norm_after = nn.LayerNorm(size) if config.ln_after else None
        self.gate = nn.Linear(size, 1) if config.use_gating else None
        self.norm: tuple[NormPart, ...] = ()
        self._residual: Tensor | None = None
        if not next(self.parameters()).is_meta:
            self._start()

    def _start(self) -> None:
        """Start as BERT does, or with zeros behind (He et al. 2021), or near zero (Houlsby et al. 2019,
        section 3.2).
        """
        way, linears = self.config.init_weights, [self.adapter_down[-1], self.adapter_up]
        for linear in [*linears, *([self.gate] if self.gate is not None else [])]:
            if not isinstance(linear, nn.Linear):
                continue
            nn.init.zeros_(linear.bias)
            if way == "houlsby" and linear is not self.gate:
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            elif way == "mam_adapter" and linear is linears[0]:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            elif way == "mam_adapter" and linear is linears[1]:
                nn.init.zeros_(linear.weight)
            else:
                nn.init.normal_(linear.weight, std=0.02)
        if self.config.phm_layer and way == "mam_adapter":
            with torch.no_grad():
                for tensor in self.adapter_up.weight.values():  # type: ignore[operator]
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
        residual, self._residual = (x if self.parallel_here else self._residual), None
        if not config.needs_residual:
            return self._bottleneck(y, y)
        assert residual is not None
        residual = residual.to(y.device)
        if config.is_parallel:
            output = y + self._bottleneck(residual, None)
        elif config.original_ln_before:
            summed = y + residual
            normed = self.norm[0].normed(summed) if self.norm else summed
            kept = (
                summed
                if config.residual_before_ln == "post_add"
                else y
                if config.residual_before_ln
                else normed
            )
            if kept is summed and not config.ln_after and config.original_ln_after is False and not self.norm:
                return y + self._bottleneck(normed, None)  # (y + r + u) - r, without rounding twice
            output = self._bottleneck(normed, kept)
        else:
            output = self._bottleneck(y, y)
        if config.original_ln_after:
            return output
        for norm in self.norm:
            norm.instead = output
        return output - residual

    def _bottleneck(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """``norm(scaling * up(act(down(norm(x)))) + kept)``, the norms where there are some."""
        hidden = x
        for step in self.adapter_down:
            hidden = _applied(step, hidden)
        up = _applied(self.adapter_up, self.act(hidden))
        if self.training and self.config.stochastic_depth:
            up = _rows_dropped(up, self.config.stochastic_depth)
        scaling = self.scaling.to(up.dtype) if isinstance(self.scaling, Tensor) else self.scaling
        up = up if isinstance(scaling, float) and scaling == 1.0 else up * scaling
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
        alone = self.parallel_here and config.is_parallel
        linear = can_merge(config) and (alone or not config.is_parallel) and "weight" in tensors
        if not linear or tensors["weight"].dim() != 2 or tensors["weight"].shape[0] != self.width[0]:
            raise MergeError(
                "a bottleneck that does not act linearly on the output of one linear has no exact merge"
            )
        weight, wide = tensors["weight"], tensors["weight"].dtype
        down, down_bias = _affine(self.adapter_down[-1], wide)
        up, up_bias = _affine(self.adapter_up, wide)
        scale = self.scaling.to(wide)[:, None] if isinstance(self.scaling, Tensor) else self.scaling
        update = scale * (up @ down)
        offset = (scale * (up @ down_bias + up_bias)[:, None])[:, 0]
        result = {"weight": weight + (update if alone else update @ weight)}
        if "bias" in tensors:
            moved = offset if alone else update @ tensors["bias"] + offset
            result["bias"] = tensors["bias"] + moved
        elif bool(offset.any()):
            raise MergeError(
                "its module has no bias that the bottleneck's could be merged into: it has no exact merge"
            )
        return result


class ResidualPart(ModulePart):
    """Tells bottlenecks what their step's output will be added to, from the module that is given it."""

    when = "sees"

    def __init__(self) -> None:
        super().__init__()
        self.listeners: tuple[BottleneckPart, ...] = ()

    def forward(self, x: Tensor) -> None:
        """Pass on ``x``, ``(*batch, hidden)``."""
        for part in self.listeners:
            part.observe(x)

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}


class NormPart(ModulePart):
    """The layer's norm of the sum, for bottlenecks that go through it first, or replace it.

    Attributes:
        instead: what a bottleneck has put in place of the norm's next output, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host: tuple[nn.Module, ...] = ()
        self.instead: Tensor | None = None

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Know the norm."""
        self.host = (host,)

    def normed(self, x: Tensor) -> Tensor:
        """The norm of ``x``, past all hooks of adapters."""
        result: Tensor = self.host[0].forward(x)
        return result

    def forward(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """The norm's output, or what is to stand in its place."""
        instead, self.instead = self.instead, None
        return y if instead is None else instead

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
        return matrix.to(dtype), (matrix.new_zeros(matrix.shape[0]) if linear.b is None else linear.b).to(
            dtype
        )
    assert isinstance(linear, nn.Linear)
    return linear.weight.to(dtype), linear.bias.to(dtype)


def _rows_dropped(x: Tensor, chance: float) -> Tensor:
    """Stochastic depth: whole rows zero, the others scaled up (Huang et al. 2016)."""
    keep = torch.empty(x.shape[0], *[1] * (x.dim() - 1), device=x.device).bernoulli_(1 - chance)
    return x * (keep / (1 - chance)).to(x.dtype)


def _linear(config: BnConfig, inputs: int, outputs: int) -> nn.Module:
    if not config.phm_layer:
        return nn.Linear(inputs, outputs)
    return HypercomplexLinear(
        config.hypercomplex(), inputs, outputs, not config.shared_phm_rule, not config.shared_W_phm
    )


def _shared(config: BnConfig, size: int, inner: int) -> nn.ParameterDict | None:
    """What all layers share of hypercomplex linears."""
    kind, made = config.hypercomplex(), nn.ParameterDict()
    if config.shared_phm_rule:
        made.update(kind.rule_tensors(shared=True))
    if config.shared_W_phm:
        made.update(kind.weight_tensors(size, inner, "W_down"))
        made.update(kind.weight_tensors(inner, size, "W_up"))
    return made if len(made) else None


def can_merge(config: BnConfig) -> bool:
    """Whether it is linear in what its module gives."""
    plain = (
        config.non_linearity in (None, "linear")
        and config.original_ln_after
        and not config.original_ln_before
    )
    return plain and not (config.ln_before or config.ln_after or config.use_gating or config.inv_adapter)


def check(config: BnConfig, places: Sequence[Place]) -> None:
    """Refuse a model in which a step's residual stream is not known, where that is needed.

    Raises:
        ConfigError: naming the step.
    """
    for place in places:
        if (
            place.role == ADDED
            and config.needs_residual
            and place.sublayer is not None
            and place.sublayer.before is None
        ):
            name = {"self": "self_attn", "cross": "cross_attn", "ffn": "ffn"}[place.sublayer.kind]
            raise ConfigError(
                f"{place.path!r}: the interface does not say what its output is added to: give "
                f"layer_pre_{name}, or a config without is_parallel, original_ln_before and "
                "original_ln_after=False"
            )


def stream_places(
    config: BnConfig, stream: Stream, module: Callable[[str], nn.Module], candidates: Sequence[Place]
) -> list[Place]:
    """Every step that gets a bottleneck, what hears the stream before it, and the norm behind it."""
    stream.require_layers(config.leave_out, "leave_out")
    if isinstance(config.reduction_factor, dict):
        stream.require_layers(
            (name for name in config.reduction_factor if name != "default"), "reduction_factor"
        )
    result: dict[str, Place] = {}
    for sublayer in stream.sublayers():
        if not config.takes(sublayer):
            continue
        wanted = [(sublayer.out, ADDED)]
        if config.needs_residual and sublayer.before not in (None, sublayer.out):
            wanted.append((sublayer.before, RESIDUAL))
        if sublayer.norm is not None and (config.original_ln_before or not config.original_ln_after):
            wanted.append((sublayer.norm, NORMED))
        for path, role in wanted:
            layer = Layer("stream", sublayer.width, sublayer.width, False, type(module(path)).__name__)
            result.setdefault(path, Place(path, layer, role, module(path), sublayer, sublayer.layer))
    more = coupling_places(stream, module, candidates) if config.inv_adapter else []
    return [*result.values(), *more, *(observer_places(stream, candidates) if config.use_gating else [])]


def link(config: BnConfig, parts: Parts) -> None:
    """Let the parts of each step find each other, and all layers what they share."""
    own = {path: part for path, part in parts.items() if isinstance(part, BottleneckPart)}
    first = next(iter(own.values()))
    for part in own.values():
        sublayer = part.sublayer
        if first.shared is not None:
            for linear, name in ((part.adapter_down[-1], "W_down"), (part.adapter_up, "W_up")):
                assert isinstance(linear, HypercomplexLinear)
                linear.share(first.shared, name)
        if isinstance(norm := parts.get(sublayer.norm or ""), NormPart):
            part.norm = (norm,)
        if isinstance(before := parts.get(sublayer.before or ""), ResidualPart):
            before.listeners = (*before.listeners, part)
    link_couplings(parts)


@method(
    "bottleneck",
    title="Bottleneck adapter",
    config=BnConfig,
    layers={"stream"},
    default_roles=(),
    inert=False,
    mergeable=True,
    merges=can_merge,
    source="Houlsby et al. 2019, https://arxiv.org/abs/1902.00751",
    combinations=("linear",),
    combine=averaged,
    places=stream_places,
    check=check,
    attached=link,
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
