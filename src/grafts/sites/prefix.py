"""Keys and values in front of those of an attention module, and the masks that let every query see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grafts.errors import StateError


@dataclass(frozen=True)
class Prefix:
    """Keys and values in front of a module's own, ``(batch or 1, heads, length, head_dim)``.

    Attributes:
        keys: the keys.
        values: the values.
        visible: which of them each row attends to, ``(batch, length)``; None for all.
        bias: what is added to their scores where a model's scores have a bias by position,
            ``(1, heads, queries, length)``; None for nothing.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None
    bias: Tensor | None = None

    @classmethod
    def of_rows(cls, keys: Tensor, values: Tensor, bias: Tensor | None, where: Tensor, batch: int) -> Prefix:
        """A prefix that some rows of a batch have, and the others neither see nor attend to.

        Args:
            keys: ``(1 or rows, heads, length, head_dim)``.
            values: likewise.
            bias: of the scores, as `Prefix` has it.
            where: the indices of the rows that have it, ``(rows,)``.
            batch: how many rows there are.
        """

        def spread(x: Tensor) -> Tensor:
            of_rows = x.expand(where.shape[0], *x.shape[1:])
            return x.new_zeros(batch, *x.shape[1:]).index_copy(0, where, of_rows)

        has_prefix = torch.zeros(batch, dtype=torch.bool, device=where.device).index_fill(0, where, True)
        visible = has_prefix[:, None].expand(batch, keys.shape[2])
        return cls(spread(keys), spread(values), visible, bias)

    @classmethod
    def joined(cls, prefixes: Sequence[Prefix], batch: int) -> Prefix:
        """Several as one, in order: every query attends to all of them, as if they were one prefix.

        Args:
            prefixes: at least one.
            batch: how many rows the call has.
        """
        if len(prefixes) == 1:
            return prefixes[0]
        keys = torch.cat([prefix.keys.expand(batch, -1, -1, -1) for prefix in prefixes], 2)
        values = torch.cat([prefix.values.expand(batch, -1, -1, -1) for prefix in prefixes], 2)
        return cls(keys, values, _joined_visible(prefixes, batch), _joined_bias(prefixes))

    @property
    def length(self) -> int:
        """How many keys come in front."""
        return self.keys.shape[2]

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The module's keys and values with these in front.

        Args:
            key: ``(batch, heads, keys, head_dim)``.
            value: likewise.
        """
        batch = key.shape[0]
        keys = torch.cat([self.keys.expand(batch, -1, -1, -1), key], 2)
        values = torch.cat([self.values.expand(batch, -1, -1, -1), value], 2)
        return keys, values


def _joined_visible(prefixes: Sequence[Prefix], batch: int) -> Tensor | None:
    """Which of several prefixes each row attends to, ``(batch, length)``; None for all."""
    if not any(prefix.visible is not None for prefix in prefixes):
        return None
    visible = []
    for prefix in prefixes:
        if prefix.visible is None:
            visible.append(torch.ones(batch, prefix.length, dtype=torch.bool, device=prefix.keys.device))
        else:
            visible.append(prefix.visible)
    return torch.cat(visible, 1)


def _joined_bias(prefixes: Sequence[Prefix]) -> Tensor | None:
    """The bias of several prefixes, zero for those that have none, ``(1, heads, queries, length)``; None for
    none.
    """
    like: Tensor | None = None
    for prefix in prefixes:
        if prefix.bias is not None and like is None:
            like = prefix.bias
    if like is None:
        return None
    biases = []
    for prefix in prefixes:
        if prefix.bias is None:
            biases.append(like.new_zeros(*like.shape[:3], prefix.length))
        else:
            biases.append(prefix.bias)
    return torch.cat(biases, -1)


class PrefixedCache:
    """The cache of continuous batching as a kernel sees it, which gets all keys and values from it: a prefix
    comes in front.

    The sequences of a batch lie packed in one row there, and a mask tells them apart; all of them attend to
    the prefix. Kernels ask whether it is a cache of that class, so it says that it is.
    """

    def __init__(self, cache: Any, prefix: Prefix) -> None:
        self._cache = cache
        self._prefix = prefix

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._cache)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of the cache with those in front; ``(1, heads, keys, size)`` or
        ``(keys, heads, size)``.
        """
        key, value = self._cache.update(*args, **kwargs)
        if key.dim() == 4:
            return self._prefix.before(key, value)
        keys, values = self._prefix.before(key.transpose(0, 1)[None], value.transpose(0, 1)[None])
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    def __getattr__(self, name: str) -> Any:
        """What the cache has."""
        return getattr(self._cache, name)


