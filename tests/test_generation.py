"""`generate` with every method that acts on attention or input equals a plain loop over full forwards without
a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import shake
from helpers.bases import ids
from helpers.caches import cache_of, going_on

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*generation flags.*:UserWarning"),
]
NEW = 7
SPECIAL = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def decoder(name: str) -> Callable[[], nn.Module]:
    """Models whose random weights are large enough that tokens differ."""

    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        if name == "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "initializer_range": 0.3}
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SPECIAL, **sizes))
        if name == "t5":
            sizes = {
                "d_model": 32,
                "d_ff": 48,
                "d_kv": 8,
                "num_layers": 2,
                "num_heads": 4,
                "initializer_factor": 3.0,
            }
            special = SPECIAL | {"decoder_start_token_id": 0}
            return transformers.T5ForConditionalGeneration(transformers.T5Config(**special, **sizes))
        if name == "bart":
            sizes = {
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "init_std": 0.3,
            }
            sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
            special = SPECIAL | {
                "decoder_start_token_id": 0,
                "forced_eos_token_id": None,
                "max_position_embeddings": 64,
            }
            return transformers.BartForConditionalGeneration(transformers.BartConfig(**special, **sizes))
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 64}
        if name == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SPECIAL, **sizes))
        return transformers.MistralForCausalLM(
            transformers.MistralConfig(**SPECIAL, **sizes, sliding_window=6)
        )

    return build


CONFIGS = {
    "adaption-prompt": grafts.AdaptionPromptConfig(adapter_len=4),
    "prefix": grafts.PrefixTuningConfig(num_virtual_tokens=3),
    "prefix-not-counted": grafts.PrefixTuningConfig(num_virtual_tokens=3, count_positions=False),
    "prefix-mlp": grafts.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "prompt": grafts.PromptTuningConfig(num_virtual_tokens=3),
    "prompt-after-bos": grafts.PromptTuningConfig(num_virtual_tokens=3, after_first=True),
    "p-tuning": grafts.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="LSTM"),
}
OPTIONS = {
    "greedy": {},
    "no-cache": {"use_cache": False},
    "static-cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams-static-cache": {"num_beams": 2, "cache_implementation": "static"},
    "sampling": {"do_sample": True},
}
each_model = pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mistral"])
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(name: str, config: grafts.AdapterConfig, names: tuple[str, ...] = ("en",)) -> nn.Module:
    model = decoder(name)().eval().requires_grad_(False)
    for seed, adapter in enumerate(names):
        grafts.add(model, config, name=adapter)
        shake(model, adapter, seed)
    return model


def full_forward(model: nn.Module, tokens: Tensor, mask: Tensor, decoded: Tensor | None) -> Tensor:
    """The last token's logits, from everything at once."""
    if decoded is not None:
        return model(
            input_ids=tokens, attention_mask=mask, decoder_input_ids=decoded, use_cache=False
        ).logits[:, -1]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]


