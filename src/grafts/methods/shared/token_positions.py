"""Parts that hear which tokens a call has, for methods that count or average over them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grafts.errors import StateError
from grafts.methods._registry import Place
from grafts.sites.input import TokenObserver
from grafts.structure.residual_stream import Stream


class WholeInput(TokenObserver):
    """Refuses a call that does not see all tokens at once, for gates that are averaged over them."""

    def observe(self, number: Tensor, left: Tensor, past: int) -> None:
        """Refuse a cache that holds tokens.

        Raises:
            StateError: saying so.
        """
        if past:
            raise StateError(
                "a gate that is averaged over the tokens needs all of them at once: generate with "
                "use_cache=False"
            )


class TokenCounter(TokenObserver):
    """Knows of each position of the present call which token of its row it is.

    Attributes:
        number: among the real tokens of the row, ``(batch, positions)``; -1 for others. None before the first
            call.
        left: how many come after it, or -1.
        past: how many tokens the cache holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number: Tensor | None = None
        self.left: Tensor | None = None
        self.past = 0

    def observe(self, number: Tensor, left: Tensor, past: int) -> None:
        """Remember."""
        self.number, self.left, self.past = number, left, past


def observer_places(stream: Stream, candidates: Sequence[Place]) -> list[Place]:
    """The inputs of those stacks of layers that say which tokens are real."""
    inputs = [place for place in candidates if place.layer.kind == "input"]
    layers = [layer.path for layer in stream.layers]
    return [place for place in inputs if any(inside(path, place.path) for path in layers)]


def inside(path: str, owner: str) -> bool:
    """Whether a module lies in another one; everything lies in the root."""
    return not owner or path.startswith(f"{owner}.")
