"""ReFT: which tokens it changes, against a slow loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME, ids

LLAMA, BERT, SDPA = BY_NAME["llama"], BY_NAME["bert"], BY_NAME["sdpa"]


def parts_named(model: nn.Module, name: str) -> list[nn.Module]:
    return [part for _, part in parts_of(model, "en") if type(part).__name__ == name]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_reft_counts_real_tokens_as_a_slow_loop_does(side: str) -> None:
    model = LLAMA.model()
    grafts.add(model, "loreft[r=2, prefix_positions=2, suffix_positions=1, layers=[1]]", name="en")
    randomise(model, "en")
    mask = torch.ones_like(ids())
    if side != "none":
        mask[0, :3] = 0 if side == "left" else 1
        mask[0, 4:] = 0 if side == "right" else 1
    [part] = parts_named(model, "ReftPart")
    states: list[Tensor] = []
    model.model.layers[1].register_forward_hook(
        lambda m, args, out: states.append(out if isinstance(out, Tensor) else out[0])
    )
    model(input_ids=ids(), attention_mask=mask)
    model(input_ids=ids(), attention_mask=mask) if not states else None
    grafts.deactivate(model)
    model(input_ids=ids(), attention_mask=mask)
    changed, bare = states[0], states[1]
    expected = bare.clone()
    for row in range(2):
        real = [position for position in range(7) if mask[row, position]]
        for position in real[:2]:
            expected[row, position] = part.units["prefix"](bare[row, position])
        expected[row, real[-1]] = part.units["suffix"](bare[row, real[-1]])
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_reft_passes_over_virtual_tokens_of_another_adapter() -> None:
    model = LLAMA.model()
    for name, config in (
        ("prompt", "prompt_tuning[num_virtual_tokens=3]"),
        ("en", "loreft[prefix_positions=1]"),
    ):
        grafts.add(model, config, name=name)
        randomise(model, name)
    [first, *_] = parts_named(model, "ReftPart")
    observed: list[Tensor] = []
    first.register_forward_pre_hook(lambda m, args: observed.append(first._counter.module.number))
    grafts.activate(model, ["prompt", "en"])
    model(input_ids=ids())
    assert observed[0].tolist() == [[-1, -1, -1, 0, 1, 2, 3, 4, 5, 6]] * 2
