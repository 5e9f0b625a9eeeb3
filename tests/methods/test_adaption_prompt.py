"""Adaption prompts: their config, which layers they take, their gate, images, and the model class of
`peft`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME, Base, ids, llama, noise

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LLAMA, T5, BERT = BY_NAME["llama"], BY_NAME["t5"], BY_NAME["bert"]
DEEP = Base("deep", lambda: llama(num_hidden_layers=4), LLAMA.inputs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_len": 0}, "adapter_len is 0; it must be a positive number"),
        ({"adapter_layers": -1}, "adapter_layers is -1"),
        ({"attention": "sideways"}, "one of self, cross, both, encoder"),
        ({"adapter_length": 3}, "did you mean 'adapter_len'"),
        ({"peft_type": "LORA"}, "must be 'ADAPTION_PROMPT'"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.AdaptionPromptConfig(**values)


def test_the_top_layers_are_taken_and_more_than_there_are_is_an_error_with_both_numbers() -> None:
    made = grafts.plan(DEEP.model(), grafts.AdaptionPromptConfig(adapter_layers=3, adapter_len=5))
    assert [target.path for target in made.targets] == [f"model.layers.{i}.self_attn" for i in (1, 2, 3)]
    assert made.parameters == 3 * (5 * 16 + 1)
    named = grafts.AdaptionPromptConfig(adapter_layers=1, target_modules="self_attn")
    assert [target.path for target in grafts.plan(DEEP.model(), named).targets] == [
        "model.layers.3.self_attn"
    ]
    with pytest.raises(grafts.ConfigError, match=r"adapter_layers is 5, and there are 4 attention modules"):
        grafts.add(DEEP.model(), grafts.AdaptionPromptConfig(adapter_layers=5))
    with pytest.raises(grafts.UnsupportedTargetError, match=r"takes attending layers: 'model\.layers"):
        grafts.add(DEEP.model(), grafts.AdaptionPromptConfig(target_modules=["q_proj"]))
    with pytest.raises(grafts.UnmatchedTargetError, match="nearest names"):
        grafts.add(DEEP.model(), grafts.AdaptionPromptConfig(target_modules="self_atn"))


def test_training_moves_the_gate_first_and_never_the_base() -> None:
    model = LLAMA.model()
    grafts.add(model, grafts.AdaptionPromptConfig(), name="en")
    LLAMA.output(model).square().mean().backward()
    for _, part in parts_of(model, "en"):
        assert part.adaption_gate.grad.abs().item() > 0
        assert not part.adaption_prompt.grad.any()
    assert all(p.grad is None for n, p in model.named_parameters() if ".grafts" not in n)
    with torch.no_grad():
        for _, part in parts_of(model, "en"):
            part.adaption_gate.fill_(0.1)
    LLAMA.output(model).square().mean().backward()
    assert all(part.adaption_prompt.grad.any() for _, part in parts_of(model, "en"))


def test_image_features_move_the_prompts_of_their_own_row() -> None:
    model = LLAMA.model()
    grafts.add(model, grafts.AdaptionPromptConfig(adapter_len=4), name="en")
    randomise(model, "en")
    tokens, features = ids(), noise(2, 1, 16)
    project = nn.Linear(16, 16)
    plain = model(input_ids=tokens).logits
    moved = model(input_ids=tokens, prompt_bias=project(features)).logits
    moved.square().mean().backward()
    assert project.weight.grad.any()
    for row in range(2):
        with torch.no_grad():
            before = [part.adaption_prompt.clone() for _, part in parts_of(model, "en")]
            for _, part in parts_of(model, "en"):
                part.adaption_prompt.add_(project(features[row]))
            by_hand = model(input_ids=tokens[row : row + 1]).logits
            for (_, part), value in zip(parts_of(model, "en"), before, strict=True):
                part.adaption_prompt.copy_(value)
        torch.testing.assert_close(moved[row : row + 1], by_hand, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=tokens).logits, plain)
    assert torch.equal(model(input_ids=tokens, prompt_bias=None).logits, plain)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_generation_and_rows_go_together_with_image_features(options: dict[str, int]) -> None:
    model = LLAMA.model()
    for seed, name in enumerate(("en", "de")):
        grafts.add(model, grafts.AdaptionPromptConfig(adapter_len=4), name=name)
        randomise(model, name, seed=seed, scale=2.0)
    tokens, bias, names = ids(rows=3), noise(3, 4, 16), ["de", None, "en"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    together = model.generate(tokens, prompt_bias=bias, adapter_names=names, **settings)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        grafts.activate(model, () if name is None else name)
        moved = {} if name is None else {"prompt_bias": bias[row : row + 1]}
        alone = model.generate(tokens[row : row + 1], **moved, **settings)
        assert torch.equal(together[row * each : (row + 1) * each], alone)


def test_prompts_go_through_what_other_methods_make_of_the_projections() -> None:
    model = LLAMA.model()
    grafts.add(model, grafts.AdaptionPromptConfig(adapter_len=4), name="prompt")
    grafts.add(model, grafts.LoraConfig(target_modules=["k_proj", "v_proj"]), name="lora", activate=False)
    randomise(model, "prompt")
    randomise(model, "lora")
    grafts.activate(model, ["prompt", "lora"])
    expected = LLAMA.output(model)
    values = [
        (part.adaption_prompt.clone(), part.adaption_gate.clone()) for _, part in parts_of(model, "prompt")
    ]
    merged = grafts.merge(model, "lora")
    grafts.detach(merged, keep_merged=True)
    grafts.add(merged, grafts.AdaptionPromptConfig(adapter_len=4), name="prompt")
    with torch.no_grad():
        for (_, part), (prompt, gate) in zip(parts_of(merged, "prompt"), values, strict=True):
            part.adaption_prompt.copy_(prompt)
            part.adaption_gate.copy_(gate)
    torch.testing.assert_close(LLAMA.output(merged), expected, rtol=1e-4, atol=1e-5)


def test_several_prompts_add_up_and_merging_is_refused() -> None:
    model = LLAMA.model()
    bare = LLAMA.output(model)
    for seed, name in enumerate(("a", "b")):
        grafts.add(model, grafts.AdaptionPromptConfig(adapter_len=3, adapter_layers=1), name=name)
        randomise(model, name, seed=seed)
    alone = [LLAMA.output(grafts.activate(model, name)) - bare for name in "ab"]
    both = LLAMA.output(grafts.activate(model, ["a", "b"])) - bare
    assert (both - alone[0]).abs().max() > 1e-4
    assert (both - alone[1]).abs().max() > 1e-4
    with pytest.raises(grafts.MergeError, match="Adaption prompt has no exact merge"):
        grafts.merge(model, "a")


def test_a_prompt_bias_that_nothing_takes_is_an_error() -> None:
    model = LLAMA.model()
    grafts.add(model, grafts.LoraConfig(), name="lora")
    grafts.add(model, grafts.AdaptionPromptConfig(), name="en", activate=False)
    bias = noise(2, 1, 16)
    with pytest.raises(grafts.StateError, match="no adapter that acts in this call takes it"):
        model(input_ids=ids(), prompt_bias=bias)
    with pytest.raises(grafts.StateError, match="no adapter that acts in this call takes it"):
        model.generate(ids(), prompt_bias=bias, max_new_tokens=2)
    model(input_ids=ids(), prompt_bias=bias, adapter_names=["en", None])
    grafts.activate(model, "en")(input_ids=ids(), prompt_bias=bias)


def test_a_prompt_bias_of_another_size_is_an_error_of_pytorch_and_leaves_nothing() -> None:
    model = LLAMA.model()
    grafts.add(model, grafts.AdaptionPromptConfig(), name="en")
    before = LLAMA.output(model)
    with pytest.raises(RuntimeError):
        model(input_ids=ids(), prompt_bias=noise(2, 1, 7))
    assert torch.equal(LLAMA.output(model), before)


def face() -> grafts.AdaptionPromptModel:
    model = grafts.AdaptionPromptModel(
        LLAMA.model(), {"one": grafts.AdaptionPromptConfig(adapter_len=4)}, "one"
    )
    model.add_adapter("two", grafts.AdaptionPromptConfig(adapter_len=6, adapter_layers=1))
    for seed, name in enumerate(("one", "two")):
        randomise(model.model, name, seed=seed)
    return model


def test_the_model_class_of_peft_holds_several_and_switches_by_pointer() -> None:
    model = face()
    bare = LLAMA.output(LLAMA.model())
    assert model.active_adapters == ["one"]
    assert list(model.peft_config) == ["one", "two"]
    modules = {path: id(module) for path, module in model.model.named_modules()}
    one = LLAMA.output(model)
    model.set_adapter("two")
    two = LLAMA.output(model)
    assert {path: id(module) for path, module in model.model.named_modules()} == modules
    assert not torch.allclose(one, two)
    model.disable_adapter_layers()
    assert torch.equal(LLAMA.output(model), bare)
    model.set_adapter("one")
    assert torch.equal(LLAMA.output(model), bare)
    model.enable_adapter_layers()
    assert torch.equal(LLAMA.output(model), one)
    status = grafts.adapters(model.model)
    assert (status["one"].trainable, status["two"].trainable) == (True, False)
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert torch.equal(LLAMA.output(model), two)
    model.disable_adapter_layers()
    model.delete_adapter("two")
    model.enable_adapter_layers()
    assert torch.equal(LLAMA.output(model), bare)


def test_the_model_class_of_peft_refuses_what_cannot_be() -> None:
    model = face()
    with pytest.raises(grafts.AdapterNameError, match="no adapter is called 'three'"):
        model.set_adapter("three")
    with pytest.raises(grafts.AdapterNameError, match="called 'one' already"):
        model.add_adapter("one", grafts.AdaptionPromptConfig())
    with pytest.raises(grafts.ConfigError, match="adapter_layers is 9, and there are 2"):
        model.add_adapter("three", grafts.AdaptionPromptConfig(adapter_layers=9))
    with pytest.raises(grafts.ConfigError, match="takes AdaptionPromptConfig, not LoraConfig"):
        model.add_adapter("three", grafts.LoraConfig())
    with pytest.raises(grafts.AdapterNameError):
        model.delete_adapter("three")
    assert list(model.peft_config) == ["one", "two"]
