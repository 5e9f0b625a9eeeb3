"""ReFT: interventions on the hidden states of a few positions (Wu et al. 2024,
https://arxiv.org/abs/2404.03592).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, config, option
from grafts.errors import ConfigError
from grafts.methods._registry import Parts, Place, method
from grafts.methods.shared.activations import activation, is_activation
from grafts.methods.shared.seeding import seeded
from grafts.methods.shared.token_positions import TokenCounter, inside, observer_places
from grafts.methods.shared.weighted_average import averaged
from grafts.modules.layers import Layer
from grafts.sites.module import ModulePart
from grafts.sites.site import Part
from grafts.structure.residual_stream import LAYER, Stream, require_width


@config
class ReftConfig(AdapterConfig):
    """What a ReFT adapter is: ``h + R^T (W h + b - R h)`` on the first and last tokens behind each layer.

    LoReFT has orthonormal rows of R (eq. 2); NoReFT has not (``orthogonality=False``); DiReFT leaves R h out
    as well (``subtract_projection=False``, eq. 3).

    >>> ReftConfig(r=4, layers=(0, 2)).prefix_positions
    3
    """

    layers: str | tuple[int, ...] = option(
        "all", "Behind which layers, counted over the whole model; or 'all'."
    )
    prefix_positions: int = option(3, "How many of the first tokens of each row.")
    suffix_positions: int = option(
        0, "How many of the last tokens of the input; generated ones are none of them."
    )
    r: int = option(1, "The rank.")
    orthogonality: bool = option(True, "The rows of R are orthonormal, and stay so whatever training does.")
    subtract_projection: bool = option(True, "Subtract R h.")
    tied_weights: bool = option(False, "One intervention for first and last tokens.")
    dropout: float = option(0.05, "Dropout of the changed states.")
    non_linearity: str | None = option(None, "An activation of W h + b, by its name in `transformers`.")
    init_weights_seed: int | None = option(
        None, "Start from this seed; PyTorch's own random numbers are left alone."
    )

    peft_type: ClassVar[str] = "REFT"

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        known = self.layers == "all" or (
            isinstance(self.layers, tuple) and all(isinstance(i, int) for i in self.layers)
        )
        self.require("layers", known, "'all' or a list of numbers")
        self.require("r", isinstance(self.r, int) and self.r > 0, "a whole number above 0")
        for name in ("prefix_positions", "suffix_positions"):
            value = getattr(self, name)
            self.require(name, isinstance(value, int) and value >= 0, "a whole number, 0 or more")
        some = self.prefix_positions + self.suffix_positions > 0
        self.require("prefix_positions", some, "above 0 where suffix_positions is 0: else nothing is changed")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self.require(
            "non_linearity", is_activation(self.non_linearity), "an activation of transformers, or None"
        )


class Intervention(nn.Module):
    """One intervention.

    Attributes:
        learned_source: W and b, ``(r, hidden)`` and ``(r,)``.
        projection: R, ``(r, hidden)``; where it is to be orthonormal, any matrix with the same row space, of
            which R is made.
    """

    def __init__(self, config: ReftConfig, size: int) -> None:
        super().__init__()
        self.orthogonal, self.subtract = config.orthogonality, config.subtract_projection
        self.act = activation(config.non_linearity)
        self.dropout = config.dropout
        self.learned_source = nn.Linear(size, config.r)
        self.projection = nn.Parameter(torch.empty(config.r, size))
        if not self.projection.is_meta:
            nn.init.orthogonal_(self.projection) if self.orthogonal else nn.init.kaiming_uniform_(
                self.projection, a=5**0.5
            )

    def rotation(self) -> Tensor:
        """R, ``(r, hidden)``; of a matrix M its Q in ``M = L Q``, which no scaling of M changes."""
        if not self.orthogonal:
            return self.projection
        q, r = torch.linalg.qr(self.projection.T)
        rotation: Tensor = (q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)).T
        return rotation

    def forward(self, h: Tensor) -> Tensor:
        """Change hidden states.

        Args:
            h: ``(*batch, hidden)``.

        Returns:
            ``h + R^T (act(W h + b) - R h)``  (Wu et al. 2024, eq. 2), ``(*batch, hidden)``.
        """
        rotation = self.rotation().to(h.dtype)
        source = self.act(
            nn.functional.linear(
                h, self.learned_source.weight.to(h.dtype), self.learned_source.bias.to(h.dtype)
            )
        )
        if self.subtract:
            source = source - h @ rotation.T
        return nn.functional.dropout(h + source @ rotation, self.dropout, self.training)


class ReftPart(ModulePart):
    """The interventions behind one layer.

    Attributes:
        units: for the first tokens and the last ones; one for both where they are tied, or only one is
            wanted.
        counter: what knows the tokens of the present call; none where the model does not say which are real.
    """

    def __init__(self, config: ReftConfig, place: Place) -> None:
        super().__init__()
        self.config, self.path = config, place.path
        self.width = size = place.layer.out_features
        if config.orthogonality and config.r > size:
            raise ConfigError(
                f"{place.path!r}: r={config.r} orthonormal rows cannot be had in {size} dimensions"
            )
        wanted = [kind for kind, count in _counts(config).items() if count]
        names = ["both"] if config.tied_weights else wanted
        with seeded(config.init_weights_seed, place.number):
            self.units = nn.ModuleDict({name: Intervention(config, size) for name in names})
        self.counter: tuple[TokenCounter, ...] = ()

    def forward(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """Change the states of the first and the last tokens.

        Args:
            x: the layer's input.
            y: its output, ``(batch, positions, hidden)``.
            base: not needed.

        Returns:
            The same, those positions changed.
        """
        require_width(y, self.width, self.path)
        result = y
        for kind, chosen in self._positions(y).items():
            count = min(_counts(self.config)[kind], y.shape[1])
            there, index = chosen.to(torch.long).topk(count, dim=1)
            wide = index.view(*index.shape, *[1] * (y.dim() - 2)).expand(-1, -1, *y.shape[2:])
            states = y.gather(1, wide)
            changed = self.units["both" if self.config.tied_weights else kind](states) - states
            really = there.view(wide.shape[0], -1, *[1] * (y.dim() - 2)).to(changed.dtype)
            result = result.scatter_add(1, wide, changed * really)
        return result

    def _positions(self, y: Tensor) -> dict[str, Tensor]:
        """Which positions are first and which are last tokens of their rows, ``(batch, positions)`` each;
        none is both.
        """
        heard = self.counter[0] if self.counter else None
        number, left = (None, None) if heard is None else (heard.number, heard.left)
        if (
            number is None or left is None or number.shape[1] != y.shape[1]
        ):  # the model does not say which tokens are real
            number = torch.arange(y.shape[1], device=y.device).expand(y.shape[0], -1)
            left = y.shape[1] - 1 - number
        if number.shape[0] != y.shape[0]:  # beams of one row side by side
            number, left = (x.repeat_interleave(y.shape[0] // number.shape[0], 0) for x in (number, left))
        counts, number, left = _counts(self.config), number.to(y.device), left.to(y.device)
        last = (left >= 0) & (left < counts["suffix"])
        chosen = {"prefix": (number >= 0) & (number < counts["prefix"])}
        if heard is None or not heard.past:  # a generated token is none of the last ones of the input
            chosen = {"prefix": chosen["prefix"] & ~last, "suffix": last}
        return {kind: positions for kind, positions in chosen.items() if counts[kind]}


def _counts(config: ReftConfig) -> dict[str, int]:
    return {"prefix": config.prefix_positions, "suffix": config.suffix_positions}


def stream_places(
    config: ReftConfig, stream: Stream, module: Callable[[str], nn.Module], candidates: Sequence[Place]
) -> list[Place]:
    """The layers, and the inputs that say which tokens are real."""
    stream.require_layers(() if isinstance(config.layers, str) else config.layers, "layers")
    result = []
    for layer in stream.layers:
        if config.layers == "all" or layer.number in config.layers:
            size = Layer("stream", layer.width, layer.width, False, type(module(layer.path)).__name__)
            result.append(Place(layer.path, size, LAYER, module(layer.path), None, layer.number))
    return [*result, *observer_places(stream, candidates)]


def link(config: ReftConfig, parts: Parts) -> None:
    """Let each layer find what counts its tokens."""
    counters = {path: part for path, part in parts.items() if isinstance(part, TokenCounter)}
    for path, part in parts.items():
        around = sorted((owner for owner in counters if inside(path, owner)), key=len)
        if isinstance(part, ReftPart) and around:
            part.counter = (counters[around[-1]],)


@method(
    "reft",
    title="ReFT",
    config=ReftConfig,
    layers={"stream"},
    default_roles=(),
    inert=False,
    mergeable=False,
    source="Wu et al. 2024, https://arxiv.org/abs/2404.03592",
    combinations=("linear",),
    combine=averaged,
    places=stream_places,
    attached=link,
)
def reft_part(config: ReftConfig, place: Place) -> Part:
    """The part behind one layer, or what counts the tokens."""
    return ReftPart(config, place) if place.role == LAYER else TokenCounter()
