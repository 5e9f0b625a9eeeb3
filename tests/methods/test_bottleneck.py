"""Bottlenecks: merging, biases, stochastic depth, gates, and where they stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME, ids
from helpers.caches import cache_of, going_on

LLAMA, BERT, SDPA = BY_NAME["llama"], BY_NAME["bert"], BY_NAME["sdpa"]


def parts_named(model: nn.Module, name: str) -> list[nn.Module]:
    return [part for _, part in parts_of(model, "en") if type(part).__name__ == name]


@torch.no_grad()
@pytest.mark.parametrize("base", [BERT, BY_NAME["gpt2"]], ids=["bert", "gpt2"])
@pytest.mark.parametrize("more", ["", ", scaling='channel'", ", phm_layer=True"])
def test_a_bottleneck_without_an_activation_has_an_exact_merge(base: object, more: str) -> None:
    model = base.model()  # type: ignore[attr-defined]
    before = {name: p.clone() for name, p in model.named_parameters()}
    grafts.add(model, f"double_seq_bn[reduction_factor=4, non_linearity='linear'{more}]", name="en")
    randomise(model, "en")
    expected = base.output(model)  # type: ignore[attr-defined]
    torch.testing.assert_close(base.output(grafts.merge(model)), expected, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
    grafts.unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@torch.no_grad()
def test_a_parallel_one_beside_a_single_linear_has_an_exact_merge() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.only(x)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Stack().eval(), torch.randn(2, 5, 16)
    grafts.add(model, "par_bn[reduction_factor=4, non_linearity=None]", name="en")
    randomise(model, "en")
    expected = model(x)
    torch.testing.assert_close(grafts.merge(model)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        "seq_bn",
        "par_bn[non_linearity=None]",
        "double_seq_bn[non_linearity='linear', ln_after=True]",
        "loreft",
        "invertible",
        "mam",
    ],
)
def test_what_has_no_exact_merge_is_refused_and_nothing_is_changed(config: str) -> None:
    model = LLAMA.model()
    grafts.add(model, config, name="en")
    expected = LLAMA.output(model)
    with pytest.raises(grafts.MergeError, match="no exact merge"):
        grafts.merge(model)
    assert torch.equal(LLAMA.output(model), expected)


def test_biases_that_have_nowhere_to_go_are_refused() -> None:
    model = LLAMA.model()  # its linears have no biases
    grafts.add(model, "double_seq_bn[non_linearity='linear']", name="en")
    grafts.merge(model)  # they are zero yet
    grafts.unmerge(model)
    randomise(model, "en")
    with pytest.raises(grafts.MergeError, match="no bias that the bottleneck's could be merged into"):
        grafts.merge(model)


def test_stochastic_depth_drops_whole_rows_and_only_in_training() -> None:
    model = LLAMA.model()
    grafts.add(model, "double_seq_bn[stochastic_depth=0.5, reduction_factor=4]", name="en")
    randomise(model, "en")
    [part, *_] = parts_named(model, "BottleneckPart")
    h = torch.randn(64, 5, 16)
    torch.testing.assert_close(part(h, h), part(h, h))
    part.train()
    moved = (part(h, h) - h).flatten(1).abs().sum(1)
    part.eval()
    whole = (part(h, h) - h).flatten(1).abs().sum(1)
    dropped = moved == 0
    assert 10 < int(dropped.sum()) < 54
    torch.testing.assert_close(moved[~dropped], 2 * whole[~dropped])


@torch.no_grad()
@pytest.mark.parametrize("config", ["seq_bn[use_gating=True]", "lora[use_gating=True]", "unipelt"])
def test_a_gate_refuses_a_cache_that_holds_tokens(config: str) -> None:
    model = LLAMA.model()
    grafts.add(model, config, name="en")
    randomise(model, "en")
    begun = model(input_ids=ids(), use_cache=True)
    with pytest.raises(grafts.StateError, match="use_cache=False"):
        model(input_ids=ids()[:, :1], **going_on(cache_of(begun)))


def test_a_bottleneck_by_the_names_of_modules_stands_there_alone() -> None:
    model = LLAMA.model()
    plan = grafts.plan(model, "seq_bn|lora")
    assert len(plan.members) == 2
    some = grafts.plan(
        model, grafts.BnConfig(mh_adapter=True, target_modules=["o_proj"], original_ln_before=True)
    )
    with_tensors = {target.path.rpartition(".")[2] for target in some.targets if target.parameters}
    assert with_tensors == {"o_proj"}
    left = grafts.plan(model, grafts.BnConfig(mh_adapter=True, exclude_modules=["o_proj"]))
    assert {target.path.rpartition(".")[2] for target in left.targets if target.parameters} == {"down_proj"}
