"""LoRA against slow formulas, and its config."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import grafts
from bases import BY_NAME
from conftest import randomise
from grafts.registry import parts_of


def part_of(model: nn.Module) -> nn.Module:
    return parts_of(model, "default")[0][1]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("rslora", [False, True])
def test_linear_output_is_the_formula_of_the_paper(shape: tuple[int, ...], rslora: bool) -> None:
    layer = nn.Linear(5, 7)
    x = torch.randn(*shape)
    before = layer(x)
    grafts.add(layer, grafts.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules="all-linear"))
    randomise(layer, "default")
    part = part_of(layer)
    scaling = 6 / math.sqrt(4) if rslora else 6 / 4
    expected = before + scaling * torch.einsum(
        "oi,ri,...r->...o", torch.eye(7), torch.zeros(4, 7), torch.zeros(*shape[:-1], 4)
    )
    expected = expected + scaling * torch.einsum("or,ri,...i->...o", part.lora_B, part.lora_A, x)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape == before.shape


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_embedding_output_is_a_lookup_in_the_updated_table(scale: float) -> None:
    class Scaled(nn.Embedding):
        embed_scale = scale

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    model = nn.Sequential(Scaled(11, 6))
    grafts.add(model, grafts.LoraConfig(r=3, lora_alpha=5, target_modules=["0"]))
    randomise(model, "default")
    part = part_of(model)
    ids = torch.tensor([[0, 3, 10], [7, 7, 1]])
    table = model[0].weight + 5 / 3 * (part.lora_B @ part.lora_A).T
    torch.testing.assert_close(model(ids), table[ids] * scale)
    expected = model(ids)
    torch.testing.assert_close(grafts.merge(model)(ids), expected)


def test_embedding_that_computes_its_indices_is_refused() -> None:
    class Positions(nn.Embedding):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return super().forward(mask.cumsum(-1))

    with pytest.raises(grafts.UnsupportedTargetError, match="'0' is a Positions"):
        grafts.add(nn.Sequential(Positions(9, 4)), grafts.LoraConfig(target_modules=["0"]))


def test_gradients_equal_those_of_the_plain_formula() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    grafts.add(layer, grafts.LoraConfig(r=4, target_modules="all-linear"))
    randomise(layer, "default")
    part = part_of(layer)
    wanted = (x @ layer.weight.T + layer.bias + 2.0 * (x @ part.lora_A.T @ part.lora_B.T)).square().sum()
    part.scaling = 2.0
    inputs = (x, part.lora_A, part.lora_B)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), inputs), torch.autograd.grad(wanted, inputs))


def test_dropout_acts_on_the_update_only_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 7), torch.randn(400, 5)
    before = layer(x)
    grafts.add(layer, grafts.LoraConfig(r=5, lora_dropout=0.5, target_modules="all-linear"))
    part = part_of(layer)
    with torch.no_grad():
        part.lora_A.copy_(torch.eye(5))
        part.lora_B.copy_(torch.eye(7, 5))
    part.scaling = 1.0
    update = layer(x) - before
    dropped = (update[:, :5].abs() < 1e-6).float().mean()
    assert 0.4 < dropped < 0.6
    kept = update[:, :5].abs() > 1e-6
    torch.testing.assert_close(update[:, :5][kept], (2 * x)[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x) - before, torch.nn.functional.pad(x, (0, 2)), rtol=1e-4, atol=1e-5)


def test_initialisation_follows_the_option() -> None:
    def made(value: object) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(4000, 30)
        return part_of(grafts.add(layer, grafts.LoraConfig(r=10, init_lora_weights=value, target_modules="all-linear")))

    kaiming, gaussian, both = made(True), made("gaussian"), made(False)
    bound = math.sqrt(6 / ((1 + 5) * 4000))
    assert bound * 0.99 < kaiming.lora_A.abs().max() <= bound
    assert not kaiming.lora_B.any()
    assert not gaussian.lora_B.any()
    torch.testing.assert_close(gaussian.lora_A.std(), torch.tensor(0.1), rtol=0.02, atol=0)
    assert both.lora_B.any()


def test_patterns_give_ranks_and_alphas_by_the_end_of_the_name() -> None:
    config = grafts.LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"q_proj": 2, r"layers\.1\.v_proj": 6}, alpha_pattern={"q_proj": 1}
    )
    assert [config.rank(path) for path in ("a.q_proj", "a.layers.1.v_proj", "a.layers.0.v_proj")] == [2, 6, 4]
    assert [config.scaling(path) for path in ("a.q_proj", "a.v_proj")] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, r"LoraConfig has no field 'rank'; did you mean 'rank_pattern'"),
        ({"lora_alhpa": 8}, "did you mean 'lora_alpha'"),
        ({"r": 0}, "LoraConfig.r is 0; it must be a whole number above 0"),
        ({"r": 2.0}, "LoraConfig.r is 2.0"),
        ({"r": True}, "LoraConfig.r is True"),
        ({"lora_dropout": 1.0}, "at least 0 and below 1"),
        ({"lora_alpha": "8"}, "a number"),
        ({"bias": "some"}, "'none', 'all' or 'lora_only'"),
        ({"init_lora_weights": "gausian"}, "'gaussian'"),
        ({"task_type": "CAUSAL"}, "one of SEQ_CLS"),
        ({"target_modules": 3}, "a list of module names or a string"),
        ({"rank_pattern": {"q": 0}}, "regular expression -> rank"),
        ({"layers_pattern": "h"}, "unless layers_to_transform"),
    ],
)
def test_config_that_cannot_be_is_refused_with_field_and_value(options: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.LoraConfig(**options)


def test_bad_regular_expression_is_named() -> None:
    with pytest.raises(grafts.ConfigError, match="is not a regular expression"):
        grafts.plan(BY_NAME["llama"].model(), grafts.LoraConfig(target_modules="layers.(q"))


def test_configs_are_frozen_comparable_and_round_trip() -> None:
    config = grafts.LoraConfig(target_modules={"b", "a"}, layers_to_transform=[0, 1])
    assert config.target_modules == ("a", "b")
    assert grafts.LoraConfig.from_dict(config.to_dict()) == config
    with pytest.raises(AttributeError):
        config.r = 3  # type: ignore[misc]
