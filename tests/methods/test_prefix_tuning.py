"""Prefix tuning: how a prefix starts, and which positions it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME, ids
from helpers.caches import going_on

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LLAMA, T5, BERT, VIT = (BY_NAME[name] for name in ("llama", "t5", "bert", "vit"))


def test_a_prefix_that_starts_at_zero_takes_its_share_of_attention_only() -> None:
    model = LLAMA.model()
    config = grafts.PrefixTuningConfig(num_virtual_tokens=2, init_weights="zero", prefix_projection=True)
    grafts.add(model, config, name="en")
    assert not any(part.numbers().any() for path, part in parts_of(model, "en") if "self_attn" in path)
    LLAMA.output(model).square().mean().backward()
    last = parts_of(model, "en")[1][1].encoder.transform[2]
    assert last.weight.grad.any()


def test_where_positions_are_counted_and_where_they_cannot_be() -> None:
    counted = grafts.plan(LLAMA.model(), grafts.PrefixTuningConfig())
    assert [target.path for target in counted.targets if target.role == "input"] == ["model"]
    alone = grafts.plan(LLAMA.model(), grafts.PrefixTuningConfig(count_positions=False))
    assert {target.role for target in alone.targets} == {"self-attention"}
    assert {target.role for target in grafts.plan(T5.model(), grafts.PrefixTuningConfig()).targets} == {
        "self-attention"
    }
    assert {target.role for target in grafts.plan(VIT.model(), grafts.PrefixTuningConfig()).targets} == {
        "self-attention"
    }
    counted = grafts.plan(
        T5.model(), grafts.PrefixTuningConfig(count_positions=True)
    )  # by distance, in the scores
    assert {target.role for target in counted.targets} == {"self-attention"}
    with pytest.raises(grafts.ConfigError, match="takes no position_ids"):
        grafts.add(VIT.model(), grafts.PrefixTuningConfig(count_positions=True))


def test_a_counted_prefix_moves_positions_as_a_cache_of_its_length_would() -> None:
    from transformers import DynamicCache

    model = LLAMA.model()
    grafts.add(model, grafts.PrefixTuningConfig(num_virtual_tokens=3), name="en")
    randomise(model, "en")
    result = model(input_ids=ids()).logits
    twin, cache = LLAMA.model(), DynamicCache()
    for layer, (_, part) in enumerate(
        (path, part) for path, part in parts_of(model, "en") if "self_attn" in path
    ):
        keys, values = (x.detach().expand(2, -1, -1, -1) for x in part.as_heads(2))
        cache.update(keys, values, layer)
    torch.testing.assert_close(twin(input_ids=ids(), **going_on(cache)).logits, result, rtol=1e-5, atol=1e-5)


def test_a_module_that_attends_with_other_heads_than_planned_says_so() -> None:
    class Odd(nn.Module):
        """Keys narrower than what its linears say."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (w(x)[..., :4].unflatten(-1, (2, 2)).transpose(1, 2) for w in (self.q, self.k, self.v))
            return nn.functional.pad(
                nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), (0, 4)
            )

    model = nn.Sequential(Odd())
    grafts.add(model, grafts.PrefixTuningConfig(), name="en")
    with pytest.raises(
        grafts.StateError, match="has 2 heads of keys of size 2, and its prefix was made for 8"
    ):
        model(torch.zeros(1, 3, 8))
