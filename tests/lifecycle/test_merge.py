"""Merging: what it refuses, that it is all or nothing, and that shared weights are never changed unasked."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import BY_NAME, Base
from helpers.closeness import assert_rounded

LLAMA = BY_NAME["llama"]
TIED = Base("tied", lambda: bases.llama(tie_word_embeddings=True), LLAMA.inputs)


def adapted(base: Base = LLAMA, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    model = grafts.add(
        base.model(dtype), grafts.LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options), name="en"
    )
    randomise(model, "en")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [LLAMA, BY_NAME["gpt2"]], ids=["linear", "conv1d"])
def test_merged_weight_is_the_float32_sum_rounded_once(base: Base, dtype: torch.dtype) -> None:
    model = adapted(base, dtype)
    expected = {}
    for path, part in parts_of(model, "en"):
        weight = model.get_submodule(path).weight.detach().to(torch.float64)
        update = part.scaling * (part.lora_B.double() @ part.lora_A.double())
        expected[path] = (weight + (update.T if base.name == "gpt2" else update)).to(torch.float32).to(dtype)
    grafts.merge(model, "en")
    rounding = torch.finfo(dtype).eps
    for path, wanted in expected.items():
        torch.testing.assert_close(model.get_submodule(path).weight, wanted, rtol=rounding, atol=1e-6)


def test_merge_takes_the_active_adapters_and_unmerge_restores_the_setup() -> None:
    model = adapted()
    grafts.add(model, grafts.LoraConfig(target_modules=["q_proj"]), name="de")
    randomise(model, "de", seed=2)
    grafts.activate(model, ["en", "de"])
    both = LLAMA.output(model)
    grafts.merge(model)
    torch.testing.assert_close(LLAMA.output(model), both, rtol=1e-5, atol=1e-5)
    grafts.unmerge(model)
    assert torch.equal(LLAMA.output(model), both)
    grafts.activate(model, "de")
    only = LLAMA.output(model)
    grafts.unmerge(grafts.merge(model, "en"))
    assert torch.equal(LLAMA.output(model), only)


def test_user_held_state_dict_is_not_changed_by_merging() -> None:
    model = adapted()
    held = model.state_dict()
    values = {key: x.clone() for key, x in held.items()}
    grafts.merge(model, "en")
    assert all(torch.equal(held[key], values[key]) for key in values)


@pytest.mark.parametrize(
    "verb",
    [
        lambda m: grafts.activate(m, "en"),
        grafts.deactivate,
        lambda m: grafts.delete(m, "en"),
        lambda m: grafts.add(m, grafts.LoraConfig(), name="de"),
        lambda m: grafts.train_only(m, "en"),
        grafts.merge,
    ],
)
def test_verbs_that_would_be_wrong_while_merged_say_so(verb: object) -> None:
    model = grafts.merge(adapted(), "en")
    before = LLAMA.output(model)
    with pytest.raises(grafts.StateError, match=r"while \['en'\] is merged: call grafts.unmerge"):
        verb(model)  # type: ignore[operator]
    assert torch.equal(LLAMA.output(model), before)


def test_detaching_a_merged_model_asks_which_weights_to_keep() -> None:
    model = adapted()
    unmerged = LLAMA.output(model)
    grafts.merge(model, "en")
    with pytest.raises(grafts.StateError, match="keep_merged=True"):
        grafts.detach(model)
    keys = set(grafts.detach(model, keep_merged=True).state_dict())
    assert keys == set(LLAMA.model().state_dict())
    torch.testing.assert_close(LLAMA.output(model), unmerged, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_unmerge_without_merge_is_an_error() -> None:
    with pytest.raises(grafts.StateError, match="nothing is merged"):
        grafts.unmerge(adapted())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_value_that_is_not_finite_is_refused_with_the_module_and_nothing_is_merged(value: float) -> None:
    model = adapted(dtype=torch.float16)
    path, part = parts_of(model, "en")[-1]
    with torch.no_grad():
        part.lora_A[0, 0] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(grafts.MergeError, match=f"cannot merge into '{path}'.*NaN or infinity"):
        grafts.merge(model, "en")
    assert all(
        torch.equal(p, before[name]) or not torch.isfinite(p).all() for name, p in model.named_parameters()
    )
    assert not grafts.adapters(model)["en"].merged


def test_shared_embedding_is_refused_with_both_ways_out_and_untied_on_request() -> None:
    model = adapted(TIED, target_modules=["embed_tokens", "q_proj"])
    unmerged, head = TIED.output(model), model.lm_head.weight
    with pytest.raises(
        grafts.MergeError, match=r"'model.embed_tokens.weight' shares its storage with \['lm_head.weight'\]"
    ) as error:
        grafts.merge(model, "en")
    assert "untie=True" in str(error.value)
    assert "leave it out" in str(error.value)
    grafts.merge(model, "en", untie=True)
    torch.testing.assert_close(TIED.output(model), unmerged, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is head
    assert model.config.tie_word_embeddings is False
    grafts.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert torch.equal(TIED.output(model), unmerged)


def test_merged_untied_model_saves_as_a_plain_model(tmp_path: object) -> None:
    from transformers import LlamaForCausalLM

    model = adapted(TIED, target_modules=["embed_tokens"])
    unmerged = TIED.output(model)
    grafts.detach(grafts.merge(model, "en", untie=True), keep_merged=True).save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(TIED.output(again), unmerged, rtol=1e-5, atol=1e-5)


def test_copy_and_bias_are_merged_too() -> None:
    bert = BY_NAME["bert"]
    model = adapted(bert, task_type="SEQ_CLS", bias="all")
    unmerged = bert.output(model)
    torch.testing.assert_close(bert.output(grafts.merge(model)), unmerged, rtol=1e-5, atol=1e-5)
    grafts.unmerge(model)
    assert torch.equal(bert.output(model), unmerged)


def test_merged_model_can_be_copied_and_pickled_and_each_unmerged() -> None:
    model = adapted()
    bare = LLAMA.output(LLAMA.model())
    grafts.merge(model, "en")
    merged = LLAMA.output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_rounded(LLAMA.output(twin), merged)
        assert_rounded(LLAMA.output(grafts.detach(grafts.unmerge(twin))), bare)
    assert torch.equal(LLAMA.output(model), merged)


class PackedLinear(nn.Linear):
    """A linear with its weight in bytes, as quantizers have it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.scale = plain.weight.detach().abs().max() / 127
        self.weight = nn.Parameter(
            (plain.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ (self.weight.to(input.dtype) * self.scale).T


def test_quantized_linear_is_adapted_and_trained_but_not_merged() -> None:
    model = LLAMA.model()
    attention = model.model.layers[0].self_attn
    attention.q_proj = PackedLinear(attention.q_proj)
    plain = LLAMA.output(model)
    grafts.add(model, grafts.LoraConfig(target_modules=["q_proj"]), name="en")
    assert torch.equal(LLAMA.output(model), plain)
    randomise(model, "en")
    LLAMA.output(model).mean().backward()
    with pytest.raises(grafts.MergeError, match=r"layers.0.self_attn.q_proj.*torch.int8.*dequantize"):
        grafts.merge(model)
    assert torch.equal(LLAMA.output(grafts.detach(model)), plain)


def test_a_thousand_cycles_in_bfloat16_with_the_adapter_changing_leave_the_base_bitwise() -> None:
    """With `peft` one cycle changes 27 % of the weights."""
    model = adapted(dtype=torch.bfloat16)
    grafts.add(model, grafts.IA3Config(), name="ia3")
    randomise(model, "ia3")
    before = {name: p.clone() for name, p in model.named_parameters() if "grafts" not in name}
    part = parts_of(model, "en")[0][1]
    for cycle in range(1000):
        with torch.no_grad():
            part.lora_B.add_(0.01 * (-1) ** cycle)
        grafts.unmerge(grafts.merge(model, ["en", "ia3"]))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "grafts" not in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", ["keywords", "tuple", "tensor"])
def test_verify_merge_reports_the_measured_difference_and_leaves_the_model(
    inputs: str, dtype: torch.dtype
) -> None:
    model = adapted(dtype=dtype).train()
    grafts.deactivate(model)
    ids = LLAMA.inputs()["input_ids"]
    report = grafts.verify_merge(
        model, {"keywords": {"input_ids": ids}, "tuple": (ids,), "tensor": ids}[inputs], "en"
    )
    assert model.training
    assert not grafts.adapters(model)["en"].active
    model.eval()
    bare, unmerged = LLAMA.output(model).double(), LLAMA.output(grafts.activate(model, "en")).double()
    merged = LLAMA.output(grafts.merge(model)).double()
    assert report.names == ("en",)
    assert report.max_error == pytest.approx((merged - unmerged).abs().max().item(), rel=0.2, abs=1e-9)
    assert report.effect == pytest.approx((unmerged - bare).abs().max().item())
    assert report.mean_error <= report.max_error
    assert (report.max_error < 1e-4) == (dtype == torch.float32)
    assert "merging en: outputs differ by at most" in str(report)


def test_verify_merge_leaves_the_model_when_it_cannot_merge() -> None:
    model = adapted(TIED, target_modules=["embed_tokens"])
    before = TIED.output(model)
    with pytest.raises(grafts.MergeError, match="shares its storage"):
        grafts.verify_merge(model, TIED.inputs(), "en")
    assert torch.equal(TIED.output(model), before)
    assert grafts.adapters(model)["en"].active


SETUPS = [
    ["lora", "ia3"],
    ["ia3", "lora"],
    ["dora", "ia3", "lora"],
    ["ia3", "dora"],
    ["adalora", "dora", "before"],
    ["before", "lora"],
]


@pytest.mark.parametrize("names", SETUPS, ids="+".join)
@pytest.mark.parametrize("base", [LLAMA, BY_NAME["gpt2"], BY_NAME["mlp"]], ids=["llama", "gpt2", "mlp"])
def test_several_methods_on_one_module_act_in_order_merge_save_and_load(
    base: Base, names: list[str], tmp_path: object
) -> None:
    configs = {
        "lora": grafts.LoraConfig(r=3, target_modules="all-linear", bias="lora_only"),
        "dora": grafts.LoraConfig(r=3, target_modules="all-linear", use_dora=True),
        "ia3": grafts.IA3Config(target_modules="all-linear", feedforward_modules=[]),
        "before": grafts.IA3Config(target_modules="all-linear", feedforward_modules=".*"),
        "adalora": grafts.AdaLoraConfig(init_r=3, target_r=2, target_modules="all-linear"),
    }
    model = base.model()
    bare = base.output(model)
    for seed, name in enumerate(names):
        grafts.add(model, configs[name], name=name)
        randomise(model, name, seed=seed, scale=0.2)
    together = base.output(grafts.activate(model, names))
    turned = base.output(grafts.activate(model, names[::-1]))
    grafts.activate(model, names)
    scale = max(together.abs().max(), 1.0)
    if names[0] != "before" and "adalora" not in names:
        assert not torch.allclose(together, turned, atol=1e-4)
    torch.testing.assert_close(
        base.output(grafts.merge(model)) / scale, together / scale, rtol=1e-5, atol=1e-5
    )
    grafts.unmerge(model)
    grafts.save(model, names, tmp_path)
    fresh = base.model()
    reports = grafts.load(fresh, tmp_path, name=names)
    assert [report.name for report in reports] == names
    assert_rounded(base.output(fresh), together)
    for name in names:
        assert_rounded(base.output(grafts.activate(fresh, name)), base.output(grafts.activate(model, name)))
    assert_rounded(base.output(grafts.detach(fresh)), bare)


def test_several_are_loaded_all_or_none_and_names_stay_in_their_folder(tmp_path: object) -> None:
    model = adapted()
    grafts.add(model, grafts.IA3Config(), name="ia3")
    grafts.add(model, grafts.IA3Config(), name="../up")
    grafts.save(model, ["en", "ia3"], tmp_path)
    with pytest.raises(grafts.AdapterNameError, match="cannot be the name of a folder"):
        grafts.save(model, ["../up"], tmp_path)
    fresh = LLAMA.model()
    with pytest.raises(grafts.CheckpointError, match="no such directory"):
        grafts.load(fresh, tmp_path, name=["en", "de"])
    assert grafts.adapters(fresh) == {}
    grafts.load(fresh, tmp_path, name=["ia3", "en"], train=True)
    assert [(s.active, s.trainable) for s in grafts.adapters(fresh).values()] == [(True, True)] * 2
