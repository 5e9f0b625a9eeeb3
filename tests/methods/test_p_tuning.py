"""P-tuning: the network that makes the virtual tokens."""

from __future__ import annotations

import pytest
import torch

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.bases import BY_NAME

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LLAMA, T5, BERT, VIT = (BY_NAME[name] for name in ("llama", "t5", "bert", "vit"))


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_the_network_of_p_tuning_learns_and_serves_both_stacks(kind: str) -> None:
    model = T5.model()
    config = grafts.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type=kind, decoder_tokens=True
    )
    grafts.add(model, config, name="en")
    encoder, decoder = (part for _, part in parts_of(model, "en"))
    assert decoder.encoder is None
    assert torch.equal(torch.cat([encoder.virtual_tokens(), decoder.virtual_tokens()]), encoder.encoder())
    T5.output(model).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.encoder.parameters())
