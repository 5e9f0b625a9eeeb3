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
        """A prefix that some rows of a batch have."""

        def spread(x: Tensor) -> Tensor:
            rows = x.expand(where.shape[0], *x.shape[1:])
            return x.new_zeros(batch, *x.shape[1:]).index_copy(0, where, rows)

        here = torch.zeros(batch, dtype=torch.bool, device=where.device).index_fill(0, where, True)
        return cls(spread(keys), spread(values), here[:, None].expand(batch, keys.shape[2]), bias)

    @classmethod
    def joined(cls, prefixes: Sequence[Prefix], batch: int) -> Prefix:
        """Several as one, in order."""
        if len(prefixes) == 1:
            return prefixes[0]
        visible = None
        if any(p.visible is not None for p in prefixes):
            seen = [torch.ones(batch, p.length, dtype=torch.bool, device=p.keys.device) for p in prefixes]
            visible = torch.cat(
                [all_ if p.visible is None else p.visible for p, all_ in zip(prefixes, seen, strict=True)], 1
            )
        keys, values = (
            torch.cat([x.expand(batch, *x.shape[1:]) for x in xs], 2)
            for xs in ([p.keys for p in prefixes], [p.values for p in prefixes])
        )
        some = next((p.bias for p in prefixes if p.bias is not None), None)
        biases = (
            [some.new_zeros(*some.shape[:3], p.length) if p.bias is None else p.bias for p in prefixes]
            if some is not None
            else []
        )
        return cls(keys, values, visible, torch.cat(biases, -1) if biases else None)

    @property
    def length(self) -> int:
        """How many there are."""
        return self.keys.shape[2]

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The module's keys and values with these in front."""
        return tuple(  # type: ignore[return-value]
            torch.cat([own.expand(x.shape[0], *own.shape[1:]), x], 2)
            for own, x in ((self.keys, key), (self.values, value))
        )


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
        whole = self._prefix.before(*(x.transpose(0, 1)[None] for x in (key, value)))
        return whole[0][0].transpose(0, 1), whole[1][0].transpose(0, 1)

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
    if (bias := arguments.get("position_bias")) is not None:
        own = (
            bias.new_zeros(*bias.shape[:3], prefix.length)
            if prefix.bias is None
            else prefix.bias.to(bias.dtype)
        )
        changed["position_bias"] = torch.cat([own.expand(*bias.shape[:3], -1), bias], -1)
    if name is not None and "flash" in name:
        return _extended_flash(mask, keys, prefix, changed, query.shape[0]), changed
    if name == "flex_attention":
        return _extended_flex(mask, query, keys, prefix), changed
    batch, queries = query.shape[0], query.shape[2]
    if mask is None and name not in (None, "eager") and causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[
            None, None
        ]  # as the kernel's own
        changed.pop("is_causal", None)
    if mask is None and prefix.visible is None:
        return None, changed
    if mask is None:
        kind = query.dtype if name in (None, "eager") else torch.bool
        mask = torch.zeros(1, 1, 1, keys, dtype=kind, device=query.device)
        mask = mask if kind != torch.bool else ~mask
    mask = mask[..., :keys]
    boolean = mask.dtype == torch.bool
    if prefix.visible is None:
        return F.pad(mask, (prefix.length, 0), value=boolean), changed
    seen = prefix.visible[:, None, None, :]
    if not boolean:
        seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~seen, torch.finfo(mask.dtype).min
        )
    shape = batch, mask.shape[1], queries
    return torch.cat([seen.expand(*shape, -1), mask.expand(*shape, -1)], -1), changed


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
    own = mask.mask_mod if isinstance(mask, BlockMask) else None

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_prefix = k < length
        here = in_prefix if visible is None else in_prefix & visible[b, k.clamp_max(length - 1)]
        there = ~in_prefix if own is None else ~in_prefix & own(b, h, q, (k - length).clamp_min(0))
        return here | there

    return create_block_mask(
        mask_mod, query.shape[0], None, query.shape[2], keys + length, device=str(query.device)
    )
