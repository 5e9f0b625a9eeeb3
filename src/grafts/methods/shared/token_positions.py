"""Parts that observe which tokens a call has, for methods that count or average over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from grafts.errors import StateError
from grafts.methods._registry import Place
from grafts.sites.input import TokenObserver
from grafts.sites.site import Part
from grafts.structure.view import ModelView


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
        """Remember what the present call is made of, until the next one; the arguments are those of
        `TokenObserver`.
        """
        self.number = number
        self.left = left
        self.past = past


def observer_places(view: ModelView, candidates: Sequence[Place]) -> list[Place]:
    """The inputs of those stacks of layers that say which tokens are real.

    Args:
        view: the model, with its residual stream.
        candidates: the places that all layers of the model would be.
    """
    assert view.stream is not None
    places = []
    for place in candidates:
        if place.layer.kind != "input":
            continue
        if any(is_inside(layer.path, place.path) for layer in view.stream.layers):
            places.append(place)
    return places


def counter_around(path: str, parts: Mapping[str, Part]) -> TokenCounter | None:
    """The counter of the innermost stack around a module; None where there is none."""
    # Stacks may lie in each other (a base model and its decoder), and the innermost one was told last.
    innermost, counter = "", None
    for owner, part in parts.items():
        if isinstance(part, TokenCounter) and is_inside(path, owner) and len(owner) >= len(innermost):
            innermost, counter = owner, part
    return counter


def is_inside(path: str, owner: str) -> bool:
    """Whether a module lies in another one; everything lies in the root."""
    return owner == "" or path.startswith(f"{owner}.")
