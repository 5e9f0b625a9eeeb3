"""LoRA with a gate, against its formula."""

from __future__ import annotations

import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME

LLAMA, BERT, SDPA = BY_NAME["llama"], BY_NAME["bert"], BY_NAME["sdpa"]


def parts_named(model: nn.Module, name: str) -> list[nn.Module]:
    return [part for _, part in parts_of(model, "en") if type(part).__name__ == name]


@torch.no_grad()
def test_gated_lora_is_the_formula() -> None:
    model = SDPA.model()
    grafts.add(model, "lora[r=2, use_gating=True, target_modules=['blocks.0.wq']]", name="en")
    randomise(model, "en")
    [part] = parts_named(model, "GatedLoraPart")
    x, host = torch.randn(3, 5, 16), model.blocks[0].wq
    gate = torch.sigmoid(x @ part.gate.weight.T + part.gate.bias).mean(1, keepdim=True)
    expected = x @ host.weight.T + host.bias + gate * (x @ part.lora_A.T @ part.lora_B.T)
    torch.testing.assert_close(host(x), expected)
