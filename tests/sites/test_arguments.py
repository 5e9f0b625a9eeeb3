"""What a call carries is recognised under every spelling, or refused: never passed over."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from grafts.sites import arguments
from grafts.sites.arguments import CallSignature, Kind, could_be_cache
from grafts.sites.input import InputSite
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import ids
from helpers.caches import CACHE, cache_of, going_on

# every way of acting at a model's input: putting tokens in, counting them, needing all of them, moving their
# positions
ACTING: dict[str, Any] = {
    "prompt": "prompt_tuning[num_virtual_tokens=3]",
    "p-tuning": "p_tuning[num_virtual_tokens=3]",
    "reft": "loreft[suffix_positions=0]",
    "gated bottleneck": "seq_bn[use_gating=True,reduction_factor=4]",
    "gated lora": "lora[use_gating=True]",
    "counted prefix": grafts.PrefixTuningConfig(num_virtual_tokens=3),
    "gated prefix": grafts.PrefixTuningConfig(num_virtual_tokens=3, use_gating=True, count_positions=False),
}
AT_INPUT = {
    name: text for name, text in ACTING.items() if name != "gated prefix"
}  # that one acts in attention alone
COUNTING = {
    name: text for name, text in ACTING.items() if not name.startswith("gated")
}  # they go on from a cache
every_at_input = pytest.mark.parametrize("text", AT_INPUT.values(), ids=AT_INPUT)
every_counting = pytest.mark.parametrize("text", COUNTING.values(), ids=COUNTING)


def llama() -> Any:
    torch.manual_seed(0)
    return bases.llama(initializer_range=0.3).model.eval().requires_grad_(False)


def bert() -> Any:
    from transformers import BertModel

    torch.manual_seed(0)
    return BertModel(bases.bert_config()).eval().requires_grad_(False)


def adapted(model: Any, text: str) -> Any:
    grafts.add(model, text, name="en")
    randomise(model, "en", scale=0.7)
    return model


def respelled(model: Any, old: str, new: str, unwrap: Callable[[Any], Any] = lambda value: value) -> Any:
    """The model with an argument of its ``forward`` called otherwise, as another version might call it."""
    written = type(model).forward
    parameters = list(inspect.signature(written).parameters.values())
    names = [p.name for p in parameters]
    assert old in names

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        values = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        values[old] = unwrap(values.pop(new, None))
        return written(self, **values)

    changed = [p.replace(name=new) if p.name == old else p for p in parameters]
    forward.__signature__ = inspect.Signature(changed)  # type: ignore[attr-defined]
    model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})
    return model


class Hidden:
    """A cache that does not say what it is."""

    def __init__(self, cache: Any) -> None:
        self.inner = cache


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.no_grad()
@every_counting
def test_cache_under_a_third_name_is_known_by_its_protocol(text: str) -> None:
    model = adapted(respelled(llama(), CACHE, "memory"), text)
    tokens = ids()
    whole = model(input_ids=tokens, use_cache=False).last_hidden_state
    cache = new_cache(model)
    begun = model(input_ids=tokens[:, :4], memory=cache, use_cache=True).last_hidden_state
    steps = [
        model(input_ids=tokens[:, i : i + 1], memory=cache, use_cache=True).last_hidden_state
        for i in range(4, 7)
    ]
    # other shapes, other kernels: equal within the rounding of float32
    torch.testing.assert_close(torch.cat([begun, *steps], 1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@every_at_input
def test_cache_that_hides_under_a_third_name_is_refused(text: str) -> None:
    model = respelled(llama(), CACHE, "memory", lambda held: None if held is None else held.inner)
    adapted(model, text)
    with pytest.raises(grafts.StateError, match=r"'memory' .*may be a cache.*transformers"):
        model(input_ids=ids(), memory=Hidden(new_cache(model)), use_cache=True)
    model(input_ids=ids(), use_cache=False)


@torch.no_grad()
@every_at_input
@pytest.mark.parametrize("name", [CACHE, "memory"])
def test_tuples_that_were_caches_once_are_refused(text: str, name: str) -> None:
    model = adapted(respelled(llama(), CACHE, name, lambda held: None) if name != CACHE else llama(), text)
    legacy = tuple((torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4)) for _ in range(2))
    with pytest.raises(grafts.StateError, match=r"does not say how many tokens it holds|may be a cache"):
        model(input_ids=ids(), **{name: legacy})


def two_spellings() -> list[str]:
    return [CACHE, *(["past_key_values"] if CACHE != "past_key_values" else [])]


@torch.no_grad()
@every_counting
@pytest.mark.parametrize("how", [*two_spellings(), "by position"])
def test_old_and_new_spelling_and_position_go_on_from_a_cache(text: str, how: str) -> None:
    model = adapted(llama(), text)
    tokens = ids()
    expected = model(input_ids=tokens, use_cache=False).last_hidden_state[:, -1:]
    begun = model(input_ids=tokens[:, :-1], use_cache=True)
    cache = cache_of(begun)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*is deprecated", FutureWarning
        )  # the old name, of the version that renamed it
        if how == "by position":
            last = model(tokens[:, -1:], None, None, cache)
        else:
            last = model(input_ids=tokens[:, -1:], **{how: cache})
    torch.testing.assert_close(last.last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@every_counting
@pytest.mark.parametrize("how", two_spellings())
def test_generate_goes_on_from_a_cache_by_both_spellings(text: str, how: str) -> None:
    torch.manual_seed(0)
    model: Any = adapted(
        bases.llama(initializer_range=0.3, eos_token_id=None).eval().requires_grad_(False), text
    )
    tokens = ids()
    whole = model.generate(tokens, max_new_tokens=6, do_sample=False)
    begun = model.generate(tokens, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning)
        more = model.generate(begun.sequences, max_new_tokens=4, do_sample=False, **{how: cache_of(begun)})
    assert torch.equal(more, whole)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prompt", "p-tuning", "reft", "gated bottleneck", "gated lora"])
@pytest.mark.parametrize("shape", [(2, 7), (2, 1, 7, 7)], ids=str)
def test_mask_under_a_third_name_is_refused(name: str, shape: tuple[int, ...]) -> None:
    model = adapted(respelled(llama(), "attention_mask", "visible"), ACTING[name])
    with pytest.raises(grafts.StateError, match=r"'visible' .*something for each token.*they know input_ids"):
        model(input_ids=ids(), visible=torch.ones(shape, dtype=torch.long), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 7), (2, 7), (3, 2, 7)], ids=str)
def test_positions_under_a_third_name_are_refused_by_what_puts_tokens_in(shape: tuple[int, ...]) -> None:
    model = adapted(respelled(llama(), "position_ids", "places"), ACTING["prompt"])
    with pytest.raises(grafts.StateError, match=r"'places' .*something for each token"):
        model(input_ids=ids(), places=torch.arange(7).expand(shape))


FOR_EACH_TOKEN = {
    "bbox": torch.zeros(2, 7, 4),
    "task_type_ids": torch.zeros(2, 7, dtype=torch.long),
    "deep": [torch.zeros(2, 7, 16)],
    "by_layer": torch.zeros(2, 7, 3, 16),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FOR_EACH_TOKEN)
def test_what_else_there_is_for_each_token_is_refused_by_what_puts_tokens_in(name: str) -> None:
    model = respelled(bert(), "token_type_ids", name, lambda value: None)
    adapted(model, ACTING["prompt"])
    call = {"input_ids": ids(), name: FOR_EACH_TOKEN[name]}
    with pytest.raises(grafts.StateError, match=f"'{name}' .*something for each token"):
        model(**call)
    grafts.delete(model, "en")
    adapted(model, "loreft")  # counts tokens, and has nothing to do with them
    model(**call)


@torch.no_grad()
@every_counting
def test_two_caches_are_one_too_many(text: Any) -> None:
    model = adapted(respelled(llama(), "use_cache", "layer_past", lambda cache: True), text)
    with pytest.raises(grafts.StateError, match="several caches"):
        model(input_ids=ids(), layer_past=new_cache(model), **going_on(new_cache(model)))


@torch.no_grad()
@every_at_input
def test_call_without_tokens_of_a_known_name_is_refused(text: str) -> None:
    model = adapted(respelled(llama(), "input_ids", "words"), text)
    with pytest.raises(grafts.StateError, match=r"called with words.*look for input_ids or inputs_embeds"):
        model(words=ids(), use_cache=False)


class Keeper(nn.Module):
    """A decoder that keeps its cache to itself, and so gets to it by a way that nobody can see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()
        self.config = self.inner.config
        self.kept = new_cache(self.inner)

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, attention_mask: Any = None
    ) -> Any:
        return self.inner(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            use_cache=True,
            **going_on(self.kept),
        )


