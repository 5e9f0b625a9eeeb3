"""`grafts.hotswap`: another adapter in the tensors that are there, under `torch.compile` without compiling
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
IDS = bases.ids()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def ready() -> Any:
    return grafts.init(BY_NAME["llama"].model())


def written(folder: Path, config: grafts.AdapterConfig, seed: int) -> tuple[Path, Tensor]:
    """A trained adapter in a folder, and what the model computes with it."""
    model = ready()
    model.add_adapter(config)
    randomise(model, "default", seed=seed)
    model.save_adapter(folder / str(seed), "default")
    return folder / str(seed), logits(model)


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """What was compiled; the compiler forgets everything before and after."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiled(model: nn.Module, graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend, dynamic=False)


LORAS = {
    "ranks": [{"r": 4}, {"r": 9}, {"r": 2}],
    "alphas": [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 3}, {"r": 8, "use_rslora": True}],
    "fewer targets": [{"r": 4}, {"r": 6, "target_modules": ["q_proj"]}, {"r": 4}],
    "ranks by target": [{"r": 4}, {"r": 4, "rank_pattern": {"v_proj": 7}, "alpha_pattern": {"v_proj": 20}}],
    "DoRA": [{"r": 4, "use_dora": True}, {"r": 7, "use_dora": True}],
    "biases": [{"r": 4, "lora_bias": True}, {"r": 7, "lora_bias": True}],
    "dropouts": [{"r": 4}, {"r": 4, "lora_dropout": 0.3}, {"r": 4, "lora_dropout": 0.1}],
    "starts": [{"r": 4}, {"r": 4, "init_lora_weights": "gaussian"}],
}


@pytest.mark.parametrize("options", LORAS.values(), ids=LORAS)
def test_lora_of_another_rank_and_scaling_takes_the_place_without_compiling_again(
    options: list[dict[str, Any]], tmp_path: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    usual = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    several = [
        written(tmp_path, grafts.LoraConfig(**(usual | some)), seed) for seed, some in enumerate(options)
    ]
    model = ready()
    model.enable_peft_hotswap(target_rank=12)
    run = compiled(model, graphs)
    model.load_adapter(several[0][0])
    parameters = {name: id(p) for name, p in model.named_parameters()}
    for folder, expected in [*several, several[0]]:
        if folder != several[0][0] or len(graphs):
            model.load_adapter(folder)
        with torch.no_grad():
            torch.testing.assert_close(run(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        model.save_adapter(tmp_path / "again", "default")
        other = ready()
        other.load_adapter(tmp_path / "again")
        torch.testing.assert_close(logits(other), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.active_adapters() == ["default"]


def test_ia3_takes_the_place_without_compiling_again(
    tmp_path: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    places = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    several = [written(tmp_path, grafts.IA3Config(**places), seed) for seed in range(3)]
    model = ready()
    model.load_adapter(several[0][0])
    run = compiled(model, graphs)
    for folder, expected in several:
        model.load_adapter(folder, hotswap=True, adapter_name="default")
        with torch.no_grad():
            assert_rounded(run(IDS).logits, expected)
    assert len(graphs) == 1


def test_room_leaves_the_output_as_it_is_and_what_is_trained_in_it(tmp_path: Path) -> None:
    folder, expected = written(tmp_path, grafts.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), 1)
    model, narrow = ready(), ready()
    model.load_adapter(folder, is_trainable=True)
    narrow.load_adapter(folder, is_trainable=True)
    grafts.reserve(model, "default", 16)
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-6)
    for one in (model, narrow):
        optimizer = torch.optim.AdamW(
            [p for p in one.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            one(IDS, labels=IDS).loss.backward()
            optimizer.step()
    wide, usual = model.get_adapter_state_dict(), narrow.get_adapter_state_dict()
    for name, tensor in usual.items():
        assert wide[name].shape == tensor.shape
        torch.testing.assert_close(wide[name], tensor, atol=1e-4, rtol=1e-4)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)


def test_tensors_of_a_state_dict_take_the_place(tmp_path: Path) -> None:
    first, _ = written(tmp_path, grafts.LoraConfig(r=4), 1)
    second, expected = written(tmp_path, grafts.LoraConfig(r=4), 2)
    model, other = ready(), ready()
    model.load_adapter(first)
    other.load_adapter(second)
    tensors = other.get_adapter_state_dict()
    model.load_adapter(peft_config=other.peft_config["default"], adapter_state_dict=tensors, hotswap=True)
    assert_rounded(logits(model), expected)


REFUSED = {
    "larger": (grafts.LoraConfig(r=13), "of rank 13, and there is room for 12"),
    "more targets": (grafts.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"]), "unexpected .*o_proj"),
    "another method": (grafts.IA3Config(), r"is LoRA, and \(IA\)3 cannot take its place"),
    "another build": (grafts.LoraConfig(use_dora=True), "another use_dora"),
    "a head": (grafts.LoraConfig(modules_to_save=["lm_head"]), "another modules_to_save"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_adapter_that_does_not_fit_is_refused_and_nothing_is_changed(
    config: grafts.AdapterConfig, message: str, tmp_path: Path
) -> None:
    first, expected = written(tmp_path, grafts.LoraConfig(r=4), 1)
    other, _ = written(tmp_path, config, 2)
    model = ready()
    model.enable_peft_hotswap(target_rank=12)
    model.load_adapter(first)
    with pytest.raises(grafts.GraftsError, match=message):
        model.load_adapter(other)
    torch.testing.assert_close(logits(model), expected)
    assert model.peft_config["default"].r == 4


def test_without_room_only_the_same_rank_fits(tmp_path: Path) -> None:
    first, _ = written(tmp_path, grafts.LoraConfig(r=4), 1)
    same, expected = written(tmp_path, grafts.LoraConfig(r=4, lora_alpha=3), 2)
    other, _ = written(tmp_path, grafts.LoraConfig(r=5), 3)
    model = BY_NAME["llama"].model()
    grafts.load(model, first)
    grafts.hotswap(model, same)
    assert_rounded(logits(model), expected)
    with pytest.raises(grafts.ConfigError, match=r"lora_A is \(4, 16\) here and \(5, 16\) there"):
        grafts.hotswap(model, other)
    assert_rounded(logits(model), expected)
    grafts.reserve(model, "default", 5)
    grafts.hotswap(model, other)
    with pytest.raises(grafts.ConfigError, match="it must be that or more"):
        grafts.reserve(model, "default", 4)


def test_room_is_made_only_where_it_can_be(tmp_path: Path) -> None:
    model = ready()
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.set_adapter("default")
    model.add_adapter(grafts.LoraConfig(r=4, init_lora_weights="pissa"))
    with pytest.raises(grafts.ConfigError, match="pissa"):
        grafts.reserve(model, "default", 8)
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        model.enable_peft_hotswap(8)
    other = ready()
    other.add_adapter(grafts.LoraConfig(r=4))
    with pytest.warns(UserWarning, match="before loading the first adapter"):
        other.enable_peft_hotswap(8, check_compiled="warn")
    assert {part.lora_A.shape[0] for _, part in parts_of(other, "default")} == {8}
    other.merge_adapter()
    with pytest.raises(grafts.StateError, match="unmerge"):
        grafts.reserve(other, "default", 9)
