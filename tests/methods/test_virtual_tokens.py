"""Prefix tuning, prompt tuning and p-tuning: their configs, how they start, and where they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import grafts
from bases import BY_NAME, ids
from caches import going_on
from closeness import assert_rounded
from conftest import randomise
from grafts.lifecycle.registry import parts_of

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