@torch.no_grad()
@pytest.mark.parametrize("name", ["prompt", "reft", "gated lora"])
def test_cache_that_comes_by_a_back_door_is_noticed_at_the_first_step(name: str) -> None:
    model: Any = Keeper().eval()
    text = ACTING[name]
    if name == "prompt":
        grafts.add(model, text, name="en")
    else:  # these stand on layers, which are those of the inner model
        interface = grafts.infer_interface(model, inputs={"input_ids": ids()})
        grafts.add(model, text, name="en", interface=interface)
    model.kept = new_cache(model.inner)
    randomise(model, "en")
    model(input_ids=ids())
    with pytest.raises(
        grafts.StateError, match=r"holds \d+ positions .* counted \d+.*use_cache=False.*transformers \d"
    ):
        model(input_ids=ids()[:, :1])


@torch.no_grad()
@every_counting
def test_what_the_cache_holds_is_looked_at_once_a_generation(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grafts.sites.input as site

    torch.manual_seed(0)
    model: Any = adapted(bases.llama(eos_token_id=None).eval().requires_grad_(False), text)
    looked: list[int] = []
    said: list[bool] = []
    check = site.require_counted

    def watched(host: nn.Module, cache: Any, counted: int) -> None:
        looked.append(counted)
        check(host, cache, counted)

    def observing(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        said.append(kwargs.get("cache_position") is not None)

    monkeypatch.setattr(site, "require_counted", watched)
    model.model.register_forward_pre_hook(observing, with_kwargs=True, prepend=True)
    for _ in range(2):
        model.generate(ids(), max_new_tokens=6, do_sample=False)
    # Positions that are given make the cache no matter to a counted prefix; to transformers 5.1 generate
    # counts for all.
    nothing_to_doubt = text is ACTING["counted prefix"] or all(said)
    assert len(looked) == (0 if nothing_to_doubt else 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prompt", "reft", "gated bottleneck"])
@pytest.mark.parametrize("kind", ["Mamba", "Rwkv"])
def test_states_that_count_no_tokens_are_refused(kind: str, name: str) -> None:
    import transformers

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    model: Any = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    adapted(model, ACTING[name])
    with pytest.raises(grafts.StateError, match=r"does not say how many tokens it holds.*use_cache=False"):
        model.generate(ids(), max_new_tokens=3, do_sample=False)
    assert model.generate(ids(), max_new_tokens=3, do_sample=False, use_cache=False).shape == (2, 10)


def forward_with(name: str) -> Callable[..., None]:
    """A ``forward`` with one parameter of that name behind its first."""

    def forward(self: object, x: int, **more: int) -> None: ...

    self, x, more = inspect.signature(forward).parameters.values()
    extra = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    forward.__signature__ = inspect.Signature([self, x, extra, more])  # type: ignore[attr-defined]
    return forward


@pytest.mark.parametrize("name", arguments.KIND_OF)
def test_every_spelling_is_read_and_written_as_what_it_is(name: str) -> None:
    kind, signature = arguments.KIND_OF[name], CallSignature(forward_with(name))
    assert signature.takes(kind)
    for call in (signature.bind((1, 2), {}), signature.bind((), {"x": 1, name: 2})):
        assert call.get(kind) == 2
        call.set(kind, 3)
        assert call.passed_on() == ((), {"x": 1, name: 3})


def test_no_spelling_belongs_to_two_kinds() -> None:
    assert len(arguments.KIND_OF) == sum(map(len, arguments.SPELLINGS.values()))


def test_what_can_only_be_given_by_position_is() -> None:
    def forward(self: object, x: int, /, attention_mask: int) -> None: ...

    call = CallSignature(forward).bind((1, 2), {})
    assert call.passed_on() == ((1,), {"attention_mask": 2})


def test_arguments_without_names_are_passed_on_in_their_order() -> None:
    def forward(self: object, x: int, *rest: int, **more: int) -> None: ...

    call = CallSignature(forward).bind((1, 2, 3), {"more": 4})
    assert call.first() == 1
    assert call.passed_on() == ((1, 2, 3), {"more": 4})


def test_an_argument_that_the_module_does_not_take_is_not_made_up() -> None:
    def forward(self: object, input_ids: Tensor) -> None: ...

    with pytest.raises(grafts.StateError, match="takes no mask"):
        CallSignature(forward).bind((ids(),), {}).set(Kind.MASK, ids())


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just(torch.float32)
    | st.just(torch.ones(2, 3)),
    lambda inner: st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(PLAIN, st.integers(1, 3))
def test_plain_data_is_no_cache_and_pairs_of_tensors_are(value: Any, layers: int) -> None:
    assert not could_be_cache(value)
    legacy = tuple((torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)) for _ in range(layers))
    assert could_be_cache(legacy)
    assert could_be_cache({"within": legacy})


def test_input_site_knows_the_signature_of_its_module() -> None:
    model = adapted(llama(), ACTING["prompt"])
    site = model._modules[InputSite.child]
    assert site.signature.parameter(Kind.CACHE) == CACHE
    assert site.signature.takes(Kind.POSITIONS)


class CrossAttention(nn.Module):
    """Attention of ones own to other states than its input, which it is given under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))
        self.k_norm = nn.LayerNorm(16)  # so that keys come from the module itself, run over the prompt

    def forward(self, hidden_states: Tensor, seen: Tensor | None = None) -> Tensor:
        other = hidden_states if seen is None else seen
        q, k, v = (
            x.unflatten(-1, (2, -1)).transpose(1, 2)
            for x in (self.q_proj(hidden_states), self.k_norm(self.k_proj(other)), self.v_proj(other))
        )
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


@torch.no_grad()
def test_what_attention_attends_to_under_a_third_name_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("cross", CrossAttention().eval())
    grafts.add(
        model,
        grafts.AdaptionPromptConfig(adapter_len=3, target_modules=["cross"], adapter_layers=1),
        name="en",
    )
    randomise(model, "en")
    x, other = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    model.cross(x)
    with pytest.raises(grafts.StateError, match=r"'seen', \(2, 7, 16\), which may be what it attends to"):
        model.cross(x, seen=other)


@torch.no_grad()
def test_another_input_may_have_as_many_items_as_there_are_tokens() -> None:
    from transformers import LxmertConfig, LxmertModel

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "visual_feat_dim": 6,
    }
    model = LxmertModel(LxmertConfig(**sizes, l_layers=1, x_layers=1, r_layers=1)).eval()
    grafts.add(model, ACTING["prompt"], name="en")
    for items in (4, 7):
        model(input_ids=ids(), visual_feats=torch.randn(2, items, 6), visual_pos=torch.randn(2, items, 4))


class Labelled(Keeper):
    """A decoder without a mask that is given labels."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        return self.inner(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False)


@torch.no_grad()
def test_labels_are_no_mask_and_have_to_follow_virtual_tokens() -> None:
    model: Any = Labelled().eval()
    interface = grafts.infer_interface(model, inputs={"input_ids": ids()})
    grafts.add(model, "loreft", name="en", interface=interface)
    model(input_ids=ids(), labels=ids())
    model(input_ids=ids(), labels=torch.ones_like(ids()))
    grafts.delete(model, "en")
    grafts.add(model, ACTING["prompt"], name="en")
    with pytest.raises(grafts.StateError, match=r"'labels' .*something for each token"):
        model(input_ids=ids(), labels=ids())


def test_tokens_that_go_behind_others_need_a_cache_that_is_known() -> None:
    from grafts.sites.cache_view import past_of

    assert past_of(None, torch.arange(4), None) == 0
    with pytest.raises(grafts.StateError, match="go to position 5, and it carries no cache"):
        past_of(None, torch.arange(5, 6), None)

    class Silent:
        def get_seq_length(self) -> None: ...

    with pytest.raises(grafts.StateError, match="Silent does not say how many tokens"):
        past_of(Silent(), None, None)


@torch.no_grad()
def test_token_ids_that_are_more_than_embeddings_are_not_replaced() -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size_per_layer_input": 50,
        "hidden_size_per_layer_input": 8,
    }
    more = {
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
    }
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "pad_token_id": 0}
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, **more, **kinds)).eval()
    grafts.add(model, ACTING["prompt"], name="en")
    with pytest.raises(grafts.StateError, match="makes per_layer_inputs of its token ids"):
        model(input_ids=ids())


