"""The residual stream of a model, as adapters see it: where it begins, its layers, and what reads and writes
it in each.

Pure data. An interface (`grafts.structure.interface`) is resolved to it, and the methods that stand on the
stream choose from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from grafts.errors import StateError, UnmatchedTargetError

SublayerKind = Literal["self", "cross", "ffn"]

# what a part is to do at its place on the stream: act on what is added, hear what it is added to, replace the
# norm of the sum
ADDED, RESIDUAL, NORMED = "added to the stream", "the stream before", "norm of the sum"
LAYER, BEGIN, END = "layer output", "stream begins", "stream ends"
OUTPUTS = (ADDED, LAYER, BEGIN, END)


def require_width(states: Tensor, width: int, what: str) -> None:
    """Refuse states of another size than was planned for.

    Args:
        states: ``(*batch, size)``.
        width: the size that was planned for.
        what: the module that gave them, for people.

    Raises:
        StateError: naming both sizes.
    """
    if states.shape[-1] != width:
        raise StateError(
            f"{what!r} gives states of size {states.shape[-1]}, and its adapter was made for {width}: "
            "the interface names a module whose output is not the stream's"
        )


@dataclass(frozen=True)
class Sublayer:
    """One step of a layer: ``stream + out(...)``, or ``norm(stream + out(...))``.

    Attributes:
        layer: the number of its layer among all layers of the model.
        kind: self-attention (or what mixes tokens in its place), cross-attention, or feed-forward.
        out: the path of the module whose output is added to the stream.
        before: the path of the module whose first input is the stream that it is added to; None where that is
            not known.
        norm: the path of the norm that the sum goes through, in models that norm after adding.
        width: the size of the stream.
    """

    layer: int
    kind: SublayerKind
    out: str
    before: str | None
    norm: str | None
    width: int


@dataclass(frozen=True)
class StreamLayer:
    """One layer.

    Attributes:
        number: among all layers of the model, in the order of their lists.
        path: its path; its output is the stream.
        width: the size of the stream behind it.
        sublayers: what is added to the stream in it, in order.
    """

    number: int
    path: str
    width: int
    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream of one model.

    Attributes:
        embeddings: the path of the module that makes the stream's beginning from tokens, or None.
        layers: all layers, those of an encoder first.
        roles: what modules are there for (see `grafts.structure.roles`), by path, as the interface says it.
    """

    embeddings: str | None
    layers: tuple[StreamLayer, ...]
    roles: Mapping[str, str]

    def require_layers(self, numbers: Iterable[int | str], option: str) -> None:
        """Refuse numbers of layers that there are not.

        Raises:
            UnmatchedTargetError: naming the first, and the option that it was given in.
        """
        for number in numbers:
            if not str(number).isdigit() or int(number) >= len(self.layers):
                raise UnmatchedTargetError(
                    f"{option} names layer {number!r}; there are {len(self.layers)}, counted from 0 over the "
                    f"whole model"
                )

    def sublayers(self) -> list[Sublayer]:
        """Those of all layers, in order."""
        return [sublayer for layer in self.layers for sublayer in layer.sublayers]
