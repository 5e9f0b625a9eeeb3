"""Invertible adapters after the embeddings, undone before the head (Pfeiffer et al. 2020, arXiv:2005.00052,
section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, config, option
from grafts.errors import ConfigError
from grafts.methods._registry import Parts, Place, method
from grafts.methods.shared.activations import activation, is_activation
from grafts.methods.shared.weighted_average import averaged
from grafts.modules.layers import Layer
from grafts.sites.module import ModulePart
from grafts.structure.residual_stream import BEGIN, END, Stream, require_width
from grafts.structure.roles import HEAD

BLOCKS = ("nice", "glow")


@config
class InvertibleConfig(AdapterConfig):
    """What an invertible adapter is: a coupling block after the embeddings, and its inverse before the
    language model's head.

    >>> InvertibleConfig(block="glow").reduction_factor
    2
    """

    block: str = option(
        "nice",
        "Additive coupling (nice, Dinh et al. 2014) or affine coupling (glow, Kingma & Dhariwal 2018).",
    )
    reduction_factor: float = option(2, "Half of the hidden size divided by the size inside.")
    non_linearity: str | None = option("relu", "The activation, by its name in `transformers`.")

    peft_type: ClassVar[str] = "INVERTIBLE"

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        self.require("block", self.block in BLOCKS, f"one of {', '.join(BLOCKS)}")
        number = isinstance(self.reduction_factor, (int, float)) and self.reduction_factor > 0
        self.require("reduction_factor", number, "a number above 0")
        self.require(
            "non_linearity", is_activation(self.non_linearity), "an activation of transformers, or None"
        )


class Network(nn.Module):
    """Two linears with an activation between them.

    Attributes:
        first: ``(inner, inputs)``.
        last: ``(outputs, inner)``.
    """

    def __init__(self, inputs: int, outputs: int, inner: int, non_linearity: str | None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, inner), nn.Linear(inner, outputs)
        self.act = activation(non_linearity)
        for linear in (self.first, self.last):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(*batch, inputs)`` -> ``(*batch, outputs)``."""
        hidden = self.act(nn.functional.linear(x, self.first.weight.to(x.dtype), self.first.bias.to(x.dtype)))
        return nn.functional.linear(hidden, self.last.weight.to(x.dtype), self.last.bias.to(x.dtype))


