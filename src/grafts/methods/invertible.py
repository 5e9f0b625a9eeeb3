"""Invertible adapters after the embeddings, undone before the head (Pfeiffer et al. 2020, arXiv:2005.00052,
section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, config, option
from grafts.errors import ConfigError
from grafts.methods._registry import Place, method, stream_place
from grafts.methods.shared.activations import activation, is_activation
from grafts.methods.shared.weighted_average import averaged
from grafts.sites.module import ModulePart
from grafts.sites.site import Part, Reference
from grafts.structure.residual_stream import BEGIN, END, require_width
from grafts.structure.roles import HEAD
from grafts.structure.view import ModelView

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
        is_number = isinstance(self.reduction_factor, (int, float)) and self.reduction_factor > 0
        self.require("reduction_factor", is_number, "a number above 0")
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
        # Of an odd size the second half is the larger one.
        self.sizes: list[int] = [size // 2, size - size // 2]
        first, second = self.sizes
        self.F = Network(second, first, max(int(second // factor), 1), non_linearity)
        self.G = Network(first, second, max(int(first // factor), 1), non_linearity)

    def forward(self, x: Tensor) -> Tensor:
        """The states through the coupling, half by half.

        Args:
            x: ``(*batch, size)``.

        Returns:
            ``(*batch, size)``.
        """
        x1, x2 = torch.split(x, self.sizes, -1)
        y1 = x1 + self.F(x2)
        return torch.cat([y1, x2 + self.G(y1)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        """What `forward` was given, up to rounding: the steps undone in the other order.

        Args:
            y: what it gave, ``(*batch, size)``.
        """
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
        # Each network gives a scale and a shift for the other half.
        self.sizes: list[int] = [size // 2, size - size // 2]
        first, second = self.sizes
        self.s1 = Network(first, 2 * second, max(int(first // factor), 1), non_linearity)
        self.s2 = Network(second, 2 * first, max(int(second // factor), 1), non_linearity)

    def _scale(self, s: Tensor) -> Tensor:
        """A positive scale from any number, never far from 1."""
        return torch.exp(self.clamp * 2 / math.pi * torch.atan(s / self.clamp))

    def forward(self, x: Tensor) -> Tensor:
        """The states through the coupling, half by half.

        Args:
            x: ``(*batch, size)``.

        Returns:
            ``(*batch, size)``.
        """
        x1, x2 = torch.split(x, self.sizes, -1)
        s, t = self.s2(x2).chunk(2, -1)
        y1 = self._scale(s) * x1 + t
        s, t = self.s1(y1).chunk(2, -1)
        return torch.cat([y1, self._scale(s) * x2 + t], -1)

    def inverse(self, y: Tensor) -> Tensor:
        """What `forward` was given, up to rounding: the steps undone in the other order.

        Args:
            y: what it gave, ``(*batch, size)``.
        """
        y1, y2 = torch.split(y, self.sizes, -1)
        s, t = self.s1(y1).chunk(2, -1)
        x2 = (y2 - t) / self._scale(s)
        s, t = self.s2(x2).chunk(2, -1)
        return torch.cat([(y1 - t) / self._scale(s), x2], -1)


class CouplingPart(ModulePart):
    """The coupling block after the embeddings; before the head its inverse, with the same tensors.

    Attributes:
        block: the coupling, or None before the head.
    """

    def __init__(self, block: str, factor: float, non_linearity: str | None, place: Place) -> None:
        super().__init__()
        self.path = place.path
        self.when = "before" if place.role == END else "after"
        size = place.layer.out_features
        # The tensors are those of the part at the embeddings; the others refer to its block.
        self.block: Nice | Glow | None = None
        if place.role == BEGIN:
            kind = Nice if block == "nice" else Glow
            self.block = kind(size, factor, non_linearity)
        self._shared_block: Reference[Nice | Glow] | None = None

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Find the block: the head's part undoes that of the embeddings.

        Args:
            parts: those of the adapter, by path.
        """
        for part in parts.values():
            if isinstance(part, CouplingPart) and part.block is not None:
                self._shared_block = Reference(part.block)
                return

    def forward(self, x: Tensor, *y: Tensor) -> Tensor:
        """The embeddings through the block, or the head's input through its inverse, ``(*batch, size)``.

        Args:
            x: the input of the embeddings or of the head.
            y: the output of the embeddings; not given before the head.
        """
        assert self._shared_block is not None
        block = self._shared_block.module
        states = y[0] if y else x
        require_width(states, sum(block.sizes), self.path)
        result: Tensor
        if y:
            result = block(states)
        else:
            result = block.inverse(states)
        return result


def coupling_places(view: ModelView, candidates: Sequence[Place]) -> list[Place]:
    """The embeddings, and the heads that give tokens from hidden states of their size, if there are some.

    Args:
        view: the model, with its residual stream.
        candidates: the places that all layers of the model would be.

    Raises:
        ConfigError: the interface names no embeddings.
    """
    stream = view.stream
    assert stream is not None
    if stream.embeddings is None:
        raise ConfigError("an invertible adapter needs model_embeddings, which the interface does not give")
    embedding = view.layers.get(stream.embeddings)
    if embedding is None:
        size = stream.layers[0].width
    else:
        size = embedding.out_features
    places = [stream_place(view, stream.embeddings, BEGIN, size)]
    if embedding is None or embedding.kind != "embedding":
        return places
    for place in candidates:
        sizes = (place.layer.in_features, place.layer.out_features)
        gives_tokens = place.layer.is_linear and sizes == (size, embedding.in_features)
        if place.role == HEAD and gives_tokens:
            places.append(stream_place(view, place.path, END, size))
    return places


def places(config: InvertibleConfig, view: ModelView, candidates: Sequence[Place]) -> list[Place]:
    """The embeddings and the head."""
    return coupling_places(view, candidates)


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
    places=places,
)
def invertible_part(config: InvertibleConfig, place: Place) -> CouplingPart:
    """The part after the embeddings, or before the head."""
    return CouplingPart(config.block, config.reduction_factor, config.non_linearity, place)
