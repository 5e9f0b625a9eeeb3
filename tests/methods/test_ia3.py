"""(IA)3 against slow formulas, its targets and its config."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from grafts.methods.shared.rescale import scaled
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import BASES, BY_NAME, noise

LLAMA = BY_NAME["llama"]


def vector(model: nn.Module, name: str = "default") -> torch.Tensor:
    return parts_of(model, name)[0][1].ia3_l.detach().flatten()


def test_output_is_scaled_bias_included_and_a_feedforward_has_its_input_scaled() -> None:
    for feedforward in ([], ["0"]):
        model, x = nn.Sequential(nn.Linear(5, 7)), noise(3, 5)
        weight, bias = model[0].weight, model[0].bias
        grafts.add(model, grafts.IA3Config(target_modules=["0"], feedforward_modules=feedforward))
        randomise(model, "default")
        v = vector(model)
        expected = (x * v) @ weight.T + bias if feedforward else (x @ weight.T + bias) * v
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("feedforward", [[], ["0"]], ids=["output", "input"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_scaled_by_channel(groups: int, feedforward: list[str]) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)), noise(2, 4, 5, 5)
    plain = copy.deepcopy(model)
    grafts.add(model, grafts.IA3Config(target_modules=["0"], feedforward_modules=feedforward))
    randomise(model, "default")
    v = vector(model)[:, None, None]
    expected = plain(x * v) if feedforward else plain(x) * v
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(grafts.merge(model)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "base", [b for b in BASES if b.attention and b.name != "vit"], ids=lambda base: base.name
)
def test_default_targets_are_keys_values_and_the_end_of_feedforwards(base: bases.Base) -> None:
    made = grafts.plan(base.model(), grafts.IA3Config())
    last = {target.path.rpartition(".")[2] for target in made.targets}
    expected = {
        "sdpa": {"wk", "wv", "down"},
        "llama": {"k_proj", "v_proj", "down_proj"},
        "gpt2": {"c_attn", "c_proj"},
        "bert": {"key", "value", "dense"},
        "t5": {"k", "v", "wo"},
    }[base.name]
    assert last == expected
    model = grafts.add(base.model(), grafts.IA3Config())
    before = [path for path, part in parts_of(model, "default") if part.when == "before"]
    assert before == [t.path for t in made.targets if t.role == "ffn out"]
    assert len(before) == {"t5": 4}.get(base.name, 2)


def test_structure_that_is_not_understood_lists_the_candidates() -> None:
    with pytest.raises(
        grafts.UnmatchedTargetError, match=r"recognised as key or .*candidates: 'body\.\*' \(2\), 'out'"
    ):
        grafts.plan(BY_NAME["mlp"].model(), grafts.IA3Config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]},
            "feedforward_modules='down_proj' matches none",
        ),
        (
            {"target_modules": ["k_proj"], "feedforward_modules": ".*down_proj"},
            r"feedforward_modules='.\*down_proj'",
        ),
        ({"target_modules": ["k_prj"]}, "nearest names: 'k_proj'"),
        ({"target_modules": ["embed_tokens"], "feedforward_modules": []}, "is a Embedding, which"),
    ],
)
def test_targets_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.plan(LLAMA.model(), grafts.IA3Config(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedforward_modules": [3]}, "a list of module names or a string"),
        ({"init_ia3_weights": "yes"}, "True or False"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; it must be 'IA3'"),
        ({"feed_forward_modules": []}, "did you mean 'feedforward_modules'"),
    ],
)
def test_config_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.IA3Config(**options)


def test_config_has_the_fields_of_peft_and_takes_its_type() -> None:
    fields = "task_type auto_mapping base_model_name_or_path revision inference_mode target_modules"
    fields += " exclude_modules feedforward_modules fan_in_fan_out modules_to_save init_ia3_weights"
    assert set(fields.split()) == set(grafts.IA3Config.field_names()) - grafts.IA3Config.own_fields
    assert grafts.IA3Config(peft_type="IA3", feedforward_modules={"b", "a"}).feedforward_modules == ("a", "b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scaling_near_one_is_not_lost_to_rounding(dtype: torch.dtype) -> None:
    """bfloat16 has no number between 1 and 1.0078: a vector used in it would forget most of its training."""
    y = noise(1000, 64).to(dtype)
    factor = 1 + 0.003 * noise(64)
    wanted = y.double() * factor.double()
    normal = wanted.abs() > 1e-2
    error = ((scaled(y, factor).double() - wanted).abs() / wanted.abs())[normal]
    assert error.max() <= 1.01 * torch.finfo(dtype).eps / 2
    if dtype == torch.bfloat16:
        assert ((y * factor.to(dtype)).double() - wanted).abs().div(wanted.abs())[
            normal
        ].max() > 1.5 * error.max()
    assert torch.equal(scaled(y, torch.ones(64)), y)
