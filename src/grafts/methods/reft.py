"""ReFT: interventions on the hidden states of a few positions (Wu et al. 2024,
https://arxiv.org/abs/2404.03592).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, config, option
from grafts.errors import ConfigError
from grafts.methods._registry import Place, method, stream_place
from grafts.methods.shared.activations import activation, is_activation
from grafts.methods.shared.seeding import seeded
from grafts.methods.shared.token_positions import TokenCounter, counter_around, observer_places
from grafts.methods.shared.weighted_average import averaged
from grafts.sites.module import ModulePart
from grafts.sites.site import Part, Reference
from grafts.structure.residual_stream import LAYER, require_width
from grafts.structure.view import ModelView


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
        are_numbers = isinstance(self.layers, tuple) and all(isinstance(i, int) for i in self.layers)
        self.require("layers", self.layers == "all" or are_numbers, "'all' or a list of numbers")
        self.require("r", isinstance(self.r, int) and self.r > 0, "a whole number above 0")
        for name in ("prefix_positions", "suffix_positions"):
            value = getattr(self, name)
            self.require(name, isinstance(value, int) and value >= 0, "a whole number, 0 or more")
        changes_some = self.prefix_positions + self.suffix_positions > 0
        self.require(
            "prefix_positions", changes_some, "above 0 where suffix_positions is 0: else nothing is changed"
        )
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
        if self.projection.is_meta:
            return
        if self.orthogonal:
            nn.init.orthogonal_(self.projection)
        else:
            nn.init.kaiming_uniform_(self.projection, a=5**0.5)

    def rotation(self) -> Tensor:
        """R, ``(r, hidden)``; of a matrix M its Q in ``M = L Q``, which no scaling of M changes."""
        if not self.orthogonal:
            return self.projection
        q, r = torch.linalg.qr(self.projection.T)
        # The decomposition is unique where the diagonal of L is positive.
        signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
        rotation: Tensor = (q * signs).T
        return rotation

    def forward(self, h: Tensor) -> Tensor:
        """Change hidden states.

        Args:
            h: ``(*batch, hidden)``.

        Returns:
            ``h + R^T (act(W h + b) - R h)``  (Wu et al. 2024, eq. 2), ``(*batch, hidden)``.
        """
        rotation = self.rotation().to(h.dtype)
        weight, bias = self.learned_source.weight.to(h.dtype), self.learned_source.bias.to(h.dtype)
        source = self.act(nn.functional.linear(h, weight, bias))
        if self.subtract:
            source = source - h @ rotation.T
        return nn.functional.dropout(h + source @ rotation, self.dropout, self.training)


class ReftPart(ModulePart):
    """The interventions behind one layer.

    Attributes:
        units: for the first tokens and the last ones; one for both where they are tied, or only one is
            wanted.
    """

    def __init__(self, config: ReftConfig, place: Place) -> None:
        super().__init__()
        self.config, self.path = config, place.path
        self.width = size = place.layer.out_features
        if config.orthogonality and config.r > size:
            raise ConfigError(
                f"{place.path!r}: r={config.r} orthonormal rows cannot be had in {size} dimensions"
            )
        names = ["both"]
        if not config.tied_weights:
            names = []
            for kind, count in _counts(config).items():
                if count > 0:
                    names.append(kind)
        with seeded(config.init_weights_seed, place.number):
            self.units = nn.ModuleDict({name: Intervention(config, size) for name in names})
        self._counter: Reference[TokenCounter] | None = None

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Find what counts the layer's tokens."""
        counter = counter_around(self.path, parts)
        if counter is not None:
            self._counter = Reference(counter)

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
        more_dimensions = [1] * (y.dim() - 2)
        for kind, is_chosen in self._positions(y).items():
            # Every row gets as many positions as one can have; those that it has not are changed by nothing.
            count = min(_counts(self.config)[kind], y.shape[1])
            has_position, index = is_chosen.to(torch.long).topk(count, dim=1)
            index = index.view(*index.shape, *more_dimensions).expand(-1, -1, *y.shape[2:])
            states = y.gather(1, index)
            unit = self.units["both" if self.config.tied_weights else kind]
            change = unit(states) - states
            has_position = has_position.view(*has_position.shape, *more_dimensions).to(change.dtype)
            result = result.scatter_add(1, index, change * has_position)
        return result

    def _positions(self, y: Tensor) -> dict[str, Tensor]:
        """Which positions are first and which are last tokens of their rows, ``(batch, positions)`` each;
        none is both.
        """
        number, left, past = self._numbers(y)
        counts = _counts(self.config)
        is_first = (number >= 0) & (number < counts["prefix"])
        is_last = (left >= 0) & (left < counts["suffix"])
        positions = {"prefix": is_first}
        if past == 0:  # a generated token is none of the last ones of the input
            positions = {"prefix": is_first & ~is_last, "suffix": is_last}
        result = {}
        for kind, chosen in positions.items():
            if counts[kind] > 0:
                result[kind] = chosen
        return result

    def _numbers(self, y: Tensor) -> tuple[Tensor, Tensor, int]:
        """Which token of its row each position is, and how many come after it, ``(batch, positions)`` each,
        and how many tokens came before this call.
        """
        batch, positions = y.shape[0], y.shape[1]
        number = left = None
        past = 0
        if self._counter is not None:
            counter = self._counter.module
            number, left, past = counter.number, counter.left, counter.past
        if number is None or left is None or number.shape[1] != positions:
            # The model does not say which tokens are real: all of them.
            number = torch.arange(positions, device=y.device).expand(batch, -1)
            left = positions - 1 - number
        if number.shape[0] != batch:  # beams of one row lie side by side
            copies = batch // number.shape[0]
            number, left = number.repeat_interleave(copies, 0), left.repeat_interleave(copies, 0)
        return number.to(y.device), left.to(y.device), past


def _counts(config: ReftConfig) -> dict[str, int]:
    """How many first and how many last tokens are changed."""
    return {"prefix": config.prefix_positions, "suffix": config.suffix_positions}


def places(config: ReftConfig, view: ModelView, candidates: Sequence[Place]) -> list[Place]:
    """The layers, and the inputs that say which tokens are real."""
    stream = view.stream
    assert stream is not None
    if not isinstance(config.layers, str):
        stream.require_layers(config.layers, "layers")
    result = []
    for layer in stream.layers:
        if config.layers == "all" or layer.number in config.layers:
            result.append(stream_place(view, layer.path, LAYER, layer.width, number=layer.number))
    return [*result, *observer_places(view, candidates)]


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
    places=places,
)
def reft_part(config: ReftConfig, place: Place) -> Part:
    """The part behind one layer, or what counts the tokens."""
    if place.role == LAYER:
        return ReftPart(config, place)
    return TokenCounter()
