"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), and DoRA (Liu et al.
2024).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from grafts.config import config, option
from grafts.errors import ConfigError, MergeError
from grafts.methods._files import MethodFiles, Parts
from grafts.methods._registry import Place, Source, method
from grafts.methods._tensor_merging import SPARSE, SUMS, TensorMerging
from grafts.methods.shared.low_rank import is_transposed, product
from grafts.methods.shared.low_rank_config import LowRankConfig
from grafts.methods.shared.rescale import scaled
from grafts.methods.shared.token_positions import WholeInput
from grafts.modules.layers import Layer, describe
from grafts.modules.patterns import join, pattern_value
from grafts.modules.weights import canonical_weight, read_weights
from grafts.sites.module import ModulePart
from grafts.sites.site import Part, RankedPart
from grafts.structure.roles import FUSED, KEY_VALUE, QUERY, VALUE

_INITS = (True, False, "gaussian", "pissa", "olora", "orthogonal")


@config
class LoraConfig(LowRankConfig):
    """What a LoRA adapter is: ``y + scaling * B A x`` beside each target, A ``(r, in)`` and B ``(out, r)``
    trained.

    Without ``target_modules`` the targets are the query and value projections of attention, as in the paper
    (section 4.2).

    >>> LoraConfig(r=8, lora_alpha=16).scaling("model.layers.0.self_attn.q_proj")
    2.0
    """

    r: int = option(8, "The rank of the update.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023).")
    use_dora: bool = option(
        False,
        "DoRA (Liu et al. 2024): the update changes the direction of each weight row, a trained vector its "
        "length.",
    )
    lora_bias: bool = option(False, "Train a bias of the update as well.")
    use_gating: bool = option(
        False, "A learned gate, averaged over the tokens, in place of the scaling (Mao et al. 2022)."
    )
    init_lora_weights: bool | str = option(
        True,
        "True: A Kaiming-uniform, B zero; gaussian: A normal with deviation 1/r, B zero; False: both random; "
        "orthogonal: both random, B A zero; pissa, pissa_niter_N (principal singular vectors of the weight, "
        "exact or in N iterations) and olora (its QR decomposition): what A and B start with is subtracted, "
        "so that the model starts as it was.",
    )
    rank_pattern: dict[str, int] = option(
        {}, "Other ranks for some targets: regular expression for the end of the name -> r."
    )
    alpha_pattern: dict[str, float] = option({}, "Other lora_alpha for some targets, like rank_pattern.")

    peft_type: ClassVar[str] = "LORA"
    own_fields: ClassVar[frozenset[str]] = LowRankConfig.own_fields | {"use_gating"}
    elsewhere: ClassVar[Mapping[str, Any]] = {
        "qalora_group_size": 16,
        "megatron_core": "megatron.core",
        "save_embedding_layers": "auto",
    }

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        self.require("r", _is_rank(self.r), "a whole number above 0")
        init = self.init_lora_weights
        is_iterated = isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init) is not None
        self.require(
            "init_lora_weights",
            init in _INITS or is_iterated,
            "True, False, 'gaussian', 'orthogonal', 'olora', 'pissa' or 'pissa_niter_N'",
        )
        self.require(
            "rank_pattern", all(map(_is_rank, self.rank_pattern.values())), "regular expression -> rank"
        )
        is_plain = not self.use_dora and init in (True, False, "gaussian")
        may_be_gated = is_plain and not self.lora_bias
        self.require("use_gating", may_be_gated or not self.use_gating, "False beside use_dora and lora_bias")
        self.require(
            "lora_bias",
            is_plain or not self.lora_bias,
            "False beside use_dora or an init_lora_weights of the base's",
        )

    def rank(self, path: str) -> int:
        """The rank of the update beside the module at ``path``: that of the first pattern in ``rank_pattern``
        that matches, else ``r``.
        """
        return pattern_value(path, self.rank_pattern, self.r)

    def scaling(self, path: str) -> float:
        """The factor of the update beside the module at ``path``: alpha over the rank, or over its square
        root (Kalajdzievski 2023).
        """
        alpha, rank = pattern_value(path, self.alpha_pattern, self.lora_alpha), self.rank(path)
        if self.use_rslora:
            return alpha / math.sqrt(rank)
        return alpha / rank


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Start(nn.Module):
    """What A and B were made from, where an update is counted from its start."""

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)