@torch.no_grad()
def test_positions_in_several_dimensions_follow_virtual_tokens() -> None:
    from transformers import Qwen2VLTextConfig, Qwen2VLTextModel

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = Qwen2VLTextConfig(**sizes, num_key_value_heads=1, rope_scaling=rope, pad_token_id=0)
    torch.manual_seed(0)
    model: Any = Qwen2VLTextModel(config).eval().requires_grad_(False)
    tokens, virtual = ids(), torch.randn(3, 16)
    embeds = torch.cat([virtual.expand(2, -1, -1), model.get_input_embeddings()(tokens)], 1)
    expected = model(
        inputs_embeds=embeds, position_ids=torch.arange(10).expand(3, 2, 10), use_cache=False
    ).last_hidden_state
    grafts.add(model, ACTING["prompt"], name="en")
    for _, part in parts_of(model, "en"):
        part.prompt.copy_(virtual)
    for positions in (torch.arange(7).expand(3, 2, 7), torch.arange(7).expand(3, 1, 7)):
        result = model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        torch.testing.assert_close(result, expected[:, 3:], rtol=1e-4, atol=1e-5)
    begun = model(input_ids=tokens[:, :6], position_ids=torch.arange(6).expand(3, 2, 6), use_cache=True)
    cache = going_on(cache_of(begun))
    last = model(input_ids=tokens[:, 6:], position_ids=torch.full((3, 2, 1), 6), **cache).last_hidden_state
    torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_token_types_of_several_kinds_follow_virtual_tokens() -> None:
    from transformers import TapasConfig, TapasModel

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = TapasModel(
        TapasConfig(**sizes, max_position_embeddings=32, type_vocab_sizes=[3, 4, 4, 2, 4, 4, 4])
    ).eval()
    grafts.add(model, ACTING["prompt"], name="en")
    assert model(
        input_ids=ids(), token_type_ids=torch.zeros(2, 7, 7, dtype=torch.long)
    ).last_hidden_state.shape == (2, 7, 16)


