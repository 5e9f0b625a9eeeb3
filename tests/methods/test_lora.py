"""LoRA against slow formulas, and its config."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded


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
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).square().sum(), inputs), torch.autograd.grad(wanted, inputs)
    )


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
    torch.testing.assert_close(
        layer.eval()(x) - before, torch.nn.functional.pad(x, (0, 2)), rtol=1e-4, atol=1e-5
    )


def test_initialisation_follows_the_option() -> None:
    def made(value: object) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(4000, 30)
        return part_of(
            grafts.add(layer, grafts.LoraConfig(r=10, init_lora_weights=value, target_modules="all-linear"))
        )

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
def test_config_that_cannot_be_is_refused_with_field_and_value(
    options: dict[str, object], message: str
) -> None:
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


def dora_formula(model: nn.Module, host: nn.Module, scaling: float) -> torch.Tensor:
    part = part_of(model)
    moved = host.weight + scaling * part.lora_B @ part.lora_A
    return part.magnitude[:, None] / moved.norm(dim=1, keepdim=True).detach() * moved


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_dora_is_the_formula_of_the_paper_with_its_gradients(rslora: bool, bias: bool) -> None:
    """Norms without a gradient, the bias not scaled, the scaling inside."""
    layer, x = nn.Linear(5, 7, bias=bias), torch.randn(3, 5, requires_grad=True)
    grafts.add(
        layer,
        grafts.LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=rslora, target_modules="all-linear"),
    )
    randomise(layer, "default")
    part = part_of(layer)
    scaling = 6 / math.sqrt(4) if rslora else 6 / 4
    wanted = x @ dora_formula(layer, layer, scaling).T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), wanted)
    inputs = (x, part.lora_A, part.lora_B, part.magnitude)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).square().sum(), inputs),
        torch.autograd.grad(wanted.square().sum(), inputs),
    )


def test_dora_row_norms_are_those_of_the_whole_matrix() -> None:
    layer = nn.Linear(50, 70)
    grafts.add(layer, grafts.LoraConfig(r=4, use_dora=True, target_modules="all-linear"))
    randomise(layer, "default")
    part = part_of(layer)
    expected = (layer.weight.double() + part.scaling * part.lora_B.double() @ part.lora_A.double()).norm(
        dim=1
    )
    torch.testing.assert_close(part.row_norms(layer).double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_dora_beside_a_weight_of_zeros_stays_finite() -> None:
    layer = nn.Linear(5, 7)
    nn.init.zeros_(layer.weight)
    grafts.add(layer, grafts.LoraConfig(r=2, use_dora=True, target_modules="all-linear"))
    out = layer(torch.ones(2, 5))
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in part_of(layer).parameters())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_from_the_base_holds_its_principal_part_and_leaves_base_and_output(init: str) -> None:
    layer, x = nn.Linear(20, 12), torch.randn(4, 20)
    before, weight = layer(x), layer.weight.clone()
    grafts.add(
        layer, grafts.LoraConfig(r=3, lora_alpha=6, init_lora_weights=init, target_modules="all-linear")
    )
    part = part_of(layer)
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(
            2 * (part.lora_B @ part.lora_A).detach(), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(part.lora_A.norm(dim=1), part.lora_B.norm(dim=0))
    else:
        q, r = torch.linalg.qr(weight)
        torch.testing.assert_close((part.lora_B @ part.lora_A).detach(), q[:, :3] @ r[:3])
    randomise(layer, "default")
    moved = layer(x)
    assert torch.equal(grafts.detach(layer)(x), before)
    assert (moved - before).abs().max() > 0.1


def test_iterative_pissa_comes_near_the_exact_one_and_repeats() -> None:
    layer = nn.Linear(30, 20)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.randn(20), torch.randn(30)) + 0.01 * torch.randn(20, 30))
    twin = copy.deepcopy(layer)
    config = grafts.LoraConfig(r=1, init_lora_weights="pissa_niter_8", target_modules="all-linear")
    a = part_of(grafts.add(layer, config))
    b = part_of(
        grafts.add(twin, grafts.LoraConfig(r=1, init_lora_weights="pissa", target_modules="all-linear"))
    )
    torch.testing.assert_close(
        (a.lora_B @ a.lora_A).detach(), (b.lora_B @ b.lora_A).detach(), rtol=1e-3, atol=1e-3
    )
    again = part_of(grafts.add(grafts.detach(layer), config))
    assert_rounded(a.lora_A, again.lora_A)


def test_orthogonal_start_has_no_update_and_orthogonal_factors() -> None:
    layer = nn.Linear(20, 12)
    grafts.add(layer, grafts.LoraConfig(r=4, init_lora_weights="orthogonal", target_modules="all-linear"))
    part = part_of(layer)
    assert part.lora_A.any()
    assert part.lora_B.any()
    assert (part.lora_B @ part.lora_A).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even rank, not 3"),
        ({"init_lora_weights": "pissa", "r": 9}, "rank 9 is more than the weight's 5"),
        ({"target_modules": ["1"], "lora_bias": True}, "an embedding has no bias"),
        ({"target_modules": ["2"], "lora_dropout": 0.1}, "no place for dropout"),
    ],
)
def test_option_that_a_target_cannot_honour_is_refused_with_its_name(
    options: dict[str, object], message: str
) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Embedding(3, 4), nn.MultiheadAttention(8, 2))
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.add(model, grafts.LoraConfig(**({"r": 4, "target_modules": ["0"]} | options)))
    assert grafts.adapters(model) == {}


def test_attention_with_other_sizes_of_keys_is_refused() -> None:
    with pytest.raises(grafts.UnsupportedTargetError, match="no fused projection"):
        grafts.add(
            nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4)), grafts.LoraConfig(target_modules=["0"])
        )


@pytest.mark.parametrize("grad", [True, False])
def test_attention_inside_a_transformer_layer_is_adapted_in_training_and_evaluation(grad: bool) -> None:
    """PyTorch's encoder layer has a fast path that does not call its attention."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    plain = copy.deepcopy(layer)
    grafts.add(layer, grafts.LoraConfig(r=2, target_modules=["self_attn"]))
    randomise(layer, "default")
    part = part_of(layer)
    with torch.no_grad():
        plain.self_attn.in_proj_weight += part.in_proj.scaling * part.in_proj.lora_B @ part.in_proj.lora_A
        plain.self_attn.out_proj.weight += part.out_proj.scaling * part.out_proj.lora_B @ part.out_proj.lora_A
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    before = {name: p.data_ptr() for name, p in layer.named_parameters()}
    with pytest.raises((AssertionError, RuntimeError)):
        layer.self_attn(torch.ones(2, 5, 9), torch.ones(2, 5, 9), torch.ones(2, 5, 9))
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == before
