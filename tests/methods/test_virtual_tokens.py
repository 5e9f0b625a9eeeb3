"""What methods with virtual tokens have in common: their configs, number formats and heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LLAMA, T5, BERT, VIT = (BY_NAME[name] for name in ("llama", "t5", "bert", "vit"))


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (
            grafts.PromptTuningConfig,
            {"num_virtual_tokens": 0},
            "num_virtual_tokens is 0; it must be a positive number",
        ),
        (grafts.PromptTuningConfig, {"prompt_tuning_init": "WORDS"}, "one of RANDOM, TEXT, SAMPLE_VOCAB"),
        (
            grafts.PromptTuningConfig,
            {"prompt_tuning_init": "TEXT"},
            "given where prompt_tuning_init is 'TEXT'",
        ),
        (
            grafts.PromptTuningConfig,
            {"tokenizer_kwargs": {"trust_remote_code": True}},
            "would run code of the tokenizer",
        ),
        (grafts.PromptTuningConfig, {"num_transformer_submodules": 3}, "it must be 1 or 2"),
        (grafts.PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, "'MLP' or 'LSTM'"),
        (grafts.PromptEncoderConfig, {"encoder_dropout": 1.0}, "at least 0 and below 1"),
        (grafts.PromptEncoderConfig, {"encoder_hidden_size": -2}, "encoder_hidden_size is -2"),
        (grafts.PromptEncoderConfig, {"encoder_num_layers": 0}, "encoder_num_layers is 0"),
        (grafts.PrefixTuningConfig, {"init_weights": "one"}, "'zero' or left out"),
        (grafts.PrefixTuningConfig, {"attention": ("self", "all")}, "some of self, cross, encoder"),
        (grafts.PrefixTuningConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size is 0"),
    ],
)
def test_values_that_cannot_be_are_refused(config: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        config(**values)


def test_half_precision_keeps_its_dtype_and_stores_float32() -> None:
    for config in (grafts.PromptTuningConfig(), grafts.PrefixTuningConfig(prefix_projection=True)):
        model = LLAMA.model(torch.bfloat16)
        grafts.add(model, config, name="en")
        assert LLAMA.output(model).dtype == torch.bfloat16
        assert {p.dtype for _, part in parts_of(model, "en") for p in part.parameters()} == {torch.float32}


def test_heads_are_saved_with_the_tokens(tmp_path: Path) -> None:
    model = BERT.model()
    grafts.add(model, grafts.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"), name="en")
    randomise(model, "en")
    grafts.save(model, "en", tmp_path)
    again = BERT.model()
    grafts.load(again, tmp_path, name="en", train=True)
    assert_rounded(BERT.output(again), BERT.output(model))
    assert any("classifier" in name for name, p in again.named_parameters() if p.requires_grad)
