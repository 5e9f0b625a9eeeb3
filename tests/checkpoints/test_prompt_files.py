"""Files and outputs of adaption prompts, prefixes and virtual tokens against `peft` 0.21, in both directions,
in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME, Base
from helpers.closeness import assert_rounded
from helpers.peers import peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings(
        "ignore:.past_key_values. is deprecated:FutureWarning"
    ),  # peft 0.21 gives prefixes by that name
]


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return MistralForCausalLM(
        MistralConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, sliding_window=None)
    )


LLAMA, GPT2, T5, BERT = (BY_NAME[name] for name in ("llama", "gpt2", "t5", "bert"))
MISTRAL = Base("mistral", mistral, LLAMA.inputs)
CAUSAL, SEQ2SEQ, CLASSES = "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS"
PROMPT, P_TUNING = (
    (grafts.PromptTuningConfig, peft.PromptTuningConfig),
    (grafts.PromptEncoderConfig, peft.PromptEncoderConfig),
)
PREFIX, ADAPTION = (
    (grafts.PrefixTuningConfig, peft.PrefixTuningConfig),
    (grafts.AdaptionPromptConfig, peft.AdaptionPromptConfig),
)
CASES = {
    f"{base.name}-{name}": (base, configs, values | {"task_type": task})
    for base, task in ((LLAMA, CAUSAL), (GPT2, CAUSAL), (MISTRAL, CAUSAL))
    for name, configs, values in (
        ("adaption-prompt", ADAPTION, {"adapter_len": 4, "adapter_layers": 1}),
        ("prefix", PREFIX, {"num_virtual_tokens": 4}),
        ("prefix-zero", PREFIX, {"num_virtual_tokens": 4, "init_weights": "zero"}),
        (
            "prefix-projection",
            PREFIX,
            {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
        ),
        ("prompt", PROMPT, {"num_virtual_tokens": 4}),
        ("p-tuning", P_TUNING, {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
        ("p-tuning-lstm", P_TUNING, {"num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM"}),
    )
} | {
    f"t5-{name}": (T5, configs, {"num_virtual_tokens": 4, "task_type": SEQ2SEQ} | values)
    for name, configs, values in (
        ("prompt", PROMPT, {}),
        ("prompt-encoder-only", PROMPT, {"num_transformer_submodules": 1}),
        ("p-tuning", P_TUNING, {"encoder_hidden_size": 8}),
        ("p-tuning-lstm", P_TUNING, {"encoder_reparameterization_type": "LSTM"}),
    )
}
CASES["bert-prompt-classes"] = BERT, PROMPT, {"num_virtual_tokens": 4, "task_type": CLASSES}
CASES["bert-p-tuning-classes"] = BERT, P_TUNING, {"num_virtual_tokens": 4, "task_type": CLASSES}
each_case = pytest.mark.parametrize(("base", "configs", "values"), CASES.values(), ids=CASES)


def peft_output(base: Base, model: nn.Module) -> Tensor:
    """The output of `peft`, which does not cut virtual tokens off."""
    logits = base.output(model)
    if logits.dim() == 2:
        return logits
    return logits[:, -(4 if base is T5 else 7) :]


def written_by_peft(base: Base, config: peft.PeftConfig, path: Path) -> tuple[nn.Module, Tensor]:
    model = peft.get_peft_model(base.model(), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(path)
    return model, peft_output(base, model)


@torch.no_grad()
@each_case
def test_files_of_peft_give_its_outputs(base: Base, configs: tuple, values: dict, tmp_path: Path) -> None:
    _, expected = written_by_peft(base, configs[1](**values), tmp_path)
    model = base.model()
    bare = base.output(model)
    report = grafts.load(model, tmp_path, name="any name")
    torch.testing.assert_close(base.output(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bare, expected, atol=1e-6)
    assert report.tensors == len(load_file(tmp_path / "adapter_model.safetensors"))


@torch.no_grad()
@each_case
def test_peft_reads_our_files(base: Base, configs: tuple, values: dict, tmp_path: Path) -> None:
    model = base.model()
    legacy = {"after_projection": True} if base is GPT2 and configs is ADAPTION else {}
    grafts.add(model, configs[0](**values, **legacy), name="en")
    randomise(model, "en")
    grafts.save(model, "en", tmp_path / "ours")
    peers = peft.PeftModel.from_pretrained(base.model(), tmp_path / "ours").eval()
    torch.testing.assert_close(peft_output(base, peers), base.output(model), rtol=1e-5, atol=1e-5)

    written_by_peft(base, configs[1](**values), tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    beside = {name for name in ours if name.startswith("prompt_encoder.")}
    if base is T5 and theirs["prompt_embeddings"].shape[0] == 8:  # rows for the decoder, which nobody uses
        theirs["prompt_embeddings"] = theirs["prompt_embeddings"][:4]
    assert {n: t.shape for n, t in ours.items() if n not in beside} == {n: t.shape for n, t in theirs.items()}
    ours, theirs = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")
    )
    unsaid = {"peft_version", "num_transformer_submodules", "modules_to_save"}
    assert {k: v for k, v in theirs.items() if ours.get(k, "missing") != v and k not in unsaid} == {}
    assert set(ours) - set(theirs) <= {"after_projection", "count_positions"}


@each_case
def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(
    base: Base, configs: tuple, values: dict, tmp_path: Path
) -> None:
    def steps(model: nn.Module, count: int) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        for _ in range(count):
            base.output(model).square().mean().backward()
            with torch.no_grad():
                for parameter in trained:
                    assert parameter.grad is not None
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None

    model = base.model()
    grafts.add(model, configs[0](**values), name="en")
    with torch.no_grad():
        for parameter in (p for _, part in parts_of(model, "en") for p in part.parameters()):
            parameter.add_(0.01)  # a gate at 0 lets nothing else learn
    steps(model, 2)
    grafts.save(model, "en", tmp_path)
    again = base.model()
    grafts.load(again, tmp_path, name="en", train=True)
    assert_rounded(base.output(again), base.output(model))
    trained, resumed = ([n for n, p in m.named_parameters() if p.requires_grad] for m in (model, again))
    assert trained == resumed
    for one in (model, again):
        steps(one, 2)
    assert_rounded(base.output(again), base.output(model))


def test_a_file_without_the_network_is_flat_and_says_so_when_it_is_written_again(tmp_path: Path) -> None:
    _, expected = written_by_peft(
        LLAMA, peft.PromptEncoderConfig(num_virtual_tokens=4, task_type=CAUSAL), tmp_path
    )
    model = LLAMA.model()
    grafts.load(model, tmp_path, name="en", train=True)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.grafts_model.en.prompt"]
    grafts.save(model, "en", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["flat"] is True
    grafts.load(LLAMA.model(), tmp_path / "again")
    torch.testing.assert_close(LLAMA.output(model), expected)


def test_gpt2_prompts_say_where_they_add(tmp_path: Path) -> None:
    model = GPT2.model()
    grafts.add(model, grafts.AdaptionPromptConfig(adapter_len=4), name="en")
    randomise(model, "en")
    before = GPT2.output(model)
    grafts.save(model, "en", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["after_projection"] is False
    again = GPT2.model()
    grafts.load(again, tmp_path)
    assert_rounded(GPT2.output(again), before)
    legacy = GPT2.model()
    grafts.add(legacy, grafts.AdaptionPromptConfig(adapter_len=4, after_projection=True), name="en")
    randomise(legacy, "en")
    assert not torch.allclose(GPT2.output(legacy), before)


def bart(layers: int = 2) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": layers, "decoder_layers": layers, "encoder_attention_heads": 2}
    sizes |= {
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "vocab_size": 50,
        "pad_token_id": 0,
    }
    return BartForConditionalGeneration(BartConfig(**sizes, bos_token_id=1, eos_token_id=2, init_std=0.5))


def deep_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@torch.no_grad()
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("build", [bart, lambda: bart(3), deep_t5], ids=["bart", "bart-3", "t5-3"])
def test_prefixes_of_peft_for_encoder_decoders_give_its_outputs(
    build: object, projection: bool, tmp_path: Path
) -> None:
    base = Base("both", build, T5.inputs)  # type: ignore[arg-type]
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type=SEQ2SEQ, prefix_projection=projection)
    _, expected = written_by_peft(base, config, tmp_path)
    model = base.model()
    bare = base.output(model)
    grafts.load(model, tmp_path)
    torch.testing.assert_close(base.output(model), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bare, expected, atol=1e-3)
    grafts.save(model, "default", tmp_path / "again")
    grafts.load(again := base.model(), tmp_path / "again")
    assert_rounded(base.output(again), base.output(model))


def test_a_prefix_of_peft_for_another_encoder_decoder_is_told(tmp_path: Path) -> None:
    written_by_peft(
        Base("t5", deep_t5, T5.inputs),
        peft.PrefixTuningConfig(num_virtual_tokens=4, task_type=SEQ2SEQ),
        tmp_path,
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_layers": 2}))
    with pytest.raises(
        grafts.CheckpointError, match=r"\(4, 96\) in the file and \(4, 64\) for 2 layers here"
    ):
        grafts.load(T5.model(), tmp_path)


def test_a_prefix_of_another_model_and_a_missing_one_are_told_apart(tmp_path: Path) -> None:
    grafts.add(model := LLAMA.model(), grafts.PrefixTuningConfig(num_virtual_tokens=4), name="en")
    grafts.save(model, "en", tmp_path)
    with pytest.raises(grafts.CheckpointError, match=r"\(4, 32\) in the file and \(4, 64\) here"):
        grafts.load(GPT2.model(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"else": torch.zeros(2)}, file)
    with pytest.raises(
        grafts.CheckpointError, match="missing 'prompt_embeddings' in the file; it holds else"
    ):
        grafts.load(LLAMA.model(), tmp_path)
    save_file({"prompt_embeddings": torch.zeros(4, 32), "base_model.lm_head.weight": torch.zeros(2)}, file)
    fresh = LLAMA.model()
    with pytest.raises(grafts.CheckpointError, match=r"unexpected 'lm_head.weight' in the file"):
        grafts.load(fresh, tmp_path)
    assert grafts.adapters(fresh) == {}


@torch.no_grad()
def test_prefix_of_a_bare_encoder_and_its_head_in_the_file(tmp_path: Path) -> None:
    config = grafts.PrefixTuningConfig(
        num_virtual_tokens=4, task_type=CLASSES, use_gating=True, count_positions=False
    )
    grafts.add(model := BERT.model(), config, name="en")
    randomise(model, "en")
    grafts.save(model, "en", tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    gates = {
        f"base_model.bert.encoder.layer.{i}.attention.self.gate.{n}"
        for i in (0, 1)
        for n in ("weight", "bias")
    }
    assert (
        names == {"prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"} | gates
    )
    grafts.load(again := BERT.model(), tmp_path)
    assert_rounded(BERT.output(again), BERT.output(model))


def test_the_number_of_virtual_tokens_on_both_stacks_of_bart(tmp_path: Path) -> None:
    base = Base("bart", bart, T5.inputs)
    config = grafts.PromptTuningConfig(num_virtual_tokens=4, decoder_tokens=True)
    grafts.add(model := base.model(), config, name="en")
    randomise(model, "en")
    grafts.save(model, "en", tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].shape == (8, 16)
    grafts.load(again := base.model(), tmp_path)
    assert_rounded(base.output(again), base.output(model))
