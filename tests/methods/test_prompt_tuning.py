"""Prompt tuning: how the virtual tokens start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.bases import BY_NAME

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LLAMA, T5, BERT, VIT = (BY_NAME[name] for name in ("llama", "t5", "bert", "vit"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[UNK]", "classify", "the", "mood", "of", "this"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("count", "expected"), [(3, [1, 2, 3]), (5, [1, 2, 3, 1, 2])])
def test_a_prompt_starts_as_a_text_repeated_or_cut(count: int, expected: list[int], tokenizer: Path) -> None:
    config = grafts.PromptTuningConfig(
        num_virtual_tokens=count,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="classify the mood",
        tokenizer_name_or_path=str(tokenizer),
    )
    model = LLAMA.model()
    grafts.add(model, config, name="en")
    [(_, part)] = parts_of(model, "en")
    assert torch.equal(part.prompt, model.get_input_embeddings().weight[expected])
    grafts.save(model, "en", tokenizer / "saved")
    with torch.no_grad():
        part.prompt.add_(1)
    (tokenizer / "tokenizer.json").unlink()  # a file brings its own values and asks for no tokenizer
    grafts.load(again := LLAMA.model(), tokenizer / "saved")
    assert torch.equal(parts_of(again, "default")[0][1].prompt, again.get_input_embeddings().weight[expected])


def test_a_tokenizer_or_a_text_that_is_not_there_is_named(tokenizer: Path) -> None:
    def config(**values: object) -> grafts.AdapterConfig:
        given = {"prompt_tuning_init_text": "the mood", "tokenizer_name_or_path": str(tokenizer)} | values
        return grafts.PromptTuningConfig(prompt_tuning_init="TEXT", **given)

    for values, message in (
        ({"tokenizer_name_or_path": str(tokenizer / "none")}, "tokenizer_name_or_path="),
        ({"prompt_tuning_init_text": "   "}, "has no tokens"),
    ):
        model = LLAMA.model()
        with pytest.raises(grafts.ConfigError, match=message):
            grafts.add(model, config(**values))
        assert grafts.adapters(model) == {}


def test_a_prompt_starts_with_tokens_of_the_vocabulary() -> None:
    model = LLAMA.model()
    grafts.add(
        model, grafts.PromptTuningConfig(num_virtual_tokens=6, prompt_tuning_init="SAMPLE_VOCAB"), name="en"
    )
    [(_, part)] = parts_of(model, "en")
    rows = model.get_input_embeddings().weight
    assert all((rows == token).all(-1).any() for token in part.prompt)
