"""What virtual tokens take up: places in a batch of sequences, and in a cache, which says its length without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grafts.errors import StateError
from grafts.sites.arguments import versions


@dataclass(frozen=True)
class Room:
    """What virtual tokens take up at the beginning of a batch of sequences.

    Rows that have fewer of them than others have empty positions, which nothing attends to.

    Attributes:
        count: how many positions.
        own: how many tokens each row has of its own at the beginning.
        lengths: how many virtual tokens each row has, ``(batch, 1)``; None where all have ``count``.
        after_first: they stand after the first token of each row.
        snug: they stand right before a row's first token that is no padding, where distances count (windows, relative
            positions); elsewhere before the padding, which comes to the same.
        gap_last: a row's empty positions come after its tokens (for a pooler that reads the first one), and not before.
        embedded: they come among what the embeddings have become, with positions and norms, and not among those of words.
    """

    count: int
    own: int
    lengths: Tensor | None
    after_first: bool
    snug: bool
    gap_last: bool
    embedded: bool = False

    @property
    def even(self) -> bool:
        """Whether the virtual tokens of all rows simply come first."""
        return self.lengths is None and not self.after_first and not self.snug

    def first(self, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Before which of a row's own tokens the virtual ones stand, ``(batch, 1)``."""
        if mask is None or not (self.after_first or self.snug):
            return torch.full((batch, 1), int(self.after_first), device=device)
        real = mask[:, : self.own].ne(0)
        # a row may begin with a chunk of nothing but padding: there the virtual tokens come last, right before its tokens
        first = torch.where(real.any(1, keepdim=True), real.to(torch.long).argmax(1, keepdim=True), self.own)
        return first + int(self.after_first)

    def _lead(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many virtual tokens each row has, and how many empty positions come first, ``(batch, 1)`` each."""
        lengths = torch.full((batch, 1), self.count, device=device) if self.lengths is None else self.lengths.to(device)
        return lengths, torch.zeros_like(lengths) if self.gap_last else self.count - lengths

    def inserted(self, own: Tensor, new: Tensor | None, first: Tensor) -> Tensor:
        """``own`` with what belongs to the virtual tokens among it.

        Args:
            own: what belongs to the tokens, ``(batch, tokens, ...)``; those after the beginning stay where they are.
            new: what belongs to the virtual tokens, ``(batch, count, ...)``, those of a row first; ones if not given.
            first: before which of a row's own tokens they stand, ``(batch, 1)``.

        Returns:
            ``(batch, count + tokens, ...)``, zeros at empty positions.
        """
        if new is None:
            new = torch.ones(own.shape[0], self.count, *own.shape[2:], dtype=own.dtype, device=own.device)
        if self.even:
            return torch.cat([new, own], 1)
        lengths, gap = self._lead(own.shape[0], own.device)
        place = torch.arange(self.count + self.own, device=own.device)[None] - gap
        empty = self.count + self.own
        index = torch.where(place < first, self.count + place, place - first)  # own tokens, or virtual ones
        index = torch.where(place >= first + lengths, self.count + place - lengths, index)
        index = torch.where((place < 0) | (place >= lengths + self.own), empty, index)
        both = torch.cat([new, own[:, : self.own], torch.zeros_like(own[:, :1])], 1)
        return torch.cat([taken(both, index), own[:, self.own :]], 1)

    def tokens(self, first: Tensor) -> Tensor:
        """Where a row's own tokens have gone, ``(batch, own)``."""
        lengths, gap = self._lead(first.shape[0], first.device)
        place = torch.arange(self.own, device=first.device)[None]
        return gap + torch.where(place < first, place, place + lengths)


def taken(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """The positions ``index`` ``(batch, n)`` of ``x`` along ``dim``."""
    shape = [index.shape[0], *[1] * (x.dim() - 1)]
    shape[dim] = index.shape[1]
    full = [index.shape[0], *x.shape[1:]]
    full[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(full))


class CacheView:
    """What a cache says of its length: with virtual tokens to the model, while it runs, and without them to everyone else.

    It answers for two of the cache's methods, as attributes of the cache, and is copied and pickled with it.
    """

    def __init__(self, cache: Any, room: Room) -> None:
        self.room, self.inside = room, True
        # one by one, and as attributes: compilers before torch 2.9 cannot follow a change of ``__dict__``
        cache.get_seq_length = _Length(cache, self)
        cache.crop = _Crop(cache, self)

    @staticmethod
    def of(cache: Any) -> CacheView | None:
        """The view of a cache, or None where it holds no virtual tokens."""
        answers = None if cache is None else getattr(cache, "__dict__", {}).get("get_seq_length")
        return answers.view if isinstance(answers, _Length) else None


class _Length:
    """A cache's ``get_seq_length``."""

    def __init__(self, cache: Any, view: CacheView) -> None:
        self.cache, self.view = cache, view

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The number of tokens in the cache."""
        length = type(self.cache).get_seq_length(self.cache, *args, **kwargs)
        if self.view.inside:
            return length
        less = length - self.view.room.count
        return less.clamp_min(0) if isinstance(less, Tensor) else max(less, 0)


class _Crop:
    """A cache's ``crop``."""

    def __init__(self, cache: Any, view: CacheView) -> None:
        self.cache, self.view = cache, view

    def __call__(self, max_length: int) -> Any:
        """Forget the last ``-max_length`` tokens; in older versions, where it may be positive, all but the first."""
        return type(self.cache).crop(self.cache, max_length + self.view.room.count if max_length > 0 else max_length)


def forget_view(cache: Any) -> None:
    """Let a cache answer for itself again."""
    for name in ("get_seq_length", "crop"):
        cache.__dict__.pop(name, None)


def make_room(cache: Any, count: int, window: int | None) -> None:
    """Enlarge an empty static cache, which was made for the tokens alone, by ``count`` positions.

    Args:
        cache: the cache, or None.
        count: how many virtual tokens come.
        window: of the model's attention, beyond which layers that slide need no room.
    """
    one = getattr(cache, "self_attention_cache", cache)
    layers = [layer for layer in getattr(one, "layers", ()) if hasattr(layer, "max_cache_len")]
    more = count - getattr(cache, "__dict__", {}).get("grafts_room", 0)
    if not layers or more <= 0:
        return
    for layer in layers:
        slides = getattr(layer, "is_sliding", False) and window is not None
        layer.max_cache_len = (
            min(layer.max_cache_len + more, max(window, layer.max_cache_len)) if slides else layer.max_cache_len + more
        )
        layer.is_initialized = False
    cache.__dict__["grafts_room"] = count


def past_of(cache: Any, position: Tensor | None, view: CacheView | None) -> int:
    """How many positions a cache holds, virtual tokens too.

    Args:
        cache: the cache, or None.
        position: where the call says that its tokens go in the cache, ``(tokens,)``, or None.
        view: of the cache, where it holds virtual tokens.

    Raises:
        StateError: it does not say, or there are tokens before and no cache that is known.
    """
    if position is not None:
        begin = int(position[0])  # older static caches cannot count padding; callers count tokens
        if begin and cache is None:
            raise StateError(
                f"the tokens of this call go to position {begin}, and it carries no cache that is recognised: give the cache "
                f"of the tokens before, or, if the model keeps it to itself, call it with use_cache=False ({versions()})"
            )
        return begin + view.room.count if begin and view is not None else begin
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if length is None:
        raise StateError(
            f"a {type(cache).__name__} does not say how many tokens it holds, and the acting adapters have to know: "
            f"call the model with use_cache=False ({versions()})"
        )
    return int(length)
