"""A small model in which every kind of method has a place, of plain PyTorch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, SIZE, HEADS = 50, 16, 2


class SmallAttention(nn.Module):
    """Self-attention with four projections."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj = nn.Linear(SIZE, SIZE)
        self.k_proj = nn.Linear(SIZE, SIZE)
        self.v_proj = nn.Linear(SIZE, SIZE)
        self.o_proj = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states ``(batch, tokens, 16)`` to what is added to them.

        Args:
            x: the hidden states.
            mask: which tokens are attended to, ``(batch, 1, 1, tokens)``; None for all.
        """
        heads = []
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            heads.append(projection(x).unflatten(-1, (HEADS, -1)).transpose(1, 2))
        query, key, value = heads
        output = F.scaled_dot_product_attention(query, key, value, mask)
        result: Tensor = self.o_proj(output.transpose(1, 2).flatten(-2))
        return result


class SmallLayer(nn.Module):
    """Attention and a feed-forward, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(SIZE)
        self.attention = SmallAttention()
        self.norm_2 = nn.LayerNorm(SIZE)
        self.up_proj = nn.Linear(SIZE, 2 * SIZE)
        self.down_proj = nn.Linear(2 * SIZE, SIZE)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The residual stream, ``(batch, tokens, 16)``, with both added to it."""
        x = x + self.attention(self.norm_1(x), mask)
        result: Tensor = x + self.down_proj(F.gelu(self.up_proj(self.norm_2(x))))
        return result


class SmallModel(nn.Module):
    """A transformer of two layers over 50 words, whose attention sees all tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=WORDS, hidden_size=SIZE)
        self.embed_tokens = nn.Embedding(WORDS, SIZE)
        self.positions = nn.Embedding(64, SIZE)
        self.layers = nn.ModuleList([SmallLayer(), SmallLayer()])
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, WORDS, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of the words."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Scores for the next word at each token.

        Args:
            input_ids: the words, ``(batch, tokens)``.
            inputs_embeds: their embeddings in place of them, ``(batch, tokens, 16)``.
            attention_mask: which of them are no padding, ``(batch, tokens)``; all if not given.
            position_ids: where they stand, ``(batch or 1, tokens)``; from 0 if not given.

        Returns:
            ``(batch, tokens, 50)``.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        x = x + self.positions(position_ids)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        result: Tensor = self.head(self.norm(x))
        return result


def small_model(dtype: torch.dtype = torch.float32) -> SmallModel:
    """A fresh model, the same each time, frozen and in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallModel()
    return model.to(dtype).eval().requires_grad_(False)


def words(rows: int = 3) -> Tensor:
    """Token ids, ``(rows, 5)``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(WORDS, (rows, 5), generator=generator)