class Nice(nn.Module):
    """Additive coupling (Dinh et al. 2014, eq. 4): ``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)``."""

    def __init__(self, size: int, factor: float, non_linearity: str | None) -> None:
        super().__init__()
        self.sizes = [size // 2, size - size // 2]
        one, two = self.sizes
        self.F = Network(two, one, max(int(two // factor), 1), non_linearity)
        self.G = Network(one, two, max(int(one // factor), 1), non_linearity)

    def forward(self, x: Tensor) -> Tensor:
        """``(*batch, size)`` -> ``(*batch, size)``."""
        x1, x2 = torch.split(x, self.sizes, -1)
        y1 = x1 + self.F(x2)
        return torch.cat([y1, x2 + self.G(y1)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        """What `forward` was given."""
        y1, y2 = torch.split(y, self.sizes, -1)
        x2 = y2 - self.G(y1)
        return torch.cat([y1 - self.F(x2), x2], -1)


class Glow(nn.Module):
    """Affine coupling (Kingma & Dhariwal 2018, table 1), its scales between exp(-5) and exp(5) (Ardizzone et
    al. 2019).
    """

    clamp = 5.0

    def __init__(self, size: int, factor: float, non_linearity: str | None) -> None:
        super().__init__()
        self.sizes = [size // 2, size - size // 2]
        one, two = self.sizes
        self.s1 = Network(one, 2 * two, max(int(one // factor), 1), non_linearity)
        self.s2 = Network(two, 2 * one, max(int(two // factor), 1), non_linearity)

    def _scale(self, s: Tensor) -> Tensor:
        return torch.exp(self.clamp * 2 / math.pi * torch.atan(s / self.clamp))

    def forward(self, x: Tensor) -> Tensor:
        """``(*batch, size)`` -> ``(*batch, size)``."""
        x1, x2 = torch.split(x, self.sizes, -1)
        s, t = self.s2(x2).chunk(2, -1)
        y1 = self._scale(s) * x1 + t
        s, t = self.s1(y1).chunk(2, -1)
        return torch.cat([y1, self._scale(s) * x2 + t], -1)

    def inverse(self, y: Tensor) -> Tensor:
        """What `forward` was given."""
        y1, y2 = torch.split(y, self.sizes, -1)
        s, t = self.s1(y1).chunk(2, -1)
        x2 = (y2 - t) / self._scale(s)
        s, t = self.s2(x2).chunk(2, -1)
        return torch.cat([(y1 - t) / self._scale(s), x2], -1)


class CouplingPart(ModulePart):
    """The coupling block after the embeddings; before the head its inverse, with the same tensors.

    Attributes:
        block: the coupling, or None before the head.
        source: the part that has it.
    """

    def __init__(self, block: str, factor: float, non_linearity: str | None, place: Place) -> None:
        super().__init__()
        self.path = place.path
        self.when = "before" if place.role == END else "after"
        size = place.layer.out_features
        self.block: Nice | Glow | None = None
        if place.role == BEGIN:
            self.block = (Nice if block == "nice" else Glow)(size, factor, non_linearity)
        self.source: tuple[CouplingPart, ...] = (self,)

    def forward(self, x: Tensor, *y: Tensor) -> Tensor:
        """The embeddings through the block, or the head's input through its inverse, ``(*batch, size)``."""
        block = self.source[0].block
        assert block is not None
        require_width(y[0] if y else x, sum(block.sizes), self.path)
        result: Tensor = block(y[0]) if y else block.inverse(x)
        return result


def coupling_places(
    stream: Stream, module: Callable[[str], nn.Module], candidates: Sequence[Place]
) -> list[Place]:
    """The embeddings, and the head that gives tokens from hidden states of their size, if there is one.

    Raises:
        ConfigError: the interface names no embeddings.
    """
    if stream.embeddings is None:
        raise ConfigError("an invertible adapter needs model_embeddings, which the interface does not give")
    first = next((place.layer for place in candidates if place.path == stream.embeddings), None)
    size = first.out_features if first is not None else stream.layers[0].width
    rows = first.in_features if first is not None and first.kind == "embedding" else None
    heads = [
        place for place in candidates if place.role == HEAD and place.layer.is_linear and rows is not None
    ]
    heads = [place for place in heads if place.layer.in_features == size and place.layer.out_features == rows]
    layer = Layer("stream", size, size, False, type(module(stream.embeddings)).__name__)
    result = [Place(stream.embeddings, layer, BEGIN, module(stream.embeddings))]
    for head in heads:
        result.append(
            Place(head.path, Layer("stream", size, size, False, head.layer.class_name), END, head.host)
        )
    return result


def link_couplings(parts: Parts) -> None:
    """Let the head's part find the block."""
    own = [part for part in parts.values() if isinstance(part, CouplingPart)]
    first = next((part for part in own if part.block is not None), None)
    for part in own if first is not None else ():
        part.source = (first,)  # type: ignore[assignment]


def _places(
    config: InvertibleConfig, stream: Stream, module: Callable[[str], nn.Module], candidates: Sequence[Place]
) -> list[Place]:
    return coupling_places(stream, module, candidates)


@method(
    "invertible",
    title="Invertible adapter",
    config=InvertibleConfig,
    layers={"stream"},
    default_roles=(),
    inert=False,
    mergeable=False,
    source="Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052",
    combinations=("linear",),
    combine=averaged,
    places=_places,
    attached=lambda config, parts: link_couplings(parts),
)
def invertible_part(config: InvertibleConfig, place: Place) -> CouplingPart:
    """The part after the embeddings, or before the head."""
    return CouplingPart(config.block, config.reduction_factor, config.non_linearity, place)
