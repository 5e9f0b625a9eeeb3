"""The positions that virtual tokens take up in a batch of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptLayout:
    """What virtual tokens take up at the beginning of a batch of sequences.

    Rows that have fewer of them than others have empty positions, which nothing attends to.

    Attributes:
        count: how many positions.
        own: how many tokens each row has of its own at the beginning.
        lengths: how many virtual tokens each row has, ``(batch, 1)``; None where all have ``count``.
        after_first: they stand after the first token of each row.
        before_text: they stand right before a row's first token that is no padding, where distances count
            (windows, relative positions); elsewhere before the padding, which comes to the same.
        pads_after: a row's empty positions come after its tokens (for a pooler that reads the first one), and
            not before.
        embedded: they come among what the embeddings have become, with positions and norms, and not among
            those of words.
    """

    count: int
    own: int
    lengths: Tensor | None
    after_first: bool
    before_text: bool
    pads_after: bool
    embedded: bool = False

    @property
    def even(self) -> bool:
        """Whether the virtual tokens of all rows simply come first."""
        return self.lengths is None and not self.after_first and not self.before_text

    def first(self, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Before which of a row's own tokens the virtual ones stand, ``(batch, 1)``."""
        if mask is None or not (self.after_first or self.before_text):
            return torch.full((batch, 1), int(self.after_first), device=device)
        real = mask[:, : self.own].ne(0)
        # a row may begin with a chunk of nothing but padding: there the virtual tokens come last, right
        # before its tokens
        first = torch.where(real.any(1, keepdim=True), real.to(torch.long).argmax(1, keepdim=True), self.own)
        return first + int(self.after_first)

    def _lead(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many virtual tokens each row has, and how many empty positions come first, ``(batch, 1)``
        each.
        """
        lengths = (
            torch.full((batch, 1), self.count, device=device)
            if self.lengths is None
            else self.lengths.to(device)
        )
        return lengths, torch.zeros_like(lengths) if self.pads_after else self.count - lengths

    def inserted(self, own: Tensor, new: Tensor | None, first: Tensor) -> Tensor:
        """``own`` with what belongs to the virtual tokens among it.

        Args:
            own: what belongs to the tokens, ``(batch, tokens, ...)``; those after the beginning stay where
                they are.
            new: what belongs to the virtual tokens, ``(batch, count, ...)``, those of a row first; ones if
                not given.
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
        return torch.cat([at_positions(both, index), own[:, self.own :]], 1)

    def tokens(self, first: Tensor) -> Tensor:
        """Where a row's own tokens have gone, ``(batch, own)``."""
        lengths, gap = self._lead(first.shape[0], first.device)
        place = torch.arange(self.own, device=first.device)[None]
        return gap + torch.where(place < first, place, place + lengths)


def at_positions(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """The positions ``index`` ``(batch, n)`` of ``x`` along ``dim``."""
    shape = [index.shape[0], *[1] * (x.dim() - 1)]
    shape[dim] = index.shape[1]
    full = [index.shape[0], *x.shape[1:]]
    full[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(full))
