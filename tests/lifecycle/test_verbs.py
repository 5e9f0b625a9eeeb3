"""The verbs: what they change, what they refuse, and that each has its inverse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import grafts
from helpers.adapters import randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded

LLAMA = BY_NAME["llama"]


@pytest.fixture
def model() -> nn.Module:
    """A Llama with the adapters "en" and "de", of which "de" came last."""
    model = LLAMA.model()
    for seed, name in enumerate(("en", "de")):
        grafts.add(model, grafts.LoraConfig(r=4), name=name)
        randomise(model, name, seed=seed)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {
        name.split(".grafts.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
    }


def test_add_returns_the_same_object_with_nothing_trainable_but_the_new_adapter() -> None:
    model = LLAMA.model().requires_grad_(True)
    assert grafts.add(model, grafts.LoraConfig(r=8), name="en") is model
    assert trainable(model) == {"en"}
    assert grafts.adapters(model)["en"].active


def test_add_without_activation_and_training_changes_neither(model: nn.Module) -> None:
    before = LLAMA.output(model)
    grafts.add(model, grafts.LoraConfig(), name="fr", activate=False, train=False)
    assert torch.equal(LLAMA.output(model), before)
    assert trainable(model) == {"de"}


def test_active_and_trainable_are_separate(model: nn.Module) -> None:
    grafts.activate(model, "en")
    assert trainable(model) == {"de"}
    grafts.train_only(model, ["en", "de"])
    assert trainable(model) == {"en", "de"}
    grafts.train_only(model)
    assert trainable(model) == set()
    assert [status.active for status in grafts.adapters(model).values()] == [True, False]


def test_train_only_freezes_also_what_was_thawed_by_hand(model: nn.Module) -> None:
    model.requires_grad_(True)
    grafts.train_only(model, "en")
    assert {".grafts.en." in name for name, p in model.named_parameters() if p.requires_grad} == {True}


def test_active_block_restores_what_was_active_also_after_an_exception(model: nn.Module) -> None:
    expected = LLAMA.output(model)
    with grafts.active(model, "en") as same:
        assert same is model
        assert not torch.equal(LLAMA.output(model), expected)
    assert torch.equal(LLAMA.output(model), expected)
    with pytest.raises(ZeroDivisionError), grafts.active(model, ()):
        _ = 1 / 0
    assert torch.equal(LLAMA.output(model), expected)


def test_active_block_with_unknown_name_changes_nothing(model: nn.Module) -> None:
    expected = LLAMA.output(model)
    with pytest.raises(grafts.AdapterNameError), grafts.active(model, "fr"):
        pass
    assert torch.equal(LLAMA.output(model), expected)


def test_deleting_inside_an_active_block_does_not_bring_the_name_back(model: nn.Module) -> None:
    with grafts.active(model, "en"):
        grafts.delete(model, "de")
    assert not any(status.active for status in grafts.adapters(model).values())


@pytest.mark.parametrize("verb", [grafts.activate, grafts.train_only, grafts.delete, grafts.merge])
def test_unknown_name_is_an_error_with_the_nearest(model: nn.Module, verb: object) -> None:
    with pytest.raises(grafts.AdapterNameError, match=r"no adapter is called 'dee'; did you mean 'de'\?"):
        verb(model, "dee")  # type: ignore[operator]


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_that_is_none_is_refused(name: object) -> None:
    with pytest.raises(grafts.AdapterNameError, match="a string that is not empty"):
        grafts.add(LLAMA.model(), grafts.LoraConfig(), name=name)  # type: ignore[arg-type]


def test_a_taken_name_and_a_name_twice_are_refused(model: nn.Module) -> None:
    with pytest.raises(grafts.AdapterNameError, match="called 'en' already"):
        grafts.add(model, grafts.LoraConfig(), name="en")
    with pytest.raises(grafts.AdapterNameError, match="stands twice"):
        grafts.activate(model, ["en", "en"])


@pytest.mark.parametrize("name", ["train", "v1.0", "a/b", "half", "ä b%", "adapters", "0", "forward"])
def test_any_name_works(name: str, tmp_path: object) -> None:
    model = grafts.add(LLAMA.model(), grafts.LoraConfig(), name=name)
    randomise(model, name)
    expected = LLAMA.output(model)
    twin = copy.deepcopy(model)
    assert_rounded(LLAMA.output(twin), expected)
    grafts.save(model, name, f"{tmp_path}/a")
    assert list(grafts.adapters(grafts.delete(model, name))) == []


@pytest.mark.parametrize(
    "verb",
    [lambda m: grafts.activate(m, "en"), grafts.detach, grafts.unmerge, lambda m: grafts.save(m, "en", "x")],
)
def test_verbs_on_a_bare_model_say_that_it_has_no_adapters(verb: object) -> None:
    with pytest.raises(grafts.StateError, match="has no adapters"):
        verb(LLAMA.model())  # type: ignore[operator]


def test_verbs_on_a_part_of_the_model_are_refused(model: nn.Module) -> None:
    for other in (copy.deepcopy(model).model, nn.ModuleDict({"inner": copy.deepcopy(model)})):
        with pytest.raises(grafts.StateError, match="not the module that adapters were added to"):
            grafts.activate(other, "en")


def test_verbs_reach_the_model_inside_torch_compile(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager")
    assert grafts.activate(compiled, "en") is compiled
    assert grafts.adapters(model)["en"].active


def test_new_parts_take_the_mode_of_the_model() -> None:
    model = LLAMA.model().eval()
    grafts.add(model, grafts.LoraConfig(lora_dropout=0.5))
    randomise(model, "default")
    assert torch.equal(LLAMA.output(model), LLAMA.output(model))
    assert not torch.equal(LLAMA.output(model.train()), LLAMA.output(model.eval()))


def test_loading_does_not_change_what_trains_unless_asked(model: nn.Module, tmp_path: object) -> None:
    grafts.save(model, "en", f"{tmp_path}/en")
    grafts.load(model, f"{tmp_path}/en", name="en2", activate=False)
    assert trainable(model) == {"de"}
    assert grafts.adapters(model)["de"].active
    grafts.load(model, f"{tmp_path}/en", name="en3", train=True)
    assert trainable(model) == {"en3"}


def test_status_lines_say_what_each_adapter_does(model: nn.Module) -> None:
    assert [str(status) for status in grafts.adapters(model).values()] == [
        "en: LoRA, 448 parameters in 4 modules; idle",
        "de: LoRA, 448 parameters in 4 modules; active, trainable",
    ]


def test_module_with_an_attribute_of_our_name_is_refused() -> None:
    model = BY_NAME["mlp"].model()
    model.out.grafts = "mine"
    with pytest.raises(grafts.ConfigError, match="attribute 'grafts' of its own"):
        grafts.add(model, grafts.LoraConfig(target_modules=["out"]))


def test_base_can_be_saved_and_loaded_while_adapters_are_attached(model: nn.Module, tmp_path: object) -> None:
    from transformers import LlamaForCausalLM

    bare = LLAMA.output(grafts.deactivate(model))
    model.save_pretrained(f"{tmp_path}/base")
    again = LlamaForCausalLM.from_pretrained(f"{tmp_path}/base")
    assert_rounded(LLAMA.output(again), bare)
    assert {name.split(".grafts.")[0] for name in model.state_dict() if ".grafts." in name} <= set(
        dict(again.named_modules())
    )


def test_backward_with_nothing_trainable_says_so_and_a_forward_alone_does_not() -> None:
    model = BY_NAME["mlp"].model().train()
    grafts.add(model, grafts.LoraConfig(target_modules="all-linear"), name="en")
    x = torch.randn(2, 12)
    model(x).sum().backward()
    grafts.train_only(model)
    output = model(x)
    assert torch.equal(output, model.eval()(x))
    with pytest.raises(grafts.StateError, match=r"nothing is trainable: .* active are \['en'\]"):
        output.sum().backward()
    with torch.no_grad():
        assert not model.train()(x).requires_grad
    model.out.weight.requires_grad_(True)  # thawed by hand
    model(x).sum().backward()
    assert model.out.weight.grad is not None
    model.out.weight.requires_grad_(False)
    wanted = x.clone().requires_grad_(True)
    model(wanted).sum().backward()  # of an input, for which nothing has to be trainable
    assert wanted.grad is not None
