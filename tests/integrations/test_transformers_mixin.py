"""`grafts.init`: the methods of `transformers`' adapter mixin, beside that mixin itself where `peft` is
installed.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import grafts
from grafts.methods import Method, method_of
from helpers import bases
from helpers.adapters import any_config, randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded
from helpers.peers import peft_of_the_mixin

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
IDS = bases.ids()


def plain() -> nn.Module:
    return BY_NAME["llama"].model()


def ready() -> Any:
    return grafts.init(plain())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def saved(method: Method, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A trained adapter of the method in a folder, and what the model computes with it."""
    model = ready()
    model.add_adapter(any_config(method), "en")
    randomise(model, "en")
    model.save_adapter(tmp_path / "en", "en")
    return tmp_path / "en", logits(model)


def test_model_keeps_its_class_name_base_and_output() -> None:
    model = plain()
    cls, before = type(model), logits(model)
    parameters = dict(model.named_parameters())
    assert grafts.init(model) is model
    assert type(model).__name__ == cls.__name__
    assert str(type(model)) == str(cls)
    assert isinstance(model, cls)
    assert isinstance(model, grafts.PeftAdapterMixin)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert torch.equal(logits(model), before)
    assert grafts.init(model) is model
    grafts.deinit(model)
    assert type(model) is cls
    with pytest.raises(grafts.StateError, match=r"grafts\.init"):
        grafts.deinit(model)


