"""The positions that virtual tokens take up in a batch of sequences.

With two virtual tokens ``v``, rows ``a b c`` and ``. d e`` (``.`` is padding), one of three layouts is had::

    in front (even)       v v a b c        v v . d e
    after the first token a v v b c        . d v v e     BOS, CLS stays the first
    before the text       v v a b c        . v v d e     where distances count: windows, relative positions

Where rows have different numbers of virtual tokens, those that have fewer have empty positions, which nothing
attends
to: in front, or, for a pooler that reads the first position, behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptLayout:
    """What virtual tokens take up at the beginning of a batch of sequences.

    Attributes:
        count: how many positions.
        tokens: how many tokens each row had at the beginning, padding too.
        lengths: how many virtual tokens each row has, ``(batch, 1)``; None where all have ``count``.
        after_first: they stand after the first token of each row.
        before_text: they stand directly before a row's first token that is no padding, where distances count
            (windows, relative positions); elsewhere before the padding, which comes to the same.
        pads_after: a row's empty positions come after its tokens (for a pooler that reads the first one), and
            not before.
        embedded: they come among what the embeddings have become, behind the positions and norms that these
            get, which virtual tokens then have none of; else among the embeddings of words.
    """

    count: int
    tokens: int
    lengths: Tensor | None
    after_first: bool
    before_text: bool
    pads_after: bool
    embedded: bool = False

    @property
    def is_even(self) -> bool:
        """Whether the virtual tokens of all rows simply come first."""
        return self.lengths is None and not self.after_first and not self.before_text

    @property
    def row_lengths(self) -> int | Tensor:
        """How many virtual tokens a row has: one number, or one for each row, ``(batch, 1)``."""
        if self.lengths is None:
            return self.count
        return self.lengths

    def first(self, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Before which of a row's own tokens the virtual ones stand, ``(batch, 1)``.

        Args:
            mask: which tokens are real, ``(batch, tokens or more)``; None for all.
            batch: how many rows.
            device: where the numbers are needed.
        """
        if mask is None or not (self.after_first or self.before_text):
            return torch.full((batch, 1), int(self.after_first), device=device)
        real = mask[:, : self.tokens].ne(0)
        # A row may begin with a chunk of nothing but padding: there they come last, right before its tokens.
        first_real = real.to(torch.long).argmax(1, keepdim=True)
        first = torch.where(real.any(1, keepdim=True), first_real, self.tokens)
        return first + int(self.after_first)

    def _lengths_and_gap(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many virtual tokens each row has, and how many empty positions come first, ``(batch, 1)``
        each.
        """
        if self.lengths is None:
            lengths = torch.full((batch, 1), self.count, device=device)
        else:
            lengths = self.lengths.to(device)
        if self.pads_after:
            return lengths, torch.zeros_like(lengths)
        return lengths, self.count - lengths

    def insert(self, own: Tensor, virtual: Tensor | None, first: Tensor) -> Tensor:
        """Put what belongs to the virtual tokens among what belongs to the tokens.

        Args:
            own: what belongs to the tokens, ``(batch, tokens, ...)``; those after the beginning stay where
                they are.
            virtual: what belongs to the virtual tokens, ``(batch, count, ...)``, those of a row first; ones
                if not given.
            first: before which of a row's own tokens they stand, ``(batch, 1)``.

        Returns:
            ``(batch, count + tokens, ...)``, zeros at empty positions.
        """
        if virtual is None:
            shape = (own.shape[0], self.count, *own.shape[2:])
            virtual = torch.ones(shape, dtype=own.dtype, device=own.device)
        if self.is_even:
            return torch.cat([virtual, own], 1)

        # Every position takes its value from one of [virtual tokens, own tokens, one zero], by its index in
        # those.
        lengths, gap = self._lengths_and_gap(own.shape[0], own.device)
        total = self.count + self.tokens
        place = torch.arange(total, device=own.device)[None] - gap  # counted from the row's first value
        index = torch.where(place < first, self.count + place, place - first)
        index = torch.where(place >= first + lengths, self.count + place - lengths, index)
        is_empty = (place < 0) | (place >= lengths + self.tokens)
        index = torch.where(is_empty, total, index)
        values = torch.cat([virtual, own[:, : self.tokens], torch.zeros_like(own[:, :1])], 1)
        return torch.cat([at_positions(values, index), own[:, self.tokens :]], 1)

    def token_positions(self, first: Tensor) -> Tensor:
        """Where a row's own tokens have gone, ``(batch, tokens)``.

        Args:
            first: before which of them the virtual ones stand, ``(batch, 1)``.
        """
        lengths, gap = self._lengths_and_gap(first.shape[0], first.device)
        place = torch.arange(self.tokens, device=first.device)[None]
        return gap + torch.where(place < first, place, place + lengths)


def at_positions(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """The positions ``index``, ``(batch, n)``, of ``x`` along a dimension."""
    shape = [index.shape[0], *[1] * (x.dim() - 1)]
    shape[dim] = index.shape[1]
    full = [index.shape[0], *x.shape[1:]]
    full[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(full))
