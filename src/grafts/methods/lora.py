"""LoRA: low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafts.config import AdapterConfig, config, option
from grafts.matching import pattern_value
from grafts.methods import method
from grafts.roles import FUSED, KEY_VALUE, QUERY, VALUE
from grafts.sites.module import Part
from grafts.weights import Layer, row_scale


@config
class LoraConfig(AdapterConfig):
    """What a LoRA adapter is: ``y + scaling * B A x`` beside each target, A ``(r, in)`` and B ``(out, r)`` trained.

    Without ``target_modules`` the targets are the query and value projections of attention, as in the paper (section 4.2).

    >>> LoraConfig(r=8, lora_alpha=16).scaling("model.layers.0.self_attn.q_proj")
    2.0
    """

    r: int = option(8, "The rank of the update.")
    lora_alpha: float = option(8, "The update is scaled by lora_alpha / r.")
    lora_dropout: float = option(0.0, "Dropout on the input of the update, while training.")
    bias: str = option("none", "Biases to train as well: none, those of the targets (lora_only), or all.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023).")
    init_lora_weights: bool | str = option(
        True, "True: A Kaiming-uniform, B zero; gaussian: A normal with deviation 1/r, B zero; False: both random."
    )
    rank_pattern: dict[str, int] = option({}, "Other ranks for some targets: regular expression for the end of the name -> r.")
    alpha_pattern: dict[str, float] = option({}, "Other lora_alpha for some targets, like rank_pattern.")
    layers_to_transform: int | tuple[int, ...] | None = option(None, "Only targets in the layers with these indices.")
    layers_pattern: str | tuple[str, ...] | None = option(
        None, "The name of the list of layers that layers_to_transform counts in, where the first number is not it."
    )
    fan_in_fan_out: bool = option(False, "Written for other libraries; here the layout of a weight is found out.")

    elsewhere: ClassVar[Mapping[str, Any]] = {
        "qalora_group_size": 16,
        "megatron_core": "megatron.core",
        "save_embedding_layers": "auto",
    }

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        self.require("r", _is_rank(self.r), "a whole number above 0")
        self.require("lora_alpha", isinstance(self.lora_alpha, (int, float)), "a number")
        self.require("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")
        self.require("bias", self.bias in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'")
        self.require("init_lora_weights", self.init_lora_weights in (True, False, "gaussian"), "True, False or 'gaussian'")
        self.require("rank_pattern", all(map(_is_rank, self.rank_pattern.values())), "regular expression -> rank")
        layered = self.layers_to_transform is not None
        self.require("layers_pattern", layered or not self.layers_pattern, "left out unless layers_to_transform is given")
        self.require(
            "layers_to_transform",
            not (layered and isinstance(self.target_modules, str)),
            "left out beside a regular expression",
        )

    def rank(self, path: str) -> int:
        """The rank of the update beside the module at ``path``."""
        return pattern_value(path, self.rank_pattern, self.r)

    def scaling(self, path: str) -> float:
        """The factor of the update beside the module at ``path``."""
        rank = self.rank(path)
        return pattern_value(path, self.alpha_pattern, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class LoraLinear(Part):
    """LoRA beside a linear layer.

    Attributes:
        lora_A: ``(r, in_features)``.
        lora_B: ``(out_features, r)``.
        scaling: the factor of the update.
    """

    def __init__(self, config: LoraConfig, path: str, layer: Layer) -> None:
        super().__init__()
        rank = config.rank(path)
        self.scaling = config.scaling(path)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else None
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the low-rank update to the base output.

        Args:
            x: input of the target, ``(*batch, in_features)``.
            y: output of the frozen target, ``(*batch, out_features)``.

        Returns:
            ``y + scaling * B A x``, ``(*batch, out_features)``  (Hu et al. 2021, eq. 3).
        """
        return add_scaled(y, self._down(x, y), self.lora_B, self.scaling)

    def forward_(self, x: Tensor, y: Tensor) -> Tensor:
        """`forward`, written into ``y``."""
        return add_scaled_(y, self._down(x, y), self.lora_B, self.scaling)

    def _down(self, x: Tensor, y: Tensor) -> Tensor:
        """``A x``, ``(*batch, r)``."""
        x = x.to(y.device)
        if self.dropout is not None:
            x = self.dropout(x)
        return F.linear(x, self.lora_A.to(x.dtype))

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The two matrices, as two linear layers."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def merged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``W + scaling * B A``."""
        weight = tensors["weight"]
        return {"weight": torch.addmm(weight, self.lora_B.to(weight.dtype), self.lora_A.to(weight.dtype), alpha=self.scaling)}