class LoraPart(ModulePart, RankedPart):
    """LoRA beside one layer.

    Attributes:
        lora_A: ``(r, in)``; beside a convolution ``(r, in / groups, *kernel)``, beside an embedding
            ``(r, rows)``.
        lora_B: ``(out, r)``; beside a convolution ``(out, r, 1, ...)``, beside an embedding ``(dim, r)``.
        lora_bias: ``(out,)``, or None.
        scaling: the factor of the update; 1 where rank was reserved, where the factor is in ``rate``.
        rank: how much of A and B is in use.
        rate: the factor as a tensor, where rank was reserved, so that compiled code reads it anew; else None.
        is_transposed: the parameters are those of a part beside an embedding or head that shares its weight
            with this one: A is that one's B turned, and the other way round.
        start: what A and B were at the start, where the update is counted from there; else None.
    """

    rate: Tensor | None

    def __init__(self, config: LoraConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.place = dataclasses.replace(place, host=nn.Identity(), others=())
        self.register_buffer("rate", None, persistent=False)
        self.product = product(place.layer, place.host)
        self.init = _init_beside(config, place.layer)
        self.rank = config.rank(place.path)
        self.scaling = config.scaling(place.path)
        self.is_transposed = False
        self.start: Start | None = None
        self._require_possible(place.layer)
        # Token ids, which an embedding is given, cannot be dropped.
        drops = config.lora_dropout > 0 and place.layer.kind != "embedding"
        self.dropout = nn.Dropout(config.lora_dropout) if drops else None
        a_shape, b_shape = self.product.shapes(self.rank)
        self.lora_A = nn.Parameter(torch.empty(a_shape))
        self.lora_B = nn.Parameter(torch.empty(b_shape))
        self.lora_bias: nn.Parameter | None = None
        if config.lora_bias:
            self.lora_bias = nn.Parameter(torch.zeros(place.layer.out_features))
        if not self.lora_A.is_meta:
            self._reset()

    def _require_possible(self, layer: Layer) -> None:
        """Refuse options that this layer, or this rank, cannot have.

        Raises:
            ConfigError: naming the option.
        """
        if self.config.lora_bias and layer.kind == "embedding":
            raise ConfigError("an embedding has no bias, so lora_bias=True cannot be had beside it")
        if self.init == "orthogonal" and self.rank % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, not {self.rank}")

    def _reset(self) -> None:
        """Start A and B as the option says, where that does not need the base's weight."""
        self.product.reset(self.lora_A, self.lora_B)
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.rank)
        elif self.init is False:
            self.product.reset_both(self.lora_A, self.lora_B)
        elif self.init == "orthogonal":
            # Rows of one orthogonal matrix: those of even number span what those of odd number do not, so B A
            # is 0.
            half = self.rank // 2
            with torch.no_grad():
                q = torch.linalg.qr(torch.randn(self.rank, self.rank))[0]
                self.lora_A.copy_((torch.randn(self.lora_A.shape[1], half) @ q[0::2]).T / 10)
                self.lora_B.copy_((torch.randn(half, self.lora_B.shape[0]).T @ q[1::2]) / 10)

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Take the start of A and B from the base's weight where the option says so (pissa, olora).

        Args:
            host: the layer.
            fresh: A and B are to be set, and not only the start that the update is counted from.

        Raises:
            ConfigError: the rank is more than the weight has.
        """
        if not isinstance(self.init, str) or not self.init.startswith(("pissa", "olora")):
            return
        matrix = self.product.matrix(read_weights(host)["weight"])
        rank = self.lora_A.shape[0]
        if rank > min(matrix.shape):
            raise ConfigError(
                f"init_lora_weights={self.init!r}: rank {rank} is more than the weight's {min(matrix.shape)}"
            )
        if self.init == "olora":
            a, b = _olora(matrix, rank)
        else:
            a, b = _pissa(matrix, rank, self.scaling, self.init)
        self.start = Start(a.to(self.lora_A.dtype), b.to(self.lora_B.dtype))
        if fresh:
            with torch.no_grad():
                self.lora_A.copy_(a)
                self.lora_B.copy_(b)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """A and B as they are at this layer."""
        if self.is_transposed:
            return self.lora_B.T, self.lora_A.T
        return self.lora_A, self.lora_B

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update; counted from a start, that start stands in them with the opposite
        sign.
        """
        a, b = self._matrices()
        if self.start is not None:
            a = torch.cat([a, self.start.a])
            b = torch.cat([b, -self.start.b], dim=1)
        if self.rate is not None:
            b = b * self.rate
        return a, b

    def forward(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """Add the low-rank update to the base output.

        Args:
            x: input of the target, ``(*batch, in_features)``, or as the kind of layer has it.
            y: output of the frozen target, ``(*batch, out_features)``.
            base: not needed.

        Returns:
            ``y + scaling * B A x``, ``(*batch, out_features)``  (Hu et al. 2021, eq. 3).
        """
        a, b = self.factors()
        return self._with_bias(
            self.product.add(y, self._input(x, y), a, b, self.scaling * self.product.output_scale)
        )

    def forward_(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """`forward`, written into ``y``.

        Args:
            x: input of the target.
            y: its output, which nobody else holds.
            base: not needed.
        """
        a, b = self.factors()
        return self._with_bias(
            self.product.add_(y, self._input(x, y), a, b, self.scaling * self.product.output_scale)
        )

    def _input(self, x: Tensor, y: Tensor) -> Tensor:
        """The input of the update: on the device of the output, and with dropout."""
        x = x.to(y.device)
        # Compiled code looks only at what it needs: outside of training another dropout makes no difference
        # to it.
        if not self.training or self.dropout is None:
            return x
        dropped: Tensor = self.dropout(x)
        return dropped

    def _with_bias(self, y: Tensor) -> Tensor:
        """An output with the adapter's bias, where it has one."""
        if self.lora_bias is None:
            return y
        return y + self.product.along(self._scaled_bias(self.lora_bias)).to(y.dtype)

    def _scaled_bias(self, bias: Tensor) -> Tensor:
        """The bias times the factor, wherever that is kept."""
        if self.rate is None:
            return self.scaling * bias
        return self.rate * bias

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The two matrices, under the names that they have in files beside this kind of layer, and the
        bias where there is one.
        """
        a, b = self._matrices()
        if self.rate is not None:  # without what is reserved
            a, b = a[: self.rank], b[:, : self.rank]
        a_name, b_name = self.product.names
        tensors = {a_name: a, b_name: b}
        if self.lora_bias is not None:
            tensors["lora_B.bias"] = self.lora_bias
        return tensors

    @property
    def has_one_size(self) -> bool:
        """Whether A and B cannot be made larger than they need to be: where others refer to them, or the
        update is counted from a start.
        """
        return self.start is not None or self.is_transposed

    def check_reservable(self, rank: int) -> None:
        """Refuse a rank that is below the present one, and an update that is counted from a start.

        Args:
            rank: what is asked for.

        Raises:
            ConfigError: saying which of them it is.
        """
        if not _is_rank(rank) or rank < self.rank:
            raise ConfigError(
                f"room for rank {rank!r} is asked for beside an adapter of rank {self.rank}: it must be that "
                f"or more"
            )
        if self.has_one_size:
            raise ConfigError(
                "room for other ranks cannot be had with pissa, olora, use_gating or a tied weight"
            )

    def reserve_rank(self, rank: int) -> None:
        """Lay A and B into larger tensors with zeros around them, and the factor into a tensor.

        Args:
            rank: how many ranks they are to have room for; one for which `check_reservable` holds.
        """
        if self.rate is None:
            self.register_buffer("rate", self.lora_A.new_tensor(self.scaling), persistent=False)
            self.scaling = 1.0
        more = rank - self.lora_A.shape[0]
        a, b = self.lora_A.detach(), self.lora_B.detach()
        a = torch.cat([a, a.new_zeros(more, *a.shape[1:])])
        b = torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], dim=1)
        self.lora_A = nn.Parameter(a, self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(b, self.lora_B.requires_grad)

    def check_capacity(self, other: Part) -> None:
        """Refuse a `copy_from` that cannot be: ranks may be as large as was reserved.

        Args:
            other: the part whose values are to come here.

        Raises:
            ConfigError: its rank is larger, or its update is counted from a start.
        """
        if not isinstance(other, LoraPart) or self.rate is None:
            super().check_capacity(other)
        elif other.rank > self.lora_A.shape[0]:
            raise ConfigError(f"it is of rank {other.rank}, and there is room for {self.lora_A.shape[0]}")
        elif other.start is not None:
            raise ConfigError(
                "an adapter whose update is counted from a start (pissa, olora) cannot take the place of "
                "another"
            )

    def copy_from(self, other: Part) -> None:
        """Take over A, B and the factor; what is reserved beyond them is zero.

        Args:
            other: a part for which `check_capacity` holds.
        """
        assert isinstance(other, LoraPart)
        if self.rate is None:
            super().copy_from(other)
            self.scaling = other.scaling
        else:
            self.lora_A.zero_()[: other.rank].copy_(other.lora_A)
            self.lora_B.zero_()[:, : other.rank].copy_(other.lora_B)
            for name, value in other.named_parameters():
                if name not in ("lora_A", "lora_B"):
                    self.get_parameter(name).copy_(value)
            self.rate.fill_(other.scaling)
            self.rank = other.rank
        self.dropout = other.dropout

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``W + scaling * B A``, and ``b + scaling * lora_bias``; the arguments are those of `Part.merged`.

        Raises:
            MergeError: there is no bias to take the adapter's.
        """
        result = {"weight": self.product.plus(tensors["weight"], *self.factors(), self.scaling)}
        if self.lora_bias is not None:
            if "bias" not in tensors:
                raise MergeError(
                    "it has no bias that lora_bias could be merged into: use the adapter unmerged"
                )
            result["bias"] = tensors["bias"] + self._scaled_bias(self.lora_bias).to(tensors["bias"].dtype)
        return result

    def tied(self, host: nn.Module) -> LoraPart:
        """The same update beside a head whose weight is this embedding's, or the other way round: there A and
        B change places.

        Args:
            host: the other module.

        Raises:
            ConfigError: it does not use the weight the other way round.
        """
        layer = describe(host)
        if layer is None or layer.matrix != self.product.layer.matrix[::-1]:
            raise ConfigError("only an embedding and a head that share one weight can share one update")
        # One has dropout in front of its tokens and one behind, so neither has any.
        # Built on the meta device, where it costs nothing, and then given the parameters that it shares.
        config = dataclasses.replace(self.config, lora_dropout=0.0, lora_bias=False, init_lora_weights=True)
        with torch.device("meta"):
            twin = type(self)(config, dataclasses.replace(self.place, layer=layer, host=host))
        twin.lora_A, twin.lora_B = self.lora_A, self.lora_B
        twin.init = self.init
        twin.is_transposed = not self.is_transposed
        return twin


def _init_beside(config: LoraConfig, layer: Layer) -> bool | str:
    """How A and B start beside one layer: what needs the weight as a matrix is had beside linears only."""
    init = config.init_lora_weights
    if layer.is_linear or (layer.kind == "convolution" and init == "gaussian"):
        return init
    return bool(init)


class GatedLoraPart(LoraPart):
    """LoRA whose scaling is a gate of the input (Mao et al. 2022, https://arxiv.org/abs/2110.07577, section
    3.3).

    Attributes:
        gate: ``(1, in)`` and a bias.
    """

    def __init__(self, config: LoraConfig, place: Place) -> None:
        super().__init__(config, place)
        if not place.layer.is_linear:
            raise ConfigError(
                f"use_gating: a gate needs tokens, which the input of a {place.layer.class_name} does not "
                f"have"
            )
        self.gate = nn.Linear(place.layer.in_features, 1)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """Add the gated update to the base output.

        Args:
            x: input of the target, ``(batch, tokens, in_features)``.
            y: output of the frozen target, ``(batch, tokens, out_features)``.
            base: not needed.

        Returns:
            ``y + mean_tokens(sigmoid(gate(x))) * B A x``.
        """
        x = x.to(y.device)
        gates = nn.functional.linear(x, self.gate.weight.to(x.dtype), self.gate.bias.to(x.dtype))
        gate = torch.sigmoid(gates).mean(1, keepdim=True)
        a, b = self.factors()
        update = self.product.add(torch.zeros_like(y), self._input(x, y), a, b, 1.0)
        return y + gate.to(y.dtype) * update

    def forward_(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """`forward`, in a new tensor: the gate needs all of the output before the update is added."""
        return self.forward(x, y, *base)

    @property
    def has_one_size(self) -> bool:
        """Always: the update is not scaled by the factor, which as a tensor would make room for other
        ranks.
        """
        return True

    def file_tensors(self) -> Mapping[str, Tensor]:
        """LoRA's, and the weight and bias of the gate, under the name that AdapterHub's library gives
        them.
        """
        return {**super().file_tensors(), "gate.weight": self.gate.weight, "gate.bias": self.gate.bias}


def _pissa(matrix: Tensor, rank: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """A and B from the principal singular vectors (Meng et al. 2024, eq. 2-3); the iterative form from a
    fixed seed.
    """
    if init == "pissa":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, rank, niter=int(init.rpartition("_")[2]))
        vh = v.T
    # The singular values go to both halves, and the factor is taken out of them, since it comes in again.
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _olora(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B from the QR decomposition of the weight (Buyukakyuz 2024, section 3)."""
    q, r = torch.linalg.qr(matrix)
    return r[:rank], q[:, :rank]


class DoraPart(LoraPart):
    """DoRA beside one layer (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    Attributes:
        magnitude: m, the length of each row of the weight, ``(out,)``.
        base_norm: the squared lengths of the base weight's rows, ``(out,)``.
    """

    reads_base = True
    base_norm: Tensor

    def __init__(self, config: LoraConfig, place: Place) -> None:
        super().__init__(config, place)
        rows, _ = place.layer.matrix
        self.magnitude = nn.Parameter(torch.ones(rows))
        self.register_buffer("base_norm", torch.ones(rows), persistent=False)

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Measure the base's rows; a fresh adapter starts with their lengths, so that nothing changes.

        Args:
            host: the layer.
            fresh: the adapter is new.
        """
        super().from_base(host, fresh=fresh)
        matrix = self.product.matrix(read_weights(host)["weight"])
        self.base_norm = matrix.square().sum(1).to(self.magnitude.dtype)
        if fresh:
            with torch.no_grad():
                self.magnitude.copy_(self.base_norm.sqrt())

    @torch.no_grad()
    def row_norms(self, host: nn.Module) -> Tensor:
        """The length of each row of ``W + s B A``, ``(out,)``, a constant for the gradient (section 4.3).

        Without that matrix and without a pass over the batch: the square is expanded into
        ``|W|^2 + 2 s <W, B A> + s^2 |B A|^2`` by rows, where the middle needs ``W A^T`` and the last
        ``A A^T``.
        """
        a, b = self.product.flat(*self.factors())
        matrix = self.product.matrix(canonical_weight(host)).to(a.device)
        cross = (matrix @ a.T.to(matrix.dtype)).to(b.dtype)
        added = (2 * cross + self.scaling * (b @ (a @ a.T))) * b
        squares = self.base_norm + self.scaling * added.sum(1)
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()

    def forward(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """Give each row of the updated weight its own length.

        Args:
            x: input of the target, ``(*batch, in_features)``.
            y: output of the frozen target, ``(*batch, out_features)``.
            base: the target.

        Returns:
            ``m / |W + s B A| * (W x + s B A x) + bias``  (eq. 5), the norms by row.
        """
        (host,) = base
        factor = self.magnitude / self.row_norms(host)
        result = scaled(y, self.product.along(factor))
        # The bias is in the output already, and is not to be scaled.
        bias = getattr(host, "bias", None)
        if bias is not None:
            result = result - self.product.along((factor - 1) * bias).to(y.dtype)
        # The factor of each row goes into B, so that the update is added in one product.
        a, b = self.factors()
        b = b * (factor * (self.scaling * self.product.output_scale)).view(-1, *[1] * (b.dim() - 1))
        return self.product.add_(result, self._input(x, y), a, b, 1.0)

    def forward_(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """`forward`, which writes into no output: it scales the base's before it adds the update."""
        return self.forward(x, y, *base)

    def file_tensors(self) -> Mapping[str, Tensor]:
        """LoRA's, and the magnitude; beside a convolution in the shape in which it lies along the output, as
        `peft` saves it.
        """
        magnitude = self.product.along(self.magnitude)
        if magnitude is not self.magnitude:
            magnitude = magnitude.unsqueeze(0)
        return {**super().file_tensors(), "lora_magnitude_vector": magnitude}

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``m / |W + s B A| * (W' + s B A)`` with W of the base and W' as it is here; the bias of the base is
        not scaled.
        """
        # The lengths are those of the base with this update, whatever other adapters have merged before it.
        a, b = self.factors()
        updated_base = self.product.matrix(self.product.plus(base["weight"], a, b, self.scaling))
        norms = updated_base.norm(dim=1).detach()
        factor = self.magnitude.to(norms.dtype) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        updated = self.product.matrix(self.product.plus(tensors["weight"], a, b, self.scaling))
        result = {"weight": self.product.weight(updated * factor[:, None], tensors["weight"])}
        if "bias" in tensors and tensors["bias"] is not base["bias"]:
            result["bias"] = base["bias"] + factor * (tensors["bias"] - base["bias"])
        return result

    def tied(self, host: nn.Module) -> LoraPart:
        """Not to be had: the rows of one are the columns of the other.

        Args:
            host: the other module.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "use_dora cannot follow a tied weight, whose rows are columns there: leave ensure_weight_tying "
            "out"
        )


COMBINATIONS = ("cat", "svd", *SUMS, *(f"{way}_svd" for way in SPARSE))


class _Weighted(NamedTuple):
    """A part with the weight of its adapter."""

    part: LoraPart
    weight: float

    @property
    def scale(self) -> float:
        """What ``B A`` of this part is multiplied with in the weighted sum of the updates of all adapters at
        its place.
        """
        return self.weight * self.part.scaling


def combined(
    sources: Sequence[Source[LoraConfig]], merging: TensorMerging
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """One LoRA adapter made from several: its config and its tensors.

    - ``"cat"`` puts the factors side by side: the exact weighted sum of the updates, at the sum of the ranks;
    - ``"svd"`` and the ``_svd`` forms merge the updates ``s B A`` themselves and keep the largest singular
      values;
    - the others merge the As and the Bs, each with the square root of the weight: cheap and at the same rank,
      but the product of the sums has cross terms (so does ``"linear"``, as in Huang et al. 2023).

    Biases and the distances of magnitudes from the base's row lengths are summed with the weights in all of
    them.

    Args:
        sources: the adapters.
        merging: how tensors are made into one.

    Raises:
        ConfigError: the adapters are of different builds, or have ranks that do not go together.
    """
    first = sources[0].config
    _require_alike("use_dora", [source.config.use_dora for source in sources])
    _require_alike("lora_bias", [source.config.lora_bias for source in sources])
    # Not every adapter has a part everywhere; one that has none changes nothing there.
    groups: dict[str, list[tuple[Part, float]]] = {}
    for source in sources:
        for path, part in source.parts.items():
            groups.setdefault(path, []).append((part, source.weight))

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, group in groups.items():
        # Inside `nn.MultiheadAttention` there are two parts, one for each projection.
        for prefix in group[0][0].components():
            parts = []
            for part, weight in group:
                parts.append(_Weighted(cast("LoraPart", part.components()[prefix]), weight))
            values, ranks[path] = _combined_part(path, parts, merging)
            for name, tensor in values.items():
                tensors[join(path, f"{prefix}{name}")] = tensor

    # Scaled so that the factor is 1 everywhere: alpha is the rank.
    rank = max(ranks.values())
    rank_pattern, alpha_pattern = {}, {}
    for path, other in ranks.items():
        if other != rank:
            rank_pattern[f"^{re.escape(path)}"] = other
            alpha_pattern[f"^{re.escape(path)}"] = float(other)
    config = dataclasses.replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        init_lora_weights=True,
    )
    return config, tensors


def _require_alike(option: str, values: Sequence[bool]) -> None:
    """Refuse adapters of which some have an option and some have not.

    Raises:
        ConfigError: naming the option.
    """
    if len(set(values)) > 1:
        raise ConfigError(f"adapters with and without {option} cannot be made into one")


def _combined_part(
    path: str, parts: Sequence[_Weighted], merging: TensorMerging
) -> tuple[dict[str, Tensor], int]:
    """The tensors of one part made from several beside the same layer, scaled so that its own factor is 1,
    and its rank.
    """
    first = parts[0].part
    if merging.method == "cat":
        a, b = _side_by_side(parts)
    elif merging.method.endswith("svd"):
        a, b = _decomposed(parts, merging)
    else:
        a, b = _summed(path, parts, merging)
    a_name, b_name = first.product.names
    tensors = {a_name: a, b_name: b}
    if first.lora_bias is not None:
        bias = torch.zeros_like(first.lora_bias)
        for part, weight in parts:
            assert part.lora_bias is not None
            bias = bias + weight * part._scaled_bias(part.lora_bias)
        tensors["lora_B.bias"] = bias
    # Magnitudes are counted from the lengths of the base's rows, which are there once.
    if isinstance(first, DoraPart):
        base = first.base_norm.sqrt()
        summands = [base]
        for part, weight in parts:
            summands.append(weight * (cast("DoraPart", part).magnitude - base))
        shape = first.file_tensors()["lora_magnitude_vector"].shape
        tensors["lora_magnitude_vector"] = torch.stack(summands).sum(0).view(shape)
    return tensors, a.shape[0]


def _side_by_side(parts: Sequence[_Weighted]) -> tuple[Tensor, Tensor]:
    """A and B of the exact weighted sum of the updates, at the sum of the ranks."""
    all_a, all_b = [], []
    for weighted in parts:
        a, b = weighted.part.factors()
        all_a.append(weighted.scale * a)
        all_b.append(b)
    return torch.cat(all_a), torch.cat(all_b, dim=1)


def _decomposed(parts: Sequence[_Weighted], merging: TensorMerging) -> tuple[Tensor, Tensor]:
    """A and B of the largest singular values of the updates merged as matrices."""
    first = parts[0].part
    deltas, ranks = [], []
    for part, _ in parts:
        a, b = part.factors()
        deltas.append(part.scaling * first.product.delta(a, b))
        ranks.append(a.shape[0])
    merged = merging(deltas, [weight for _, weight in parts])
    rank = min(merging.rank or max(ranks), *merged.shape)
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    a_shape, b_shape = first.product.shapes(rank)
    return vh[:rank].reshape(a_shape), (u[:, :rank] * s[:rank]).reshape(b_shape)


def _summed(path: str, parts: Sequence[_Weighted], merging: TensorMerging) -> tuple[Tensor, Tensor]:
    """A and B merged each by themselves, with the square roots of the weights.

    Raises:
        ConfigError: the ranks differ.
    """
    all_a, all_b, a_weights, b_weights = [], [], [], []
    for weighted in parts:
        a, b = weighted.part.factors()
        root = math.sqrt(abs(weighted.scale))
        all_a.append(a)
        all_b.append(b)
        a_weights.append(math.copysign(root, weighted.scale))
        b_weights.append(root)
    ranks = [a.shape[0] for a in all_a]
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"{path!r}: {merging.method!r} needs equal ranks, not {ranks}: take 'cat' or one of the svd forms"
        )
    return merging(all_a, a_weights), merging(all_b, b_weights)


def narrow(config: LoraConfig, places: Sequence[Place], candidates: Sequence[Place]) -> list[Place]:
    """The places, and beside a gate those that say how much of the input there is.

    Args:
        config: the adapter's.
        places: those that were selected.
        candidates: all that the model has.
    """
    if not config.use_gating:
        return list(places)
    return [*places, *(place for place in candidates if place.layer.kind == "input")]


def can_be_merged(config: LoraConfig) -> bool:
    """Whether the update does not depend on the input."""
    return not config.use_gating


class LoraFiles(MethodFiles[LoraConfig]):
    """The files of LoRA, which say how weights are laid out."""

    def config_values(
        self, config: LoraConfig, values: Mapping[str, Any], parts: Parts, layers: Mapping[str, Layer]
    ) -> Mapping[str, Any]:
        """Whether the weights are transposed."""
        return {"fan_in_fan_out": is_transposed(layers)}


@method(
    "lora",
    title="LoRA",
    config=LoraConfig,
    layers={"linear", "transposed-linear", "embedding", "convolution", "attention"},
    default_roles=({QUERY, VALUE, KEY_VALUE, FUSED},),
    inert=True,
    mergeable=True,
    source="Hu et al. 2021, https://arxiv.org/abs/2106.09685",
    combinations=COMBINATIONS,
    combine=combined,
    merges=can_be_merged,
    narrow=narrow,
    files=LoraFiles(
        replaceable=frozenset(
            {
                "r",
                "lora_alpha",
                "rank_pattern",
                "alpha_pattern",
                "use_rslora",
                "lora_dropout",
                "init_lora_weights",
            }
        )
    ),
)
def lora_part(config: LoraConfig, place: Place) -> Part:
    """The part for one layer."""
    if config.use_gating:
        if place.layer.kind == "input":
            return WholeInput()
        return GatedLoraPart(config, place)
    if config.use_dora:
        return DoraPart(config, place)
    return LoraPart(config, place)