def slow(model: nn.Module, tokens: Tensor, mask: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """A loop over full forwards."""
    decoded = torch.zeros(len(tokens), 1, dtype=torch.long) if model.config.is_encoder_decoder else None
    for _ in range(NEW):
        token = choose(full_forward(model, tokens, mask, decoded))
        if decoded is None:
            tokens, mask = torch.cat([tokens, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        else:
            decoded = torch.cat([decoded, token], 1)
    return tokens if decoded is None else decoded


def slow_beams(model: nn.Module, tokens: Tensor, mask: Tensor, beams: int) -> Tensor:
    """Beam search over full forwards, a row at a time: nothing ends early, so the best sum of log
    probabilities wins.
    """
    best = []
    for row in range(len(tokens)):
        sequences, scores = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1)
        for _ in range(NEW):
            several = (
                tokens[row : row + 1].expand(len(sequences), -1),
                mask[row : row + 1].expand(len(sequences), -1),
            )
            if model.config.is_encoder_decoder:
                start = torch.zeros(len(sequences), 1, dtype=torch.long)
                logits = full_forward(model, *several, torch.cat([start, sequences], 1))
            else:
                together = torch.cat([several[0], sequences], 1)
                logits = full_forward(
                    model, together, torch.cat([several[1], torch.ones_like(sequences)], 1), None
                )
            scores, index = (scores[:, None] + logits.log_softmax(-1)).flatten().topk(beams)
            taken = torch.cat([sequences[index // 60], index[:, None] % 60], 1)
            sequences = taken
        best.append(sequences[0])
    new = torch.stack(best)
    return torch.cat(
        [torch.zeros(len(tokens), 1, dtype=torch.long) if model.config.is_encoder_decoder else tokens, new], 1
    )


def batch(side: str | None = None) -> tuple[Tensor, Tensor]:
    tokens = ids(rows=3, length=5, vocab=60)
    mask = torch.ones_like(tokens)
    if side == "left":
        mask[0, :2] = 0
    return tokens * mask, mask


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_config
@each_model
def test_generate_equals_a_loop_over_full_forwards(
    name: str, config: grafts.AdapterConfig, options: dict[str, object], padding: str | None
) -> None:
    model = model_of(name, config)
    tokens, mask = batch(padding)
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask} | options
    torch.manual_seed(7)
    result = model.generate(tokens, **settings)
    torch.manual_seed(7)
    if "num_beams" in options:
        expected = slow_beams(model, tokens, mask, int(options["num_beams"]))
    elif "do_sample" in options:
        # the default of `generate` looks at the 50 most likely tokens
        def sampled(logits: Tensor) -> Tensor:
            least = logits.topk(50)[0][:, -1:]
            return torch.multinomial(logits.masked_fill(logits < least, -torch.inf).softmax(-1), 1)

        expected = slow(model, tokens, mask, sampled)
    else:
        expected = slow(model, tokens, mask, lambda logits: logits.argmax(-1, keepdim=True))
    assert torch.equal(result, expected)
    decoded = torch.zeros(3, 1, dtype=torch.long) if name == "t5" else None
    moved = full_forward(model, tokens, mask, decoded)
    assert not torch.allclose(moved, full_forward(grafts.deactivate(model), tokens, mask, decoded), atol=1e-2)


@torch.no_grad()
@each_config
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_generation_goes_on_from_a_returned_cache(name: str, config: grafts.AdapterConfig) -> None:
    model = model_of(name, config)
    tokens, mask = batch()
    whole = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    begun = model.generate(
        tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    for cache in (copy.deepcopy(cache_of(begun)), cache_of(begun)):
        more = model.generate(
            begun.sequences,
            attention_mask=torch.ones_like(begun.sequences),
            **going_on(cache),
            max_new_tokens=NEW - 3,
            do_sample=False,
        )
        assert torch.equal(more, whole)


@torch.no_grad()
@each_config
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_loop_of_ones_own_with_a_cache_gives_the_same(name: str, config: grafts.AdapterConfig) -> None:
    model = model_of(name, config)
    tokens, mask = batch()
    expected = slow(model, tokens, mask, lambda logits: logits.argmax(-1, keepdim=True))
    output, result = model(input_ids=tokens, use_cache=True), tokens
    for step in range(NEW):
        assert cache_of(output).get_seq_length() == tokens.shape[1] + step  # without virtual tokens
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        result = torch.cat([result, token], 1)
        output = model(input_ids=token, **going_on(cache_of(output)), use_cache=True)
    assert torch.equal(result, expected)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@each_config
@each_model
def test_rows_with_adapters_of_their_own_generate_what_they_generate_alone(
    name: str, config: grafts.AdapterConfig, options: dict[str, object]
) -> None:
    model = model_of(name, config, ("en", "de"))
    if hasattr(config, "num_virtual_tokens") and name != "t5":  # another number of virtual tokens
        import dataclasses

        grafts.delete(model, "de")
        grafts.add(model, dataclasses.replace(config, num_virtual_tokens=5), name="de")
        shake(model, "de", 1)
    tokens, mask = batch("left")
    names = ["de", None, "en"]
    settings = {"max_new_tokens": NEW, "do_sample": False} | options
    together = model.generate(tokens, attention_mask=mask, adapter_names=names, **settings)
    for row, adapter in enumerate(names):
        grafts.activate(model, () if adapter is None else adapter)
        own = mask[row].bool() if not model.config.is_encoder_decoder else slice(None)
        alone = model.generate(
            tokens[row : row + 1, own], attention_mask=mask[row : row + 1, own], **settings
        )
        length = alone.shape[1]
        assert torch.equal(together[row, -length:], alone[0])


@torch.no_grad()
def test_one_static_cache_serves_several_prompts_one_after_the_other() -> None:
    from transformers import StaticCache

    model = model_of("llama", CONFIGS["prompt"])
    grafts.add(model, grafts.PromptTuningConfig(num_virtual_tokens=6), name="longer")
    tokens, mask = batch()
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + NEW)
    for adapter in ("en", "longer", "en", ()):
        grafts.activate(model, adapter)
        cache.reset()
        static = model.generate(
            tokens, attention_mask=mask, **going_on(cache), max_new_tokens=NEW, do_sample=False
        )
        assert torch.equal(
            static, model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        )


def test_cache_lengths_and_cropping_count_tokens_only() -> None:
    model = model_of("llama", CONFIGS["prompt"])
    tokens, _ = batch()
    cache = cache_of(model(input_ids=tokens, use_cache=True))
    assert cache.get_seq_length() == 5
    assert cache.layers[0].keys.shape[2] == 8
    cache.crop(-1)
    assert cache.get_seq_length() == 4
    again = model(input_ids=tokens[:, 4:], **going_on(cache)).logits[:, -1]
    torch.testing.assert_close(again, model(input_ids=tokens).logits[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("how", ["assistant", "lookup", "chunks"])
@each_config
def test_other_ways_of_generating_give_the_same_tokens(config: grafts.AdapterConfig, how: str) -> None:
    model = model_of("llama", config)
    tokens, _ = batch()
    row = tokens[:1]
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 59}
    expected = model.generate(row, **settings)
    more = {
        "assistant": lambda: {"assistant_model": decoder("llama")().eval()},
        "lookup": lambda: {"prompt_lookup_num_tokens": 2},
        "chunks": lambda: {"prefill_chunk_size": 2},
    }[how]()
    assert torch.equal(model.generate(row, **settings, **more), expected)
    embeds = model.get_input_embeddings()(row)
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings), expected[:, row.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_counted_prefixes_of_encoder_decoders_generate_as_full_forwards(
    name: str, options: dict[str, object]
) -> None:
    config = grafts.PrefixTuningConfig(num_virtual_tokens=3, count_positions=True)
    model = model_of(name, config)
    tokens, mask = batch()
    result = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
    if "num_beams" in options:
        expected = slow_beams(model, tokens, mask, 3)
    else:
        expected = slow(model, tokens, mask, lambda logits: logits.argmax(-1, keepdim=True))
    assert torch.equal(result, expected)
    counted = full_forward(model, tokens, mask, expected)
    grafts.add(
        model, grafts.PrefixTuningConfig(num_virtual_tokens=3, count_positions=False), name="not counted"
    )
    for (_, part), (_, other) in zip(parts_of(model, "not counted"), parts_of(model, "en"), strict=False):
        part.prefix.copy_(other.prefix if hasattr(other, "prefix") else part.prefix)
    assert not torch.allclose(full_forward(model, tokens, mask, expected), counted, atol=1e-3)