class LoraEmbedding(Part):
    """LoRA beside an embedding: row ``i`` moves by ``scaling * B A[:, i]``.

    Attributes:
        lora_A: ``(r, num_embeddings)``.
        lora_B: ``(embedding_dim, r)``.
        scaling: the factor of the update, without the embedding's own.
    """

    def __init__(self, config: LoraConfig, path: str, layer: Layer, host: nn.Module) -> None:
        super().__init__()
        rank = config.rank(path)
        self.scaling = config.scaling(path)
        self.lora_A = nn.Parameter(torch.zeros(rank, layer.in_features))
        self.lora_B = nn.Parameter(torch.empty(layer.out_features, rank))
        nn.init.normal_(self.lora_B)
        if config.init_lora_weights is False:
            nn.init.normal_(self.lora_A)
        self.row_scale = row_scale(host)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the update of the looked-up rows.

        Args:
            x: indices, ``(*batch)``.
            y: the embedding's output, ``(*batch, embedding_dim)``.

        Returns:
            ``y`` plus the update, scaled as the embedding scales its rows.
        """
        return add_scaled(y, self._rows(x, y), self.lora_B, self.scaling * self.row_scale)

    def forward_(self, x: Tensor, y: Tensor) -> Tensor:
        """`forward`, written into ``y``."""
        return add_scaled_(y, self._rows(x, y), self.lora_B, self.scaling * self.row_scale)

    def _rows(self, x: Tensor, y: Tensor) -> Tensor:
        """The looked-up columns of A, ``(*batch, r)``."""
        return F.embedding(x, self.lora_A.T.to(y.dtype))

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The two matrices under the names that embeddings have in files."""
        return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}

    def merged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``W + scaling * (B A)^T``, the rows' own scale being applied by the embedding."""
        weight = tensors["weight"]
        a, b = self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype)
        return {"weight": torch.addmm(weight, a.T, b.T, alpha=self.scaling)}


def add_scaled(y: Tensor, u: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``y + scaling * u b^T`` in one pass over ``y``.

    Args:
        y: ``(*batch, out_features)``.
        u: ``(*batch, r)``.
        b: ``(out_features, r)``, in any dtype.
        scaling: a number.

    Returns:
        A new tensor like ``y``.
    """
    if u.dtype != y.dtype:
        return y + (scaling * F.linear(u, b.to(u.dtype))).to(y.dtype)
    # one pass over y: the product is added as it is made
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), u.reshape(-1, u.shape[-1]), b.to(u.dtype).T, alpha=scaling)
    return flat.view(y.shape)


def add_scaled_(y: Tensor, u: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`add_scaled` into ``y`` itself where that is one operation on it: no copy, and no second tensor of its size."""
    if u.dtype != y.dtype or y.dim() not in (2, 3):
        return add_scaled(y, u, b, scaling)
    b_T = b.to(u.dtype).T
    if y.dim() == 2:
        return y.addmm_(u, b_T, alpha=scaling)
    # not through a view of two dimensions: autograd would copy every gradient of y on its way back
    return y.baddbmm_(u, b_T.expand(y.shape[0], -1, -1), alpha=scaling)


@method(
    "lora",
    title="LoRA",
    peft_type="LORA",
    config=LoraConfig,
    layers={"linear", "transposed-linear", "embedding"},
    default_roles=(QUERY, VALUE, KEY_VALUE, FUSED),
    inert=True,
    mergeable=True,
    source="Hu et al. 2021, https://arxiv.org/abs/2106.09685",
)
def lora_part(config: LoraConfig, path: str, layer: Layer, host: nn.Module) -> Part:
    """The part for one layer."""
    if layer.kind == "embedding":
        return LoraEmbedding(config, path, layer, host)
    return LoraLinear(config, path, layer)