def test_class_of_ones_own_has_the_methods() -> None:
    from transformers import LlamaForCausalLM

    class Own(grafts.PeftAdapterMixin, LlamaForCausalLM):
        pass

    model: Any = Own(plain().config)
    assert model.peft_config == {}
    model.add_adapter("lora")
    assert model.active_adapters() == ["default"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles_have_the_methods_and_the_adapters(how: str) -> None:
    model = ready()
    model.add_adapter("lora")
    randomise(model, "default")
    file = io.BytesIO()
    if how == "torch.save":
        torch.save(model, file)
        file.seek(0)
    copies: dict[str, Callable[[], Any]] = {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "torch.save": lambda: torch.load(file, weights_only=False),
    }
    other = copies[how]()
    assert_rounded(logits(other), logits(model))
    other.delete_adapter("default")
    assert model.active_adapters() == ["default"]
    assert not torch.equal(logits(other), logits(model))


def test_signatures_are_those_that_users_know() -> None:
    from transformers.integrations.peft import PeftAdapterMixin as Theirs

    for name in ("add_adapter", "set_adapter", "get_adapter_state_dict", "enable_peft_hotswap"):
        if hasattr(Theirs, name):
            wanted = [
                (p.name, p.default) for p in inspect.signature(getattr(Theirs, name)).parameters.values()
            ]
            ours = [
                (p.name, p.default)
                for p in inspect.signature(getattr(grafts.PeftAdapterMixin, name)).parameters.values()
            ]
            assert ours == wanted, name
    load = inspect.signature(grafts.PeftAdapterMixin.load_adapter).parameters
    theirs = inspect.signature(Theirs.load_adapter).parameters
    for name, parameter in theirs.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert load[name].default == parameter.default, name
    order = "peft_model_id adapter_name revision token device_map max_memory offload_folder offload_index"
    order += " peft_config"
    assert (
        list(load)[1:14]
        == f"{order} adapter_state_dict low_cpu_mem_usage is_trainable adapter_kwargs".split()
    )


def no_hotswap() -> None:
    """What a version without hotswap is taken to say."""
    raise RuntimeError


def script(model: Any, config: Any, folder: Path) -> list[Any]:
    """A session with the methods; what they return, what is active, and the kinds of errors."""
    seen: list[Any] = []

    def note(step: Callable[[], Any], show: bool = True) -> None:
        try:
            result = step()
            seen.append(result if show and isinstance(result, (list, type(None))) else "done")
        except Exception as error:
            seen.append(
                [kind.__name__ for kind in (ValueError, TypeError, RuntimeError) if isinstance(error, kind)]
            )

    note(model.active_adapters)
    note(lambda: model.set_adapter("en"))
    note(model.disable_adapters)
    note(model.enable_adapters)
    note(lambda: model.delete_adapter("en"))
    note(lambda: model.add_adapter(config))
    note(lambda: model.add_adapter({"r": 8}, "wrong"))
    note(model.active_adapters)
    note(lambda: model.add_adapter(config))
    note(lambda: model.add_adapter(config, "de"))
    note(model.active_adapters)
    note(lambda: model.load_adapter(folder, "en"), show=False)
    note(model.active_adapters)
    note(lambda: model.load_adapter(folder, "en"), show=False)
    note(lambda: model.set_adapter("default"))
    note(model.active_adapters)
    note(lambda: model.set_adapter(["en", "de"]))
    note(model.active_adapters)
    note(lambda: model.set_adapter("nobody"))
    note(lambda: model.set_adapter(["en", "nobody"]))
    note(model.disable_adapters)
    note(model.active_adapters)
    note(model.enable_adapters)
    note(model.active_adapters)
    note(model.load_adapter)
    note(lambda: model.delete_adapter("nobody"))
    note(lambda: model.delete_adapter(["de", "nobody"]))
    note(lambda: sorted(model.peft_config))
    note(lambda: model.delete_adapter(["de", "en"]))
    note(lambda: sorted(model.peft_config))
    note(getattr(model, "enable_peft_hotswap", no_hotswap))
    note(lambda: model.delete_adapter("default"))
    note(model.active_adapters)
    return seen


def test_session_goes_as_with_the_mixin_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = peft_of_the_mixin(monkeypatch)
    model = ready()
    model.add_adapter(grafts.LoraConfig(r=4), "en")
    model.save_adapter(tmp_path, "en")
    ours, theirs = ready(), plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = script(theirs, peft.LoraConfig(r=4), tmp_path)
    assert script(ours, grafts.LoraConfig(r=4), tmp_path) == expected


def test_adapter_from_a_folder_is_frozen_and_active_and_computes_the_same(
    saved: tuple[Path, torch.Tensor],
) -> None:
    folder, expected = saved
    model = ready()
    report = model.load_adapter(folder, "en")
    assert report.to_dict()["missing_keys"] == set()
    assert model.active_adapters() == ["en"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_rounded(logits(model), expected)
    model.disable_adapters()
    assert_rounded(logits(model), logits(plain()))
    model.enable_adapters()
    assert_rounded(logits(model), expected)
    model.set_adapter("en")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.delete_adapter("en")
    assert model.peft_config == {}
    model.load_adapter(folder, is_trainable=True, low_cpu_mem_usage=True)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_rounded(logits(model), expected)


def test_adapter_from_config_and_tensors_computes_the_same(saved: tuple[Path, torch.Tensor]) -> None:
    folder, expected = saved
    model, other = ready(), ready()
    model.load_adapter(folder, "en")
    tensors = model.get_adapter_state_dict("en")
    other.load_adapter(peft_config=model.peft_config["en"], adapter_state_dict=tensors, adapter_name="other")
    assert_rounded(logits(other), expected)
    again = ready()
    again.load_adapter(folder, adapter_state_dict={name: torch.zeros_like(t) for name, t in tensors.items()})
    again.delete_adapter("default")
    as_data = json.loads((folder / "adapter_config.json").read_text())
    again.load_adapter(peft_config=as_data, adapter_state_dict=model.get_adapter_state_dict())
    assert_rounded(logits(again), expected)


def test_state_dict_of_the_model_gives_the_tensors(saved: tuple[Path, torch.Tensor]) -> None:
    folder, _ = saved
    model = ready()
    model.load_adapter(folder, "en")
    whole = {f"module.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    got = model.get_adapter_state_dict("en", state_dict=whole)
    assert got.keys() == model.get_adapter_state_dict("en").keys()
    assert any(
        not torch.equal(got[name], tensor) for name, tensor in model.get_adapter_state_dict("en").items()
    )
    with pytest.raises(grafts.StateError, match="does not hold"):
        model.get_adapter_state_dict("en", state_dict={})


def test_tensor_names_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = peft_of_the_mixin(monkeypatch)
    ours, theirs = ready(), plain()
    theirs.add_adapter(
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    )
    ours.add_adapter(
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    )
    expected = theirs.get_adapter_state_dict()
    assert {n: t.shape for n, t in ours.get_adapter_state_dict().items()} == {
        n: t.shape for n, t in expected.items()
    }
    ours.delete_adapter("default")
    ours.load_adapter(peft_config=theirs.peft_config["default"], adapter_state_dict=expected)
    assert_rounded(logits(ours), logits(theirs))


def test_save_pretrained_writes_the_adapters_alone(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = saved
    model = ready()
    model.load_adapter(folder, "en")
    model.save_pretrained(tmp_path / "one")
    held = {path.name for path in (tmp_path / "one").iterdir()}
    assert (
        {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        <= held
        <= {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
            "adapter_interface.json",
        }
    )
    other = ready()
    other.load_adapter(tmp_path / "one")
    assert_rounded(logits(other), expected)
    model.add_adapter("lora", "de")
    model.set_adapter(["en", "de"])
    model.save_pretrained(tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["de", "en"]
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5", "bert"])
def test_merged_model_is_saved_as_a_plain_one(base: str, tmp_path: Path) -> None:
    model: Any = grafts.init(BY_NAME[base].model())
    cls = type(model).__bases__[1]
    model.add_adapter(grafts.LoraConfig(target_modules="all-linear"))
    randomise(model, "default")
    adapted = BY_NAME[base].output(model)
    model.merge_adapter()
    merged = BY_NAME[base].output(model)
    torch.testing.assert_close(merged, adapted, atol=2e-5, rtol=2e-5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [cls.__name__]
    code = f"""
        import sys, torch, transformers
        sys.modules["peft"] = sys.modules["grafts"] = None
        model = transformers.{cls.__name__}.from_pretrained({str(tmp_path)!r})
        torch.save(model.state_dict(), {str(tmp_path / "state.pt")!r})
        shared = lambda m: (m.get_output_embeddings() is not None
            and m.get_output_embeddings().weight is m.get_input_embeddings().weight)
        print(shared(model), model.config.tie_word_embeddings)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    state = torch.load(tmp_path / "state.pt")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    assert done.stdout.split() == [str(tied), str(model.config.tie_word_embeddings)]
    again = cls.from_pretrained(tmp_path).eval().requires_grad_(False)
    assert_rounded(BY_NAME[base].output(again), merged)
    assert state.keys() == again.state_dict().keys()
    assert torch.equal(BY_NAME[base].output(model), merged)
    model.unmerge_adapter()
    torch.testing.assert_close(BY_NAME[base].output(model), adapted, atol=0, rtol=0)


def test_added_adapters_are_trainable_when_they_are_set_and_loaded_ones_are_not(tmp_path: Path) -> None:
    model = ready()
    model.add_adapter(grafts.LoraConfig(r=2), "a")
    model.add_adapter(grafts.LoraConfig(r=2), "b")
    model.save_adapter(tmp_path, "a")
    model.load_adapter(tmp_path, "frozen")

    def trained() -> list[str]:
        return [name for name, status in grafts.adapters(model).items() if status.trainable]

    for names, expected in (
        ("a", ["a"]),
        ("b", ["b"]),
        ("frozen", []),
        (["a", "frozen"], ["a"]),
        (["a", "b"], ["a", "b"]),
    ):
        model.set_adapter(names)
        assert trained() == expected
    model.train_adapter("frozen")
    assert trained() == ["frozen"]
    assert model.active_adapters() == ["frozen"]


def test_disabled_adapters_stay_so_until_they_are_enabled(tmp_path: Path) -> None:
    model = ready()
    base = logits(model)
    model.add_adapter("lora", "a")
    randomise(model, "a")
    model.save_adapter(tmp_path, "a")
    model.disable_adapters()
    model.disable_adapters()
    model.load_adapter(tmp_path, "b")
    assert torch.equal(logits(model), base)
    model.set_adapter(["a", "b"])
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert model.active_adapters() == ["a", "b"]
    assert not torch.equal(logits(model), base)


def test_merged_adapters_cannot_be_disabled_and_stay_as_they_are() -> None:
    model = ready()
    model.add_adapter("lora")
    randomise(model, "default")
    before = logits(model)
    model.merge_adapter()
    with pytest.raises(grafts.StateError, match="unmerge"):
        model.disable_adapters()
    model.enable_adapters()
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_folder_of_several_adapters_says_where_they_are(tmp_path: Path) -> None:
    model = ready()
    for name in ("a", "b"):
        model.add_adapter("lora", name)
    model.set_adapter(["a", "b"])
    model.save_pretrained(tmp_path)
    with pytest.raises(grafts.CheckpointError, match="adapters are in its folders a, b"):
        ready().load_adapter(tmp_path)


def test_module_without_a_way_to_save_itself_saves_its_adapters_alone(tmp_path: Path) -> None:
    model: Any = grafts.init(bases.MLP())
    with pytest.raises(grafts.StateError, match="cannot save itself"):
        model.save_pretrained(tmp_path)
    model.add_adapter(grafts.LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    other: Any = grafts.init(bases.MLP())
    other.load_adapter(tmp_path)
    assert other.active_adapters() == ["default"]


def test_trained_head_is_disabled_and_enabled_too() -> None:
    model: Any = grafts.init(BY_NAME["bert"].model())
    before = model(IDS).logits
    model.add_adapter(grafts.LoraConfig(task_type="SEQ_CLS"))
    randomise(model, "default")
    trained = model(IDS).logits
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, before)
    model.enable_adapters()
    assert torch.equal(model(IDS).logits, trained)


def test_rows_of_a_batch_and_of_generate_choose_adapters() -> None:
    model = ready()
    for seed, name in enumerate(("a", "b")):
        model.add_adapter("lora", name)
        randomise(model, name, seed=seed)
    together = model(IDS, adapter_names=["a", "b"]).logits
    generated = model.generate(IDS, adapter_names=["a", "b"], max_new_tokens=3, do_sample=False)
    for row, name in enumerate(("a", "b")):
        model.set_adapter(name)
        torch.testing.assert_close(model(IDS[row : row + 1]).logits[0], together[row])
        assert torch.equal(
            model.generate(IDS[row : row + 1], max_new_tokens=3, do_sample=False)[0], generated[row]
        )


def test_wrong_arguments_say_what_is_wrong_and_change_nothing(tmp_path: Path) -> None:
    model = ready()
    before = logits(model)
    with pytest.raises(TypeError, match="adapter_config should be"):
        model.add_adapter(object())
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.save_adapter(tmp_path)
    with pytest.raises(grafts.ConfigError, match="did you mean 'revision'"):
        model.load_adapter(tmp_path, adapter_kwargs={"revison": "x"})
    with pytest.raises(grafts.CheckpointError, match="there is no folder"):
        model.load_adapter("/no/such/folder")
    with pytest.raises(grafts.CheckpointError, match="inside of"):
        model.load_adapter(tmp_path, adapter_kwargs={"subfolder": "../elsewhere"})
    with pytest.raises(ValueError, match="there must already be an existing adapter"):
        model.load_adapter(tmp_path, hotswap=True)
    with pytest.raises(grafts.ConfigError, match="check_compiled"):
        model.enable_peft_hotswap(check_compiled="maybe")
    with pytest.raises(grafts.ConfigError, match="target_rank"):
        model.enable_peft_hotswap(0)
    assert model.peft_config == {}
    assert torch.equal(logits(model), before)


def test_subfolder_and_pickle_are_read_where_asked_for(tmp_path: Path) -> None:
    model = ready()
    model.add_adapter("lora", "en")
    randomise(model, "en")
    model.save_adapter(tmp_path / "in" / "side", "en")
    other = ready()
    other.load_adapter(tmp_path, adapter_kwargs={"subfolder": "in/side"})
    assert_rounded(logits(other), logits(model))
    from safetensors.torch import load_file

    file = tmp_path / "in" / "side" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    file.unlink()
    third = ready()
    with pytest.raises(grafts.CheckpointError, match="pickle"):
        third.load_adapter(tmp_path / "in" / "side")
    third.load_adapter(tmp_path / "in" / "side", adapter_kwargs={"allow_pickle": True})
    assert_rounded(logits(third), logits(model))


def test_gradient_checkpointing_leaves_no_hook_when_it_is_switched_off() -> None:
    model = ready()
    model.add_adapter("lora")
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert not model.get_input_embeddings()._forward_hooks


def test_library_that_calls_forward_itself_reaches_the_adapters(saved: tuple[Path, torch.Tensor]) -> None:
    from transformers import LlamaModel

    folder, expected = saved
    model = ready()
    model.load_adapter(folder, "en")
    with torch.no_grad():
        assert_rounded(model.forward(IDS).logits, expected)
        assert_rounded(model.forward(input_ids=IDS, adapter_names=[None, None]).logits, logits(plain()))
        assert torch.equal(model(IDS).logits, model.forward(IDS).logits)
    inner: Any = grafts.init(LlamaModel(plain().config).eval())
    inner.add_adapter(any_config(method_of(model.peft_config["en"])))
    randomise(inner, "default")
    with torch.no_grad():
        assert torch.equal(inner.forward(IDS).last_hidden_state, inner(IDS).last_hidden_state)
    assert inspect.signature(type(model).forward) == inspect.signature(type(plain()).forward)


def test_adapter_of_a_model_whose_modules_had_other_names_is_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision_config = CLIPVisionConfig(**vision, image_size=16, patch_size=8)
    torch.manual_seed(0)
    config = LlavaConfig(text_config=plain().config, vision_config=vision_config, image_token_index=49)
    model: Any = grafts.init(LlavaForConditionalGeneration(config))
    model.add_adapter(grafts.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    randomise(model, "default")
    expected = logits(model)
    model.save_adapter(tmp_path, "default")
    model.delete_adapter("default")
    file = tmp_path / "adapter_model.safetensors"
    today = load_file(file)
    renamed = {
        name.replace("model.model.language_model.", "model.language_model.model."): t
        for name, t in today.items()
    }
    assert renamed.keys() != today.keys()
    save_file(renamed, file)
    model.load_adapter(tmp_path)
    assert_rounded(logits(model), expected)
    model.delete_adapter("default")
    save_file({name.replace("q_proj", "query_proj"): tensor for name, tensor in renamed.items()}, file)
    with pytest.raises(grafts.CheckpointError, match="unexpected"):
        model.load_adapter(tmp_path)
    model.load_adapter(tmp_path, adapter_kwargs={"key_mapping": {"query_proj": "q_proj"}})
    assert_rounded(logits(model), expected)
