"""What a cache with virtual tokens says of its length: with them to the model, and without them to everyone
else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grafts.errors import StateError
from grafts.sites.arguments import versions
from grafts.sites.prompt_layout import PromptLayout


class CacheView:
    """What a cache says of its length: with virtual tokens to the model, while it runs, and without them to
    everyone else.

    It answers for two of the cache's methods, as attributes of the cache, and is copied and pickled with it.

    Attributes:
        layout: what the virtual tokens take up in it.
        inside: whether it is the model that asks now.
    """

    def __init__(self, cache: Any, layout: PromptLayout) -> None:
        self.layout = layout
        self.inside = True
        # One by one, and as attributes: compilers before torch 2.9 cannot follow a change of ``__dict__``.
        cache.get_seq_length = _Length(cache, self)
        cache.crop = _Crop(cache, self)

    @staticmethod
    def of(cache: Any) -> CacheView | None:
        """The view of a cache, or None where it holds no virtual tokens.

        Args:
            cache: a cache of any class, or None.
        """
        if cache is None:
            return None
        answers = getattr(cache, "__dict__", {}).get("get_seq_length")
        if isinstance(answers, _Length):
            return answers.view
        return None


class _Length:
    """A cache's ``get_seq_length``."""

    def __init__(self, cache: Any, view: CacheView) -> None:
        self.cache = cache
        self.view = view

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The number of tokens in the cache."""
        length = type(self.cache).get_seq_length(self.cache, *args, **kwargs)
        if self.view.inside:
            return length
        tokens = length - self.view.layout.count
        if isinstance(tokens, Tensor):
            return tokens.clamp_min(0)
        return max(tokens, 0)


class _Crop:
    """A cache's ``crop``."""

    def __init__(self, cache: Any, view: CacheView) -> None:
        self.cache = cache
        self.view = view

    def __call__(self, max_length: int) -> Any:
        """Forget the last ``-max_length`` tokens; in older versions, where it may be positive, all but the
        first.
        """
        if max_length > 0:
            max_length += self.view.layout.count
        return type(self.cache).crop(self.cache, max_length)


def forget_view(cache: Any) -> None:
    """Let a cache answer for itself again: the inverse of making a `CacheView` of it.

    Args:
        cache: one that has a view, or had one.
    """
    for name in ("get_seq_length", "crop"):
        cache.__dict__.pop(name, None)


# The name under which a static cache says for how many virtual tokens it was enlarged.
_ENLARGED_BY = "grafts_enlarged_by"


def enlarge_cache(cache: Any, count: int, window: int | None) -> None:
    """Enlarge an empty static cache, which was made for the tokens alone, by ``count`` positions.

    Args:
        cache: the cache, or None.
        count: how many virtual tokens come.
        window: of the model's attention, beyond which layers that slide need no more; None where it has none.
    """
    # Of an encoder-decoder the decoder's own.
    own_cache = getattr(cache, "self_attention_cache", cache)
    layers = [layer for layer in getattr(own_cache, "layers", ()) if hasattr(layer, "max_cache_len")]
    # A cache that is emptied and used again was enlarged already.
    more = count - getattr(cache, "__dict__", {}).get(_ENLARGED_BY, 0)
    if not layers or more <= 0:
        return
    for layer in layers:
        enlarged = layer.max_cache_len + more
        if getattr(layer, "is_sliding", False) and window is not None:
            enlarged = min(enlarged, max(window, layer.max_cache_len))
        layer.max_cache_len = enlarged
        layer.is_initialized = False
    cache.__dict__[_ENLARGED_BY] = count


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
        return _past_by_position(cache, int(position[0]), view)
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if length is None:
        raise StateError(
            f"a {type(cache).__name__} does not say how many tokens it holds, and the acting adapters have "
            f"to know: call the model with use_cache=False ({versions()})"
        )
    return int(length)


def _past_by_position(cache: Any, begin: int, view: CacheView | None) -> int:
    """How many positions a cache holds, where the call says to which one its first token goes.

    Older static caches cannot count padding, so callers count tokens, and know nothing of virtual ones.

    Raises:
        StateError: there are tokens before, and no cache that is known.
    """
    if begin == 0:
        return 0
    if cache is None:
        raise StateError(
            f"the tokens of this call go to position {begin}, and it carries no cache that is "
            "recognised: give the cache of the tokens before, or, if the model keeps it to itself, call "
            f"it with use_cache=False ({versions()})"
        )
    if view is not None:
        return begin + view.layout.count
    return begin
