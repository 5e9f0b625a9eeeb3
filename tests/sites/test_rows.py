"""Rows of a batch that choose their adapter: forward, generation with beams, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import grafts
from grafts.methods import Method
from helpers.adapters import randomise
from helpers.bases import BASES, BY_NAME, Base
from helpers.closeness import assert_rounded

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning"
)  # a deprecated name
LLAMA, T5, GPT2 = BY_NAME["llama"], BY_NAME["t5"], BY_NAME["gpt2"]


def two(base: Base, config: grafts.AdapterConfig) -> nn.Module:
    model = base.model()
    for seed, name in enumerate(("en", "de")):
        grafts.add(model, config, name=name)
        randomise(model, name, seed=seed)
    return model


def one_at_a_time(model: nn.Module, inputs: dict[str, torch.Tensor], names: list[str | None]) -> torch.Tensor:
    rows = []
    for row, name in enumerate(names):
        grafts.activate(model, () if name is None else name)
        result = model(**{key: x[row : row + 1] for key, x in inputs.items()})
        rows.append(result if isinstance(result, torch.Tensor) else result.logits)
    return torch.cat(rows)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_batch_equals_its_rows_run_one_at_a_time(
    method: Method, config: grafts.AdapterConfig, base: Base
) -> None:
    model = two(base, config)
    inputs = {key: torch.cat([x, x.flip(0)])[:4] for key, x in base.inputs().items()}
    names = ["en", "de", None, "en"]
    assert method.routable
    expected = one_at_a_time(model, inputs, names)
    grafts.activate(model, "de")
    result = model(**inputs, adapter_names=names)
    result = result if isinstance(result, torch.Tensor) else result.logits
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    only = model(**inputs)
    again = model(**inputs, adapter_names=None)
    for a, b in zip(
        torch.utils._pytree.tree_leaves(only), torch.utils._pytree.tree_leaves(again), strict=True
    ):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_different_methods_and_heads_in_one_batch() -> None:
    base = BY_NAME["bert"]
    model = base.model()
    grafts.add(model, grafts.LoraConfig(task_type="SEQ_CLS", bias="all"), name="a")
    grafts.add(model, grafts.IA3Config(task_type="SEQ_CLS"), name="b")
    grafts.add(model, grafts.LoraConfig(use_dora=True, trainable_token_indices=[4, 5, 6, 7]), name="c")
    for name in "abc":
        randomise(model, name)
    inputs = {"input_ids": torch.cat([base.inputs()["input_ids"]] * 2)}
    names = ["b", "c", None, "a"]
    expected = one_at_a_time(model, inputs, names)
    torch.testing.assert_close(model(**inputs, adapter_names=names).logits, expected, rtol=1e-5, atol=1e-5)


def test_position_embeddings_that_have_one_row_for_all_are_chosen_by_row_too() -> None:
    model = two(GPT2, grafts.LoraConfig(target_modules=["wpe", "wte", "c_attn"]))
    inputs = {"input_ids": GPT2.inputs()["input_ids"]}
    expected = one_at_a_time(model, inputs, ["de", "en"])
    torch.testing.assert_close(
        model(**inputs, adapter_names=["de", "en"]).logits, expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
@pytest.mark.parametrize("base", [LLAMA, GPT2, T5], ids=lambda base: base.name)
def test_generate_with_names_gives_each_row_its_adapter_and_its_beams(
    method: Method, config: grafts.AdapterConfig, base: Base, options: dict[str, int]
) -> None:
    model = two(base, config)
    prompt = base.inputs()["input_ids"]
    prompt = torch.cat([prompt, prompt])[:3]
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | options
    names = ["de", None, "en"]
    result = model.generate(prompt, adapter_names=names, **fixed)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        grafts.activate(model, () if name is None else name)
        assert torch.equal(
            result[row * each : (row + 1) * each], model.generate(prompt[row : row + 1], **fixed)
        )
    assert torch.equal(
        model.generate(input_ids=prompt, **fixed), type(model).generate(model, prompt, **fixed)
    )


def test_gradients_go_to_the_adapters_of_the_rows() -> None:
    model = two(LLAMA, grafts.LoraConfig(target_modules="all-linear"))
    grafts.train_only(model, ["en", "de"])
    ids = LLAMA.inputs()["input_ids"]
    model(input_ids=ids, adapter_names=["en", None]).logits.square().mean().backward()
    assert {"grafts.en" in name for name, p in model.named_parameters() if p.grad is not None} == {True}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused_and_not_computed_wrongly(reentrant: bool) -> None:
    model = two(LLAMA, grafts.LoraConfig(target_modules="all-linear")).train()
    grafts.train_only(model, ["en", "de"])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    logits = model(**LLAMA.inputs(), adapter_names=["en", "de"]).logits
    with pytest.raises(grafts.StateError, match="activation checkpointing"):
        logits.mean().backward()
    grafts.activate(model, "en")
    model(**LLAMA.inputs()).logits.mean().backward()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["en", "dee"], grafts.AdapterNameError, "no adapter is called 'dee'; did you mean 'de'"),
        (["en"], grafts.StateError, "1 names for a batch of 2 rows"),
        (["en", "de", None], grafts.StateError, "3 names for a batch of 2 rows"),
        ("en", grafts.AdapterNameError, "a list with a name or None for each row"),
        (["en", 3], grafts.AdapterNameError, "a list with a name or None for each row"),
    ],
)
def test_names_that_cannot_be_are_refused_in_forward_and_generate(
    names: object, error: type[Exception], message: str
) -> None:
    model = two(LLAMA, grafts.LoraConfig())
    grafts.activate(model, "de")
    before = LLAMA.output(model)
    with pytest.raises(error, match=message):
        model(**LLAMA.inputs(), adapter_names=names)
    with pytest.raises(error, match=message):
        model.generate(**LLAMA.inputs(), adapter_names=names)
    assert torch.equal(LLAMA.output(model), before)


def test_a_call_that_fails_leaves_no_rows_behind() -> None:
    model = two(LLAMA, grafts.LoraConfig())
    grafts.activate(model, "de")
    before, inner = LLAMA.output(model), model.model(**LLAMA.inputs()).last_hidden_state
    hooks = len(model._forward_hooks)
    for _ in range(2):
        with pytest.raises(ValueError, match="specify exactly one"):
            model(adapter_names=["en", "de"])
        assert torch.equal(model.model(**LLAMA.inputs()).last_hidden_state, inner)
    assert torch.equal(LLAMA.output(model), before)
    model(**LLAMA.inputs(), adapter_names=["en", "de"])
    assert len(model._forward_hooks) == hooks


def test_rows_cannot_choose_while_adapters_are_merged() -> None:
    model = grafts.merge(two(LLAMA, grafts.LoraConfig()), "en")
    with pytest.raises(grafts.StateError, match="cannot choose adapters by row while"):
        model(**LLAMA.inputs(), adapter_names=["en", None])


def test_module_whose_first_dimension_is_not_the_batch_says_so() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.transpose(0, 1)).transpose(0, 1)

    model = grafts.add(TimeFirst(), grafts.LoraConfig(target_modules=["linear"]), name="en")
    with pytest.raises(
        grafts.StateError, match="given for 2 rows, and a module with an adapter was called with 5"
    ):
        model(torch.ones(2, 5, 4), adapter_names=["en", None])


def test_distances_inside_attention_have_no_rows_and_say_so() -> None:
    model = two(T5, grafts.LoraConfig(target_modules=["relative_attention_bias", "q"]))
    with pytest.raises(
        grafts.StateError, match=r"'en' has a part at '.*relative_attention_bias', whose input has no rows"
    ):
        model(**T5.inputs(), adapter_names=["en", None])


def test_method_that_declares_that_its_rows_cannot_choose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from grafts.methods._registry import _registered

    monkeypatch.setitem(_registered, "ia3", dataclasses.replace(_registered["ia3"], routable=False))
    model = two(LLAMA, grafts.IA3Config())
    with pytest.raises(
        grafts.StateError, match=r"'de' is \(IA\)3, which acts on all rows of a batch at once"
    ):
        model(**LLAMA.inputs(), adapter_names=[None, "de"])


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
def test_copies_route_on_their_own_and_detaching_leaves_generate_as_it_was(how: object) -> None:
    model = two(LLAMA, grafts.LoraConfig())
    names, fixed = ["de", None], {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model(**LLAMA.inputs(), adapter_names=names).logits
    tokens = model.generate(**LLAMA.inputs(), adapter_names=names, **fixed)
    twin = how(model)  # type: ignore[operator]
    grafts.detach(model)
    assert "generate" not in vars(model)
    assert_rounded(twin(**LLAMA.inputs(), adapter_names=names).logits, expected)
    assert torch.equal(twin.generate(**LLAMA.inputs(), adapter_names=names, **fixed), tokens)
    assert twin.generate.model is twin


def test_compiled_model_takes_names() -> None:
    model = two(LLAMA, grafts.LoraConfig())
    torch._dynamo.reset()
    expected = model(**LLAMA.inputs(), adapter_names=["de", None]).logits
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**LLAMA.inputs(), adapter_names=["de", None]).logits, expected)
