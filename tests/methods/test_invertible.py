"""Invertible adapters: what comes before the layers is taken back before the head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME, ids, llama

LLAMA, BERT, SDPA = BY_NAME["llama"], BY_NAME["bert"], BY_NAME["sdpa"]


def parts_named(model: nn.Module, name: str) -> list[nn.Module]:
    return [part for _, part in parts_of(model, "en") if type(part).__name__ == name]


@torch.no_grad()
@pytest.mark.parametrize("block", ["nice", "glow"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_head_gets_back_what_the_embeddings_were(block: str, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied).eval()
    grafts.add(model, grafts.InvertibleConfig(block=block), name="en")
    randomise(model, "en", scale=0.2)
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    begin, end = parts_named(model, "CouplingPart")
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(end(begin(ids(), x)), x, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in end.parameters()) == 0
    assert not torch.allclose(begin(ids(), x), x, atol=1e-2)