@torch.no_grad()
def test_module_that_changes_how_many_positions_there_are_is_refused() -> None:
    from transformers import VisualBertConfig, VisualBertModel

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = VisualBertModel(VisualBertConfig(**sizes, visual_embedding_dim=6)).eval()
    grafts.add(model, ACTING["prompt"], name="en")
    model(input_ids=ids())
    with pytest.raises(grafts.StateError, match="gives 12 positions for 10 that went in"):
        model(input_ids=ids(), visual_embeds=torch.randn(2, 2, 6), visual_attention_mask=torch.ones(2, 2))


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("after_first", [False, True])
def test_chunks_of_nothing_but_padding_give_the_same_tokens_or_are_refused(
    window: int | None, after_first: bool
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.manual_seed(0)
    config = MistralConfig(
        **sizes, **special, num_key_value_heads=2, initializer_range=0.3, sliding_window=window
    )
    model: Any = MistralForCausalLM(config).eval().requires_grad_(False)
    tokens = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 5, 4, 3]])
    settings = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 6, "do_sample": False}
    bare = model.generate(tokens, use_cache=False, **settings)
    if not torch.equal(model.generate(tokens, prefill_chunk_size=2, **settings), bare):
        pytest.skip("this version of transformers itself goes wrong over chunks of padding")
    adapted(model, grafts.PromptTuningConfig(num_virtual_tokens=3, after_first=after_first))
    if after_first:
        with pytest.raises(grafts.StateError, match="nothing but padding"):
            model.generate(tokens, prefill_chunk_size=2, **settings)
        return
    expected = model.generate(tokens, use_cache=False, **settings)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=2, **settings), expected)