def extended(
    mask: Any,
    name: str | None,
    causal: bool,
    query: Tensor,
    keys: int,
    prefix: Prefix,
    arguments: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """A kernel's mask and arguments for keys with a prefix, which every query attends to.

    Args:
        mask: what the kernel was to get, in its own kind, for ``keys`` keys.
        name: the kernel's.
        causal: whether the kernel is causal by itself where it gets no mask.
        query: ``(batch, heads, queries, head_dim)``.
        keys: how many keys there are without the prefix.
        prefix: what comes in front.
        arguments: the kernel's other arguments.

    Raises:
        StateError: the kernel cannot be told about a prefix.
    """
    changed = dict(arguments)
    bias = arguments.get("position_bias")
    if bias is not None:
        changed["position_bias"] = _extended_bias(bias, prefix)
    if name is not None and "flash" in name:
        return _extended_flash(mask, keys, prefix, changed, query.shape[0]), changed
    if name == "flex_attention":
        return _extended_flex(mask, query, keys, prefix), changed

    # The mask of an eager kernel is added to the scores; others take a boolean one too.
    takes_scores = name in (None, "eager")
    queries = query.shape[2]
    if mask is None and not takes_scores and causal and queries > 1:
        # The mask that the kernel would make itself, aligned to the first key, which is another one now.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
        changed.pop("is_causal", None)
    if mask is None and prefix.visible is None:
        return None, changed
    if mask is None:
        mask = _mask_of_all(query, keys, takes_scores)
    return _extended_mask(mask[..., :keys], query, prefix), changed


def _mask_of_all(query: Tensor, keys: int, takes_scores: bool) -> Tensor:
    """A mask by which every query attends to every key, ``(1, 1, 1, keys)``: zeros to add to the scores, or
    True.
    """
    if takes_scores:
        return torch.zeros(1, 1, 1, keys, dtype=query.dtype, device=query.device)
    return torch.ones(1, 1, 1, keys, dtype=torch.bool, device=query.device)


def _extended_mask(mask: Tensor, query: Tensor, prefix: Prefix) -> Tensor:
    """A mask with what each row sees of a prefix in front.

    Args:
        mask: ``(batch or 1, heads or 1, queries or 1, keys)``, boolean, or what is added to the scores.
        query: ``(batch, heads, queries, head_dim)``.
        prefix: what comes in front of the keys.
    """
    is_boolean = mask.dtype == torch.bool
    if prefix.visible is None:
        return F.pad(mask, (prefix.length, 0), value=is_boolean)
    of_prefix = prefix.visible[:, None, None, :]
    if not is_boolean:
        scores = torch.zeros(of_prefix.shape, dtype=mask.dtype, device=mask.device)
        of_prefix = scores.masked_fill(~of_prefix, torch.finfo(mask.dtype).min)
    shape = query.shape[0], mask.shape[1], query.shape[2]
    return torch.cat([of_prefix.expand(*shape, -1), mask.expand(*shape, -1)], -1)


def _extended_bias(bias: Tensor, prefix: Prefix) -> Tensor:
    """A bias of scores by position, ``(1, heads, queries, keys)``, with that of the prefix in front."""
    if prefix.bias is None:
        of_prefix = bias.new_zeros(*bias.shape[:3], prefix.length)
    else:
        of_prefix = prefix.bias.to(bias.dtype)
    return torch.cat([of_prefix.expand(*bias.shape[:3], -1), bias], -1)


def _extended_flash(
    mask: Tensor | None, keys: int, prefix: Prefix, arguments: Mapping[str, Any], batch: int
) -> Tensor | None:
    """For kernels that take a padding mask ``(batch, keys)``, and align their causal mask to the end."""
    if arguments.get("sliding_window") is not None or arguments.get("cu_seq_lens_q") is not None:
        raise StateError(
            "flash attention with a sliding window or packed sequences cannot attend to a prefix as well: "
            'use model.set_attn_implementation("sdpa")'
        )
    if mask is None and prefix.visible is None:
        return None
    if mask is None:
        mask = torch.ones(batch, keys, dtype=torch.long, device=prefix.keys.device)
    if prefix.visible is None:
        return F.pad(mask, (prefix.length, 0), value=1)
    return torch.cat([prefix.visible.to(mask.dtype), mask], 1)


def _extended_flex(mask: Any, query: Tensor, keys: int, prefix: Prefix) -> Any:
    """For flex attention, whose mask is a function of indices."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask  # noqa: PLC0415 - slow, and rarely used

    length, visible = prefix.length, prefix.visible
    if isinstance(mask, Tensor):  # scores that are added
        return F.pad(mask[..., :keys], (length, 0))
    if mask is None and visible is None:
        return None
    if isinstance(mask, BlockMask):
        own_mask = mask.mask_mod
    else:
        own_mask = None

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_in_prefix = k < length
        sees_prefix = is_in_prefix
        if visible is not None:
            sees_prefix = is_in_prefix & visible[b, k.clamp_max(length - 1)]
        sees_own = ~is_in_prefix
        if own_mask is not None:
            sees_own = sees_own & own_mask(b, h, q, (k - length).clamp_min(0))
        return sees_prefix | sees_own

    queries, device = query.shape[2], str(query.device)
    return create_block_mask(mask_mod, query.shape[0], None, queries, keys + length, device=device)
