"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), and DoRA (Liu et al.
2024).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from grafts.config import config, option
from grafts.errors import ConfigError, MergeError
from grafts.methods._registry import Parts, Place, method
from grafts.methods._tensor_merging import SPARSE, SUMS, TensorMerging
from grafts.methods.shared.low_rank import product
from grafts.methods.shared.low_rank_config import LowRankConfig
from grafts.methods.shared.rescale import scaled
from grafts.methods.shared.token_positions import WholeInput
from grafts.modules.layers import describe
from grafts.modules.patterns import join, pattern_value
from grafts.modules.weights import canonical_weight, read_weights
from grafts.sites.module import ModulePart
from grafts.sites.site import Part
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
        self.require(
            "init_lora_weights",
            init in _INITS or (isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init) is not None),
            "True, False, 'gaussian', 'orthogonal', 'olora', 'pissa' or 'pissa_niter_N'",
        )
        self.require(
            "rank_pattern", all(map(_is_rank, self.rank_pattern.values())), "regular expression -> rank"
        )
        plain = not self.use_dora and init in (True, False, "gaussian")
        self.require(
            "use_gating",
            (plain and not self.lora_bias) or not self.use_gating,
            "False beside use_dora and lora_bias",
        )
        self.require(
            "lora_bias",
            plain or not self.lora_bias,
            "False beside use_dora or an init_lora_weights of the base's",
        )

    def rank(self, path: str) -> int:
        """The rank of the update beside the module at ``path``."""
        return pattern_value(path, self.rank_pattern, self.r)

    def scaling(self, path: str) -> float:
        """The factor of the update beside the module at ``path``."""
        rank = self.rank(path)
        return pattern_value(path, self.alpha_pattern, self.lora_alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


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


class LoraPart(ModulePart):
    """LoRA beside one layer.

    Attributes:
        lora_A: ``(r, in)``; beside a convolution ``(r, in / groups, *kernel)``, beside an embedding
            ``(r, rows)``.
        lora_B: ``(out, r)``; beside a convolution ``(out, r, 1, ...)``, beside an embedding ``(dim, r)``.
        lora_bias: ``(out,)``, or None.
        scaling: the factor of the update; 1 where room was made for others, whose factor is in ``rate``.
        rank: how much of A and B is in use.
        rate: the factor as a tensor, where room was made (`reserve`), so that compiled code reads it anew;
            else None.
        transposed: the parameters are those of a part beside an embedding or head that shares its weight with
            this one.
        start: what A and B were at the start, where the update is counted from there; else None.
    """

    transposed = False
    rate: Tensor | None

    def __init__(self, config: LoraConfig, place: Place) -> None:
        super().__init__()
        self.register_buffer("rate", None, persistent=False)
        self.product = product(place.layer, place.host)
        self.init = config.init_lora_weights if place.layer.is_linear else bool(config.init_lora_weights)
        if place.layer.kind == "convolution" and config.init_lora_weights == "gaussian":
            self.init = "gaussian"
        rank = self.rank = config.rank(place.path)
        self.scaling = config.scaling(place.path)
        drops = config.lora_dropout and place.layer.kind != "embedding"
        self.dropout = nn.Dropout(config.lora_dropout) if drops else None
        a, b = self.product.shapes(rank)
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(a)), nn.Parameter(torch.empty(b))
        self.lora_bias = nn.Parameter(torch.zeros(place.layer.out_features)) if config.lora_bias else None
        self.start: Start | None = None
        if config.lora_bias and place.layer.kind == "embedding":
            raise ConfigError("an embedding has no bias, so lora_bias=True cannot be had beside it")
        if self.init == "orthogonal" and a[0] % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, not {a[0]}")
        if not self.lora_A.is_meta:
            self._reset()

    def _reset(self) -> None:
        self.product.reset(self.lora_A, self.lora_B)
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.lora_A.shape[0])
        elif self.init is False:
            self.product.reset_both(self.lora_A, self.lora_B)
        elif self.init == "orthogonal":
            rank = self.lora_A.shape[0]
            with torch.no_grad():
                q = torch.linalg.qr(torch.randn(rank, rank))[0]
                self.lora_A.copy_((torch.randn(self.lora_A.shape[1], rank // 2) @ q[0::2]).T / 10)
                self.lora_B.copy_((torch.randn(rank // 2, self.lora_B.shape[0]).T @ q[1::2]) / 10)

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Take the start of A and B from the base's weight where the option says so."""
        if not isinstance(self.init, str) or not self.init.startswith(("pissa", "olora")):
            return
        matrix = self.product.matrix(read_weights(host)["weight"])
        rank = self.lora_A.shape[0]
        if rank > min(matrix.shape):
            raise ConfigError(
                f"init_lora_weights={self.init!r}: rank {rank} is more than the weight's {min(matrix.shape)}"
            )
        a, b = _olora(matrix, rank) if self.init == "olora" else _pissa(matrix, rank, self.scaling, self.init)
        self.start = Start(a.to(self.lora_A.dtype), b.to(self.lora_B.dtype))
        if fresh:
            with torch.no_grad():
                self.lora_A.copy_(a)
                self.lora_B.copy_(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update; counted from a start, that start stands in them with the opposite
        sign.
        """
        a, b = (self.lora_B.T, self.lora_A.T) if self.transposed else (self.lora_A, self.lora_B)
        if self.start is not None:
            a, b = torch.cat([a, self.start.a]), torch.cat([b, -self.start.b], dim=1)
        return a, b if self.rate is None else b * self.rate

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
        """`forward`, written into ``y``."""
        a, b = self.factors()
        return self._with_bias(
            self.product.add_(y, self._input(x, y), a, b, self.scaling * self.product.output_scale)
        )

    def _input(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(y.device)
        return x if not self.training or self.dropout is None else self.dropout(x)

    def _with_bias(self, y: Tensor) -> Tensor:
        if self.lora_bias is None:
            return y
        return y + self.product.along(self._scaled_bias(self.lora_bias)).to(y.dtype)

    def _scaled_bias(self, bias: Tensor) -> Tensor:
        return self.scaling * bias if self.rate is None else self.rate * bias

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The two matrices, under the names that they have in files beside this kind of layer, and the
        bias.
        """
        a, b = (self.lora_B.T, self.lora_A.T) if self.transposed else (self.lora_A, self.lora_B)
        if self.rate is not None:
            a, b = a[: self.rank], b[:, : self.rank]
        tensors = dict(zip(self.product.names, (a, b), strict=True))
        return tensors if self.lora_bias is None else {**tensors, "lora_B.bias": self.lora_bias}

    def check_reservable(self, rank: int) -> None:
        """Refuse a rank that is below the present one, and an update that is counted from a start."""
        if not _is_rank(rank) or rank < self.rank:
            raise ConfigError(
                f"room for rank {rank!r} is asked for beside an adapter of rank {self.rank}: it must be that "
                f"or more"
            )
        if self.start is not None or self.transposed or isinstance(self, GatedLoraPart):
            raise ConfigError(
                "room for other ranks cannot be had with pissa, olora, use_gating or a tied weight"
            )

    def reserve(self, rank: int) -> None:
        """Lay A and B into larger tensors with zeros around them, and the factor into a tensor."""
        if self.rate is None:
            self.register_buffer("rate", self.lora_A.new_tensor(self.scaling), persistent=False)
            self.scaling = 1.0
        more = rank - self.lora_A.shape[0]
        a, b = (
            nn.functional.pad(t.detach().movedim(dim, -1), (0, more)).movedim(-1, dim)
            for t, dim in self._ranked()
        )
        self.lora_A = nn.Parameter(a.contiguous(), self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(b.contiguous(), self.lora_B.requires_grad)

    def _ranked(self) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        """A and B, each with the dimension that is the rank."""
        return (self.lora_A, 0), (self.lora_B, 1)

    def check_capacity(self, other: Part) -> None:
        """Ranks need as much room as was made."""
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
        """Take over A, B and the factor; what room is left over is zero."""
        assert isinstance(other, LoraPart)
        if self.rate is None:
            super().copy_from(other)
            self.scaling = other.scaling
        else:
            for (mine, dim), (theirs, _) in zip(self._ranked(), other._ranked(), strict=True):
                mine.zero_().narrow(dim, 0, other.rank).copy_(theirs)
            for name, value in other.named_parameters():
                if name not in ("lora_A", "lora_B"):
                    self.get_parameter(name).copy_(value)
            self.rate.fill_(other.scaling)
            self.rank = other.rank
        self.dropout = other.dropout

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``W + scaling * B A``, and ``b + scaling * lora_bias``."""
        result = {"weight": self.product.plus(tensors["weight"], *self.factors(), self.scaling)}
        if self.lora_bias is not None:
            if "bias" not in tensors:
                raise MergeError(
                    "it has no bias that lora_bias could be merged into: use the adapter unmerged"
                )
            result["bias"] = tensors["bias"] + self._scaled_bias(self.lora_bias).to(tensors["bias"].dtype)
        return result

    def tied(self, host: nn.Module) -> Self:
        """The same update beside a head whose weight is this embedding's, or the other way round."""
        layer = describe(host)
        if layer is None or layer.matrix != self.product.layer.matrix[::-1]:
            raise ConfigError("only an embedding and a head that share one weight can share one update")
        twin = type(self).__new__(type(self))
        nn.Module.__init__(twin)
        twin.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name not in nn.Module().__dict__}
        )
        twin.product, twin.transposed, twin.dropout, twin.start = (
            product(layer, host),
            not self.transposed,
            None,
            None,
        )
        twin.lora_A, twin.lora_B, twin.lora_bias = self.lora_A, self.lora_B, None
        twin.register_buffer("rate", None, persistent=False)
        return twin


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
        gate = torch.sigmoid(
            nn.functional.linear(x, self.gate.weight.to(x.dtype), self.gate.bias.to(x.dtype))
        ).mean(1, keepdim=True)
        a, b = self.factors()
        update = self.product.add(torch.zeros_like(y), self._input(x, y), a, b, 1.0)
        return y + gate.to(y.dtype) * update

    def forward_(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """`forward`."""
        return self.forward(x, y, *base)

    def file_tensors(self) -> Mapping[str, Tensor]:
        """LoRA's, and the gate."""
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
        """Measure the base's rows; a fresh adapter starts with their lengths."""
        super().from_base(host, fresh=fresh)
        self.base_norm = (
            self.product.matrix(read_weights(host)["weight"]).square().sum(1).to(self.magnitude.dtype)
        )
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
        squares = self.base_norm + self.scaling * ((2 * cross + self.scaling * (b @ (a @ a.T))) * b).sum(1)
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
        bias = getattr(host, "bias", None)
        if bias is not None:
            result = result - self.product.along((factor - 1) * bias).to(y.dtype)
        a, b = self.factors()
        b = b * (factor * (self.scaling * self.product.output_scale)).view(-1, *[1] * (b.dim() - 1))
        return self.product.add_(result, self._input(x, y), a, b, 1.0)

    def forward_(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """`forward`."""
        return self.forward(x, y, *base)

    def file_tensors(self) -> Mapping[str, Tensor]:
        """LoRA's, and the magnitude, along the output of a convolution."""
        magnitude = self.product.along(self.magnitude)
        return {
            **super().file_tensors(),
            "lora_magnitude_vector": magnitude if magnitude is self.magnitude else magnitude.unsqueeze(0),
        }

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``m / |W + s B A| * (W' + s B A)`` with W of the base and W' as it is here; the bias of the base is
        not scaled.
        """
        a, b = self.factors()
        norms = (
            self.product.matrix(self.product.plus(base["weight"], a, b, self.scaling)).norm(dim=1).detach()
        )
        factor = self.magnitude.to(norms.dtype) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        here = self.product.matrix(self.product.plus(tensors["weight"], a, b, self.scaling))
        result = {"weight": self.product.weight(here * factor[:, None], tensors["weight"])}
        if "bias" in tensors and tensors["bias"] is not base["bias"]:
            result["bias"] = base["bias"] + factor * (tensors["bias"] - base["bias"])
        return result

    def tied(self, host: nn.Module) -> Self:
        """Not to be had: the rows of one are the columns of the other."""
        raise ConfigError(
            "use_dora cannot follow a tied weight, whose rows are columns there: leave ensure_weight_tying "
            "out"
        )


COMBINATIONS = ("cat", "svd", *SUMS, *(f"{way}_svd" for way in SPARSE))


def combined(
    sources: Sequence[tuple[LoraConfig, Parts, float]], blend: TensorMerging
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """One LoRA adapter made from several: its config and its tensors.

    - ``"cat"`` puts the factors side by side: the exact weighted sum of the updates, at the sum of the ranks;
    - ``"svd"`` and the ``_svd`` forms blend the updates ``s B A`` themselves and keep the largest singular
      values;
    - the others blend the As and the Bs, each with the square root of the weight: cheap and at the same rank,
      but the product of the sums has cross terms (so does ``"linear"``, as in Huang et al. 2023).

    Biases and the distances of magnitudes from the base's row lengths are summed with the weights in all of
    them.
    """
    first = sources[0][0]
    for name in ("use_dora", "lora_bias"):
        if len({getattr(config, name) for config, _, _ in sources}) > 1:
            raise ConfigError(f"adapters with and without {name} cannot be made into one")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path in dict.fromkeys(path for _, parts, _ in sources for path in parts):
        here = [(parts[path], weight) for _, parts, weight in sources if path in parts]
        for prefix in here[0][0].components():
            pieces = [(cast("LoraPart", part.components()[prefix]), weight) for part, weight in here]
            made, ranks[path] = _combined_part(path, pieces, blend)
            tensors.update({join(path, f"{prefix}{name}"): tensor for name, tensor in made.items()})
    rank = max(ranks.values())
    other = {f"^{re.escape(path)}": here for path, here in ranks.items() if here != rank}
    config = dataclasses.replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern=other,
        alpha_pattern={path: float(here) for path, here in other.items()},
        init_lora_weights=True,
    )
    return config, tensors


def _combined_part(
    path: str, pieces: Sequence[tuple[LoraPart, float]], blend: TensorMerging
) -> tuple[dict[str, Tensor], int]:
    """The tensors of one part made from several beside the same layer, scaled so that its own scaling is 1;
    its rank.
    """
    first = pieces[0][0]
    a_s, b_s = zip(*(part.factors() for part, _ in pieces), strict=True)
    scales = [weight * part.scaling for part, weight in pieces]
    if blend.method == "cat":
        a = torch.cat([scale * a for a, scale in zip(a_s, scales, strict=True)])
        b = torch.cat(b_s, dim=1)
    elif blend.method.endswith("svd"):
        deltas = [
            scale * first.product.delta(a, b)
            for a, b, scale in zip(a_s, b_s, (p.scaling for p, _ in pieces), strict=True)
        ]
        rank = min(blend.rank or max(a.shape[0] for a in a_s), *deltas[0].shape)
        u, s, vh = torch.linalg.svd(blend(deltas, [weight for _, weight in pieces]), full_matrices=False)
        a_shape, b_shape = first.product.shapes(rank)
        a, b = vh[:rank].reshape(a_shape), (u[:, :rank] * s[:rank]).reshape(b_shape)
    else:
        if len({a.shape[0] for a in a_s}) > 1:
            ranks = [a.shape[0] for a in a_s]
            raise ConfigError(
                f"{path!r}: {blend.method!r} needs equal ranks, not {ranks}: take 'cat' or one of the svd "
                f"forms"
            )
        roots = [math.sqrt(abs(scale)) for scale in scales]
        a = blend(a_s, [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)])
        b = blend(b_s, roots)
    tensors = dict(zip(first.product.names, (a, b), strict=True))
    if first.lora_bias is not None:
        biases = [
            weight * part._scaled_bias(part.lora_bias)
            for part, weight in pieces
            if part.lora_bias is not None
        ]
        tensors["lora_B.bias"] = sum(biases)  # type: ignore[assignment]
    if isinstance(first, DoraPart):
        base = first.base_norm.sqrt()
        moved = [weight * (cast("DoraPart", part).magnitude - base) for part, weight in pieces]
        tensors["lora_magnitude_vector"] = (
            torch.stack([base, *moved]).sum(0).view(first.file_tensors()["lora_magnitude_vector"].shape)
        )
    return tensors, a.shape[0]


def with_listeners(config: LoraConfig, places: Sequence[Place], candidates: Sequence[Place]) -> list[Place]:
    """The places, and beside a gate those that say how much of the input there is."""
    return [*places, *(place for place in candidates if config.use_gating and place.layer.kind == "input")]


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
    merges=lambda config: not config.use_gating,
    narrow=with_listeners,
    swaps=frozenset(
        {
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "lora_dropout",
            "init_lora_weights",
        }
    ),
)
def lora_part(config: LoraConfig, place: Place) -> Part:
    """The part for one layer."""
    if config.use_gating:
        return WholeInput() if place.layer.kind == "input" else GatedLoraPart(config, place)
    return DoraPart(config, place) if config.use_dora else LoraPart(config, place)
