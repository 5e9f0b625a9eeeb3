"""What a cache with virtual tokens says of its length: with them to the model, and without them to everyone
else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grafts.errors import StateError
from grafts.sites.arguments import versions
from grafts.sites.virtual_positions import PromptLayout


class CacheView:
    """What a cache says of its length: with virtual tokens to the model, while it runs, and without them to
    everyone else.

    It answers for two of the cache's methods, as attributes of the cache, and is copied and pickled with it.
    """

    def __init__(self, cache: Any, room: PromptLayout) -> None:
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
        """Forget the last ``-max_length`` tokens; in older versions, where it may be positive, all but the
        first.
        """
        return type(self.cache).crop(
            self.cache, max_length + self.view.room.count if max_length > 0 else max_length
        )


def forget_view(cache: Any) -> None:
    """Let a cache answer for itself again."""
    for name in ("get_seq_length", "crop"):
        cache.__dict__.pop(name, None)


def enlarge_cache(cache: Any, count: int, window: int | None) -> None:
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
            min(layer.max_cache_len + more, max(window, layer.max_cache_len))
            if slides
            else layer.max_cache_len + more
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
                f"the tokens of this call go to position {begin}, and it carries no cache that is "
                "recognised: give the cache of the tokens before, or, if the model keeps it to itself, call "
                f"it with use_cache=False ({versions()})"
            )
        return begin + view.room.count if begin and view is not None else begin
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if length is None:
        raise StateError(
            f"a {type(cache).__name__} does not say how many tokens it holds, and the acting adapters have "
            f"to know: call the model with use_cache=False ({versions()})"
        )
    return int(length)