class Remembering(CrossAttention):
    """Attention of ones own that keeps keys and values in a memory."""

    def forward(self, hidden_states: Tensor, memory: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states)


@torch.no_grad()
@pytest.mark.parametrize("memory", [Hidden(None), ((torch.zeros(2, 2, 3, 8),) * 2,)], ids=["object", "tuple"])
def test_gate_inside_attention_refuses_what_may_be_a_cache_under_a_third_name(memory: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential()
    model.add_module("attention", Remembering().eval())
    grafts.add(model, ACTING["gated prefix"], name="en")
    model.attention(torch.randn(2, 5, 16))
    with pytest.raises(grafts.StateError, match=r"'memory' .*may be a cache"):
        model.attention(torch.randn(2, 5, 16), memory=memory)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prompt", "p-tuning"])
def test_cache_without_the_virtual_tokens_of_the_acting_adapters_is_refused(name: str) -> None:
    model = adapted(llama(), ACTING[name])
    tokens = ids()
    grafts.deactivate(model)
    cache = cache_of(model(input_ids=tokens[:, :-1], use_cache=True))
    grafts.activate(model, "en")
    with pytest.raises(grafts.StateError, match="holds 6 tokens and no virtual tokens in front of them"):
        model(input_ids=tokens[:, -1:], **going_on(cache))
    grafts.deactivate(model)
    model(input_ids=tokens[:, -1:], **going_on(cache))
