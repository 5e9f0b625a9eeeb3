"""The input site: virtual tokens go in and come out again, against doing it by hand with `inputs_embeds`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import BY_NAME, Base, ids
from helpers.caches import cache_of, going_on

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LLAMA, GPT2, BERT, T5 = (BY_NAME[name] for name in ("llama", "gpt2", "bert", "t5"))
PROMPT = grafts.PromptTuningConfig(num_virtual_tokens=3)


def prompted(model: nn.Module, config: grafts.AdapterConfig = PROMPT, name: str = "en") -> nn.Module:
    grafts.add(model, config, name=name)
    randomise(model, name)
    return model


def prompt_of(model: nn.Module, name: str = "en") -> Tensor:
    return torch.cat([part.virtual_tokens() for _, part in parts_of(model, name) if part.length]).detach()


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 50}
    return BartForConditionalGeneration(BartConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))


BART = Base("bart", bart, T5.inputs, embeds=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=lambda base: base.name)
def test_decoder_logits_and_loss_are_those_of_embeddings_put_in_by_hand(base: Base, masked: bool) -> None:
    model = prompted(base.model())
    twin = base.model()
    tokens, virtual = ids(), prompt_of(model)[None].expand(2, -1, -1)
    mask = torch.ones_like(tokens)
    if masked:
        mask[0, :2] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    embeds = torch.cat([virtual, twin.get_input_embeddings()(tokens)], 1)
    longer = torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1)
    expected = twin(
        inputs_embeds=embeds, attention_mask=longer, labels=torch.cat([torch.full((2, 3), -100), labels], 1)
    )
    result = model(
        input_ids=tokens, attention_mask=mask if masked else None, labels=labels, output_hidden_states=True
    )
    torch.testing.assert_close(result.logits, expected.logits[:, 3:], rtol=1e-5, atol=1e-5)
    assert all(hidden.shape == (2, 7, 16) for hidden in result.hidden_states)
    own = nn.functional.cross_entropy(expected.logits[:, 3:-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(
        result.loss, own
    )  # by hand there is one token more to tell: the first, from the last virtual one


def test_inputs_embeds_tuples_and_positions_given_are_served() -> None:
    model = prompted(LLAMA.model())
    tokens = ids()
    expected = model(input_ids=tokens).logits
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model(input_ids=tokens, position_ids=torch.arange(7)[None]).logits, expected)
    as_tuple = model(input_ids=tokens, return_dict=False, output_hidden_states=True, output_attentions=False)
    assert torch.equal(as_tuple[0], expected)
    model.set_attn_implementation("eager")
    weights = model(input_ids=tokens, output_attentions=True).attentions
    assert all(w.shape == (2, 4, 7, 10) for w in weights)
    with pytest.raises(grafts.StateError, match=r"\(batch, tokens\)"):
        model(input_ids=tokens, attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BertForSequenceClassification", (2, 3)),
        ("BertForTokenClassification", (2, 7, 3)),
        ("BertForMaskedLM", (2, 7, 50)),
        ("BertModel", (2, 7, 16)),
    ],
)
def test_encoders_give_what_embeddings_put_in_by_hand_give(name: str, shape: tuple[int, ...]) -> None:
    import transformers

    base = Base(name, lambda: getattr(transformers, name)(bases.bert_config()), BERT.inputs, embeds=True)
    model, twin = prompted(base.model()), base.model()
    tokens, mask = ids(), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    types = torch.zeros_like(tokens)
    types[:, 3:] = 1
    result = model(input_ids=tokens, attention_mask=mask, token_type_ids=types)
    body = twin.base_model
    by_hand = body(
        inputs_embeds=torch.cat(
            [prompt_of(model)[None].expand(2, -1, -1), body.embeddings.word_embeddings(tokens)], 1
        ),
        attention_mask=torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1),
        token_type_ids=torch.cat([torch.zeros(2, 3, dtype=torch.long), types], 1),
    )
    hidden = by_hand.last_hidden_state[:, 3:]
    if name == "BertModel":
        assert torch.allclose(result.pooler_output, by_hand.pooler_output, atol=1e-6)
        logits = expected = None
        assert torch.allclose(result.last_hidden_state, hidden, atol=1e-6)
        return
    head = {"BertForMaskedLM": "cls"}.get(name, "classifier")
    expected = getattr(twin, head)(by_hand.pooler_output if "Sequence" in name else hidden)
    logits = result.logits
    assert logits.shape == shape
    assert torch.allclose(logits, expected, atol=1e-6)


def test_question_answering_points_at_tokens() -> None:
    from transformers import BertForQuestionAnswering

    def build() -> nn.Module:
        config = bases.bert_config()
        config.num_labels = 2
        return BertForQuestionAnswering(config)

    base = Base("qa", build, BERT.inputs, embeds=True)
    model = prompted(base.model(), grafts.PromptEncoderConfig(num_virtual_tokens=3, task_type="QUESTION_ANS"))
    result = model(input_ids=ids(), start_positions=torch.tensor([0, 6]), end_positions=torch.tensor([1, 6]))
    assert result.start_logits.shape == result.end_logits.shape == (2, 7)
    assert torch.isfinite(result.loss)


def test_a_classifier_of_a_decoder_reads_its_last_token_and_not_the_padding() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    base = Base(
        "score", lambda: LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=0)), LLAMA.inputs
    )
    model = prompted(base.model())
    tokens = ids(length=5)
    alone = model(input_ids=tokens[:1]).logits
    padded = torch.cat([torch.cat([tokens[:1], torch.zeros(1, 2, dtype=torch.long)], 1), ids(rows=1)])
    # `peft` gives the model embeddings only, and so reads the padding here
    assert torch.allclose(
        model(input_ids=padded, attention_mask=(padded != 0).long()).logits[:1], alone, atol=1e-6
    )


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("base", [T5, BART], ids=lambda base: base.name)
def test_encoder_decoders_have_tokens_in_front_of_both_or_of_the_encoder(base: Base, both: bool) -> None:
    model = prompted(base.model(), grafts.PromptTuningConfig(num_virtual_tokens=3, decoder_tokens=both))
    twin = base.model()
    inputs = base.inputs()
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 5:] = 0
    virtual = prompt_of(model)
    assert len(virtual) == (6 if both else 3)
    encoder, decoder = twin.get_encoder(), twin.get_decoder()
    longer = torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1)
    embeds = torch.cat(
        [virtual[None, :3].expand(2, -1, -1), encoder.get_input_embeddings()(inputs["input_ids"])], 1
    )
    decoded = decoder.get_input_embeddings()(inputs["decoder_input_ids"])
    if both:
        decoded = torch.cat([virtual[None, 3:].expand(2, -1, -1), decoded], 1)
    expected = twin(inputs_embeds=embeds, attention_mask=longer, decoder_inputs_embeds=decoded).logits
    result = model(**inputs, attention_mask=mask)
    torch.testing.assert_close(result.logits, expected[:, -4:], rtol=1e-5, atol=1e-5)
    assert result.encoder_last_hidden_state.shape[1] == 10  # the decoder attends to all of it


def test_tokens_after_the_first_stand_behind_each_rows_own() -> None:
    model = prompted(LLAMA.model(), grafts.PromptTuningConfig(num_virtual_tokens=3, after_first=True))
    twin = LLAMA.model()
    tokens = ids(rows=1, length=5)
    embeds = twin.get_input_embeddings()(tokens)
    by_hand = torch.cat([embeds[:, :1], prompt_of(model)[None], embeds[:, 1:]], 1)
    logits = twin(inputs_embeds=by_hand).logits
    expected = torch.cat([logits[:, :1], logits[:, 4:]], 1)
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens], 1)
    mask = (padded != 0).long()
    result = model(
        input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    ).logits[:, 2:]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    prompted(model, PROMPT, "front")
    grafts.activate(model, ["en", "front"])
    with pytest.raises(grafts.StateError, match="cannot act together"):
        model(input_ids=tokens)


def test_several_prompts_stand_one_behind_the_other_and_beside_other_methods() -> None:
    model = prompted(LLAMA.model())
    prompted(model, grafts.PromptEncoderConfig(num_virtual_tokens=2), "de")
    prompted(model, grafts.LoraConfig(), "lora")
    prompted(model, grafts.PrefixTuningConfig(num_virtual_tokens=4), "prefix")
    tokens = ids()
    grafts.activate(model, ["en", "de"])
    both = model(input_ids=tokens).logits
    twin = LLAMA.model()
    virtual = torch.cat([prompt_of(model, "en"), prompt_of(model, "de")])[None].expand(2, -1, -1)
    by_hand = twin(inputs_embeds=torch.cat([virtual, twin.get_input_embeddings()(tokens)], 1)).logits[:, 5:]
    torch.testing.assert_close(both, by_hand, rtol=1e-5, atol=1e-5)
    grafts.activate(model, ["lora", "prefix", "en"])
    everything = model(input_ids=tokens).logits
    for left_out in (["lora", "prefix"], ["lora", "en"], ["prefix", "en"]):
        assert not torch.allclose(model(input_ids=tokens).logits, model(input_ids=tokens).logits + 1)
        assert not torch.allclose(grafts.activate(model, left_out)(input_ids=tokens).logits, everything)


def test_rows_that_cannot_have_different_lengths_are_an_error() -> None:
    model = prompted(BART.model())
    with pytest.raises(grafts.StateError, match="takes no position_ids"):
        model(**BART.inputs(), adapter_names=["en", None])
    assert model(**BART.inputs(), adapter_names=["en", "en"]).logits.shape == (2, 4, 50)


def test_an_old_cache_goes_on_with_the_tokens_that_it_holds() -> None:
    model = prompted(LLAMA.model())
    prompted(model, PROMPT, "de")
    tokens = ids()
    whole = model(input_ids=tokens).logits[:, -1]
    grafts.activate(model, "en")
    expected = model(input_ids=tokens).logits[:, -1]
    cache = cache_of(model(input_ids=tokens[:, :-1], use_cache=True))
    twin = copy.deepcopy(cache)
    grafts.deactivate(model)
    for one in (cache, twin):
        torch.testing.assert_close(model(input_ids=tokens[:, -1:], **going_on(one)).logits[:, -1], expected)
    assert not torch.allclose(whole, expected)


def test_models_without_a_place_for_tokens_say_so() -> None:
    with pytest.raises(grafts.UnmatchedTargetError, match="no modules that are recognised as"):
        grafts.add(BY_NAME["vit"].model(), PROMPT)
    with pytest.raises(grafts.UnmatchedTargetError, match="no modules that are recognised as"):
        grafts.add(BY_NAME["sdpa"].model(), PROMPT)


def test_a_model_of_ones_own_that_takes_embeddings_is_served() -> None:
    class Own(bases.SDPATransformer):
        """A decoder that can be given embeddings."""

        def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
            for block in self.blocks:
                x = block(x)
            return self.lm_head(x)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embed

    torch.manual_seed(0)
    model = prompted(Own().eval())
    assert model(ids()).shape == (2, 7, 50)
    expected = grafts.deactivate(model)(
        inputs_embeds=torch.cat([prompt_of(model)[None], model.embed(ids(rows=1))], 1)
    )[:, 3:]
    torch.testing.assert_close(grafts.activate(model, "en")(ids(rows=1)), expected)


def test_tokens_behind_the_embeddings_have_no_positions_and_no_norm_of_their_own() -> None:
    import transformers

    base = Base("bert", lambda: transformers.BertModel(bases.bert_config()), BERT.inputs)
    config = grafts.PromptTuningConfig(num_virtual_tokens=3, after_embeddings=True)
    model, twin = prompted(base.model(), config), base.model()
    virtual = prompt_of(model)[None].expand(2, -1, -1)
    if transformers.__version__ < "5":
        pytest.skip("the reference cannot be had: masks are made for as many queries as there were tokens")
    twin.embeddings.register_forward_hook(lambda module, args, output: torch.cat([virtual, output], 1))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    longer = torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1)
    expected = twin(input_ids=ids(), attention_mask=longer).last_hidden_state[:, 3:]
    result = model(input_ids=ids(), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    prompted(model, config, "de")
    alone = [grafts.activate(model, name)(input_ids=ids()).last_hidden_state for name in ("de", "en")]
    rows = model(input_ids=ids(), adapter_names=["de", "en"]).last_hidden_state
    torch.testing.assert_close(rows, torch.stack([alone[0][0], alone[1][1]]), rtol=1e-5, atol=1e-5)
    prompted(model, PROMPT, "before")
    with pytest.raises(grafts.StateError, match="before and after the embeddings cannot act together"):
        grafts.activate(model, ["en", "before"])(input_ids=ids())
    with pytest.raises(grafts.ConfigError, match="has no module of embeddings to come behind"):
        grafts.add(LLAMA.model(), config)


@torch.no_grad()
def test_a_stack_that_the_head_calls_past_its_base_gets_virtual_tokens() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
    }
    model = OPTForCausalLM(
        OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, pad_token_id=1)
    ).eval()
    bare = model(input_ids=ids()).logits
    grafts.add(model, grafts.PromptTuningConfig(num_virtual_tokens=3), name="en")
    assert model(input_ids=ids()).logits.shape == bare.shape
    assert not torch.allclose(model(input_ids=ids()).logits, bare, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["prompt_tuning[num_virtual_tokens=3]", "loreft", "seq_bn[reduction_factor=4,use_gating=True]"]
)
def test_sequences_packed_in_one_row_are_refused_by_what_has_to_find_their_beginnings(text: str) -> None:
    model = LLAMA.model()
    grafts.add(model, text, name="en")
    randomise(model, "en")
    tokens, positions = ids().view(1, -1), torch.arange(7).repeat(2)[None]
    for packed in (
        {"position_ids": positions},
        {"cu_seq_lens_q": torch.tensor([0, 7, 14], dtype=torch.int32)},
    ):
        with pytest.raises(grafts.StateError, match="these lie packed in one row"):
            model(tokens, use_cache=False, **packed)
    model(tokens, position_ids=torch.arange(14)[None], use_cache=False)
    grafts.delete(model, "en")
    model(tokens, position_ids=positions, use_cache=False)
