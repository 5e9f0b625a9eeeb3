"""Bases that `accelerate` spreads over memory and disk, and what loading an adapter takes in memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grafts
from grafts.methods import Method
from helpers import bases
from helpers.adapters import any_config, randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*offloaded.*:UserWarning"),
]
IDS = bases.ids()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def saved(method: Method, tmp_path: Path) -> tuple[Path, Path, Tensor]:
    """The folders of a base and of an adapter on it, and what they compute."""
    base: Any = BY_NAME["llama"].model()
    base.save_pretrained(tmp_path / "base")
    model = grafts.init(base)
    model.add_adapter(any_config(method))
    randomise(model, "default")
    model.save_adapter(tmp_path / "adapter", "default")
    return tmp_path / "base", tmp_path / "adapter", logits(model)


SPREAD = {
    "by hand": {
        "device_map": {
            "model.embed_tokens": "cpu",
            "model.layers.0": "disk",
            "model.layers.1": "cpu",
            "model.norm": "cpu",
            "lm_head": "disk",
        }
    },
    "by memory": {"device_map": "auto", "max_memory": {"cpu": 14000}},
    "sequential": {"device_map": "sequential", "max_memory": {"cpu": 14000}},
    "one device": {"device_map": "cpu"},
}


def on_disk(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


@pytest.mark.parametrize("how", SPREAD)
def test_base_is_spread_while_an_adapter_is_loaded(
    saved: tuple[Path, Path, Tensor], how: str, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    base, adapter, expected = saved
    model = grafts.init(LlamaForCausalLM.from_pretrained(base).requires_grad_(False))
    options = dict(SPREAD[how])
    if how != "one device":
        options["offload_folder"] = tmp_path / "weights"
    model.load_adapter(adapter, **options)
    assert bool(on_disk(model)) == (how != "one device")
    assert not any("grafts" in name for name in on_disk(model))
    assert_rounded(logits(model), expected)
    model.disable_adapters()
    with torch.no_grad():
        bare = LlamaForCausalLM.from_pretrained(base).requires_grad_(False)
        assert_rounded(logits(model), logits(bare))


def test_adapter_comes_to_a_base_that_is_spread_already(
    saved: tuple[Path, Path, Tensor], tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    base, adapter, expected = saved
    spread = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
    }
    spread |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = LlamaForCausalLM.from_pretrained(base, device_map=spread, offload_folder=tmp_path / "weights")
    grafts.init(model).load_adapter(adapter, "en")
    assert on_disk(model)
    assert_rounded(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    other = grafts.init(LlamaForCausalLM.from_pretrained(base).requires_grad_(False))
    other.load_adapter(tmp_path / "again")
    assert_rounded(logits(other), expected)
    # and be spread anew, with the adapter on it
    model.load_adapter(
        adapter, "de", device_map="auto", max_memory={"cpu": 20000}, offload_folder=tmp_path / "other"
    )
    assert_rounded(logits(model), expected)
    model.delete_adapter(["en", "de"])
    assert model.peft_config == {}


def test_weights_that_lie_on_disk_already_are_named_by_an_index(saved: tuple[Path, Path, Tensor]) -> None:
    from transformers import LlamaForCausalLM

    base, adapter, expected = saved
    model = grafts.init(LlamaForCausalLM.from_pretrained(base).requires_grad_(False))
    spread = SPREAD["by hand"]["device_map"]
    there = {"safetensors_file": str(base / "model.safetensors"), "dtype": "float32"}
    index = {name: there | {"weight_name": name} for name, _ in model.named_parameters()}
    model.load_adapter(adapter, device_map=spread, offload_index=index)
    assert on_disk(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)


def test_tied_weights_are_one_again_when_a_base_is_spread_anew(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    BY_NAME["gpt2"].model().save_pretrained(tmp_path / "base")
    spread = {"transformer.wte": "disk", "lm_head": "disk", "transformer.wpe": "cpu", "transformer.h": "disk"}
    spread |= {"transformer.ln_f": "cpu"}
    model = grafts.init(GPT2LMHeadModel.from_pretrained(tmp_path / "base").requires_grad_(False))
    model.add_adapter("lora")
    randomise(model, "default")
    expected = logits(model)
    model.save_adapter(tmp_path / "adapter", "default")
    model.load_adapter(tmp_path / "adapter", "spread", device_map=spread, offload_folder=tmp_path / "weights")
    assert on_disk(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)
    model.load_adapter(tmp_path / "adapter", "again", device_map="cpu")
    assert not on_disk(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)


def test_training_an_adapter_on_a_base_that_is_partly_on_disk_gives_the_same(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    BY_NAME["llama"].model().save_pretrained(tmp_path / "base")
    results = []
    for options in (
        {},
        {"device_map": "auto", "max_memory": {"cpu": 14000}, "offload_folder": tmp_path / "weights"},
    ):
        model = grafts.init(LlamaForCausalLM.from_pretrained(tmp_path / "base").requires_grad_(False))
        torch.manual_seed(0)
        model.add_adapter("lora", "start")
        model.save_adapter(tmp_path / "start", "start")
        model.delete_adapter("start")
        if results:
            (tmp_path / "start").rename(tmp_path / "ignored")
            (tmp_path / "first").rename(tmp_path / "start")
        model.load_adapter(tmp_path / "start", is_trainable=True, **options)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=50.0)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        results.append(model.get_adapter_state_dict())
        if len(results) == 1:
            (tmp_path / "start").rename(tmp_path / "first")
    for name, tensor in results[
        1
    ].items():  # a file's memory is aligned in another way, which changes roundings
        torch.testing.assert_close(results[0][name], tensor, atol=1e-5, rtol=1e-4)
        assert results[0][name].abs().max() > 1e-3


def test_merging_a_base_that_is_on_disk_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    BY_NAME["llama"].model().save_pretrained(tmp_path / "base")
    model = grafts.init(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.add_adapter("lora")
    model.save_adapter(tmp_path / "adapter", "default")
    model.delete_adapter("default")
    spread = {"model": "disk", "lm_head": "cpu"}
    model.load_adapter(tmp_path / "adapter", device_map=spread, offload_folder=tmp_path / "weights")
    with pytest.raises(grafts.MergeError, match="offloaded"):
        model.merge_adapter()


def test_wrong_places_are_refused_and_the_model_stays(tmp_path: Path) -> None:
    model = grafts.init(BY_NAME["llama"].model())
    before = logits(model)
    model.add_adapter("lora")
    model.save_adapter(tmp_path / "adapter", "default")
    with pytest.raises(grafts.StateError, match="offload_folder="):
        model.load_adapter(tmp_path / "adapter", "other", device_map={"": "disk"})
    with pytest.raises(grafts.CheckpointError):
        model.load_adapter(
            tmp_path / "nothing", "other", device_map={"": "disk"}, offload_folder=tmp_path / "weights"
        )
    assert list(model.peft_config) == ["default"]
    assert not on_disk(model)
    assert torch.equal(logits(model), before)


def test_loading_never_holds_a_second_copy_of_the_base(tmp_path: Path) -> None:
    code = f"""
        import os, sys, resource
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch, grafts
        from helpers import bases
        torch.set_num_threads(1)
        sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_key_value_heads=4)
        model = grafts.init(bases.llama(**sizes))
        bytes_of_base = sum(p.numel() * p.element_size() for p in model.parameters())
        model.add_adapter(grafts.LoraConfig(r=4, target_modules="all-linear"), "start")
        model.save_adapter({str(tmp_path)!r}, "start")
        model.delete_adapter("start")
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        model.load_adapter({str(tmp_path)!r}, "warm")
        model.delete_adapter("warm")
        before = peak()
        for number in range(3):
            model.load_adapter({str(tmp_path)!r}, f"again{{number}}", low_cpu_mem_usage=True)
        print(bytes_of_base, peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    base, more = map(int, done.stdout.split())
    assert base > 200 << 20
    assert more < base / 10
