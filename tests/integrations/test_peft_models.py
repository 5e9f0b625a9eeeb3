"""`peft.IA3Model`: every method, and what the incumbent's own gives where it is right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded
from helpers.peers import peft

LLAMA, GPT2 = BY_NAME["llama"], BY_NAME["gpt2"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def made(base: object = LLAMA) -> grafts.IA3Model:
    model = grafts.IA3Model(base.model(), grafts.IA3Config())  # type: ignore[attr-defined]
    model.add_adapter("other", grafts.IA3Config())
    for seed, name in enumerate(("default", "other")):
        randomise(model.model, name, seed=seed)
    model.set_adapter("default")
    return model


def test_it_is_the_model_with_the_adapter_on_it() -> None:
    base = LLAMA.model()
    bare = LLAMA.output(base)
    model = grafts.IA3Model(base, {"en": grafts.IA3Config()}, "en", low_cpu_mem_usage=True)
    assert model.model is base
    assert list(model.peft_config) == ["en"]
    assert isinstance(model.peft_config["en"], grafts.IA3Config)
    assert torch.equal(LLAMA.output(model), bare)
    assert model.config is base.config
    assert model.active_adapters == ["en"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".grafts.en." in name
    }
    with pytest.raises(AttributeError):
        _ = model.nothing


def test_set_adapter_makes_active_and_trainable_and_activate_only_active() -> None:
    model = made()
    model.set_adapter("other")
    status = grafts.adapters(model.model)
    assert (status["other"].active, status["other"].trainable, status["default"].trainable) == (
        True,
        True,
        False,
    )
    grafts.activate(model.model, "default")
    status = grafts.adapters(model.model)
    assert (status["default"].active, status["default"].trainable, status["other"].trainable) == (
        True,
        False,
        True,
    )
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(grafts.AdapterNameError, match="did you mean 'other'"):
        model.set_adapter("othr")


@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.5, -0.5]], ids=str)
def test_weighted_adapter_is_that_of_peft_and_the_geometric_mean_a_stated_option(
    weights: list[float],
) -> None:
    model = made()
    model.add_weighted_adapter(["default", "other"], weights, "sum")
    targets, last = ["k_proj", "v_proj", "down_proj"], ["down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=last)
    theirs = peft.get_peft_model(LLAMA.model(), config)
    theirs.add_adapter("other", config)
    for name in ("default", "other"):
        for path, part in parts_of(model.model, name):
            theirs.base_model.model.get_submodule(path).ia3_l[name].data.copy_(part.ia3_l)
    theirs.base_model.add_weighted_adapter(["default", "other"], weights, "sum")
    theirs.set_adapter("sum")
    model.set_adapter("sum")
    torch.testing.assert_close(LLAMA.output(model), LLAMA.output(theirs.eval()), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for name in ("default", "other"):
            for _, part in parts_of(model.model, name):
                part.ia3_l.abs_().add_(0.1)
    model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "mean", combination_type="geometric")
    for (_, a), (_, b), (_, mean) in zip(
        *(parts_of(model.model, name) for name in ("default", "other", "mean")), strict=True
    ):
        torch.testing.assert_close(mean.ia3_l, (0.3 * a.ia3_l.log() + 0.7 * b.ia3_l.log()).exp())
    with pytest.raises(grafts.AdapterNameError, match="called 'sum' already"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    with pytest.raises(grafts.ConfigError, match="did you mean 'linear'"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "new", combination_type="lineal")


@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=["linear", "conv1d"])
def test_merging_folds_weight_and_bias_and_unmerging_is_bitwise(base: object) -> None:
    model = made(base)
    unmerged = base.output(model)  # type: ignore[attr-defined]
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(base.output(model), unmerged, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.merge_adapter(["other"])
    plain = model.merge_and_unload()
    assert set(plain.state_dict()) == set(base.model().state_dict())  # type: ignore[attr-defined]


def test_merge_and_unload_and_unload_give_plain_models() -> None:
    model = made()
    unmerged = LLAMA.output(model)
    plain = model.merge_and_unload(safe_merge=True, adapter_names=["default"])
    torch.testing.assert_close(LLAMA.output(plain), unmerged, rtol=1e-5, atol=1e-5)
    assert not any(module._forward_hooks for module in plain.modules())
    for again in (made(), made()):
        again.merge_adapter()
        bare = again.unload()
        assert_rounded(LLAMA.output(bare), LLAMA.output(LLAMA.model()))
    merged = made()
    merged.merge_adapter()
    with pytest.raises(grafts.AdapterNameError, match="merged already"):
        merged.merge_and_unload(adapter_names=["other"])


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = made()
    with torch.no_grad():
        parts_of(model.model, "default")[0][1].ia3_l[0] = float("nan")
    with pytest.raises(grafts.MergeError, match="NaN or infinity"):
        model.merge_and_unload(safe_merge=True)
    assert grafts.adapters(model.model)["default"].active


def test_disable_adapter_is_for_the_length_of_its_block_come_what_may() -> None:
    model = made()
    on, bare = LLAMA.output(model), LLAMA.output(LLAMA.model())
    with model.disable_adapter():
        assert torch.equal(LLAMA.output(model), bare)
    assert torch.equal(LLAMA.output(model), on)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(LLAMA.output(model), on)


def test_deleting_and_wrong_configs() -> None:
    model = made()
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(grafts.AdapterNameError):
        model.delete_adapter("other")
    with pytest.raises(grafts.ConfigError, match="takes IA3Config, not LoraConfig"):
        model.add_adapter("lora", grafts.LoraConfig())
    with pytest.raises(grafts.ConfigError, match="takes IA3Config"):
        grafts.IA3Model(nn.Linear(2, 2), grafts.LoraConfig())
    assert model.get_peft_config_as_dict(inference=True)["default"]["inference_mode"] is True
