"""Every registered method and its variants, beside every kind of layer that it claims, in every storage
format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import grafts
from grafts.lifecycle.registry import parts_of
from grafts.methods import Method, methods
from grafts.modules.layers import describe
from helpers.adapters import randomise, tensors_of
from helpers.bases import noise
from helpers.closeness import assert_bitwise, assert_rounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Attention(nn.Module):
    """Self-attention with PyTorch's own module; one tensor out."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@dataclass(frozen=True)
class Case:
    """A model around one layer, and its input."""

    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(self.build()).to(dtype).eval().requires_grad_(False)

    def output(self, model: nn.Module, **options: object) -> Tensor:
        x, dtype = self.x(), next(model.parameters()).dtype
        return model(x.to(dtype) if x.is_floating_point() else x, **options)

    @property
    def target(self) -> str:
        return "0.attention" if "attention" in dict(self.build().named_modules()) else "0"


class ScaledEmbedding(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def ids() -> Tensor:
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))


LAYERS = {
    "linear": Case(lambda: nn.Linear(8, 12), lambda: noise(3, 5, 8)),
    "linear-no-bias": Case(lambda: nn.Linear(8, 12, bias=False), lambda: noise(3, 8)),
    "conv1d-transposed": Case(lambda: Conv1D(12, 8), lambda: noise(3, 5, 8)),
    "embedding": Case(lambda: nn.Embedding(11, 8), ids),
    "embedding-scaled": Case(lambda: ScaledEmbedding(11, 8), ids),
    "conv1d": Case(lambda: nn.Conv1d(8, 12, 3, padding=1), lambda: noise(3, 8, 7)),
    "conv2d": Case(lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), lambda: noise(3, 8, 7, 6)),
    "conv2d-dilated-circular": Case(
        lambda: nn.Conv2d(8, 12, 3, dilation=2, padding=2, padding_mode="circular"), lambda: noise(3, 8, 7, 6)
    ),
    "conv2d-same-no-bias": Case(
        lambda: nn.Conv2d(8, 12, 3, padding="same", bias=False), lambda: noise(3, 8, 7, 6)
    ),
    "conv2d-groups": Case(lambda: nn.Conv2d(8, 12, 3, groups=4), lambda: noise(3, 8, 7, 6)),
    "conv2d-depthwise": Case(lambda: nn.Conv2d(8, 16, 3, groups=8), lambda: noise(3, 8, 7, 6)),
    "conv3d": Case(lambda: nn.Conv3d(4, 6, 2), lambda: noise(3, 4, 3, 4, 5)),
    "attention": Case(Attention, lambda: noise(3, 5, 8)),
    "attention-no-bias": Case(lambda: Attention(bias=False), lambda: noise(3, 5, 8)),
}
VARIANTS = {
    "lora": [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
    ],
    "ia3": [{}, {"feedforward_modules": ["0"]}, {"init_ia3_weights": False}],
    "adalora": [{"total_step": 10, "init_r": 4, "target_r": 2}],
}


def kind_of(case: Case) -> str:
    layer = describe(case.model().get_submodule(case.target))
    assert layer is not None
    return layer.kind


def cases() -> list[object]:
    found = []
    for known in methods():
        for layer, case in LAYERS.items():
            if kind_of(case) not in known.layers:
                continue
            for options in VARIANTS.get(known.name, [{}]):
                impossible = options.get("lora_bias") and (kind_of(case) == "embedding" or "no-bias" in layer)
                if not impossible:
                    name = "-".join(
                        [known.name, layer, *(f"{key}={value}" for key, value in options.items())]
                    )
                    found.append(pytest.param(known, case, options, id=name))
    return found


each_case = pytest.mark.parametrize(("known", "case", "options"), cases())


def adapted(
    known: Method, case: Case, options: dict[str, object], dtype: torch.dtype = torch.float32
) -> nn.Module:
    model = case.model(dtype)
    small = {"r": 4} if known.name == "lora" else {}
    grafts.add(model, known.config(target_modules=[case.target], **(small | options)), name="en")
    return model


@each_dtype
@each_case
def test_fresh_adapter_leaves_the_output_alone(
    known: Method, case: Case, options: dict[str, object], dtype: torch.dtype
) -> None:
    expected = case.output(case.model(dtype))
    output = case.output(adapted(known, case, options, dtype))
    start = options.get("init_lora_weights", True)
    counted_from_the_base = isinstance(start, str) and start != "gaussian"
    if options.get("init_ia3_weights", True) is False:
        assert not torch.equal(output, expected)
    elif counted_from_the_base:
        torch.testing.assert_close(
            output, expected, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03})
        )
    elif case.target == "0.attention":  # through its weights, which need no rounding where nothing is added
        torch.testing.assert_close(output, expected)
    else:
        assert torch.equal(output, expected)


@each_dtype
@each_case
def test_merged_equals_unmerged_and_unmerging_is_bitwise(
    known: Method, case: Case, options: dict[str, object], dtype: torch.dtype
) -> None:
    model = adapted(known, case, options, dtype)
    bare = case.output(grafts.deactivate(model))
    before = {name: p.clone() for name, p in model.named_parameters()}
    grafts.activate(model, "en")
    randomise(model, "en")
    unmerged = case.output(model)
    merged = case.output(grafts.merge(model)).double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
    size = max(unmerged.abs().max().double(), bare.abs().max().double())
    assert (merged - unmerged.double()).abs().max() <= tolerance * size
    assert (unmerged - bare).abs().max() > 0.05 * size
    grafts.unmerge(model)
    assert torch.equal(case.output(model), unmerged)
    assert torch.equal(case.output(grafts.deactivate(model)), bare)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "grafts" not in name)


@torch.no_grad()  # where nothing needs gradients PyTorch's attention takes other kernels
@each_case
def test_saved_and_loaded_adapter_has_the_same_tensors_bitwise(
    known: Method, case: Case, options: dict[str, object], tmp_path: Path
) -> None:
    model = adapted(known, case, options)
    randomise(model, "en")
    expected = case.output(model)
    grafts.save(model, "en", tmp_path)
    fresh = case.model()
    grafts.load(fresh, tmp_path, name="de")
    assert_bitwise(tensors_of(fresh, "de"), tensors_of(model, "en"))
    assert_rounded(case.output(fresh), expected)
    assert_rounded(case.output(grafts.detach(fresh)), case.output(case.model()))


@each_case
def test_every_parameter_gets_a_gradient_and_the_base_none(
    known: Method, case: Case, options: dict[str, object]
) -> None:
    model = adapted(known, case, options)
    randomise(model, "en")
    case.output(model.train()).square().mean().backward()
    own = {id(p) for _, part in parts_of(model, "en") for p in part.parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (id(parameter) in own), name


@each_case
def test_rows_choose_as_if_run_one_at_a_time_or_say_that_they_cannot(
    known: Method, case: Case, options: dict[str, object]
) -> None:
    model = adapted(known, case, options)
    config = grafts.adapters(model)["en"].config
    grafts.add(model, config, name="de")
    for seed, name in enumerate(("en", "de")):
        randomise(model, name, seed=seed)
    if case.target == "0.attention":
        with pytest.raises(grafts.StateError, match="acts on all rows of a batch at once"):
            case.output(model, adapter_names=["en", "de", None])
        assert not model[0].attention.grafts._swapped
        return
    output = case.output(model, adapter_names=["de", None, "en"])
    for row, name in enumerate(("de", None, "en")):
        grafts.activate(model, () if name is None else name)
        torch.testing.assert_close(output[row], case.output(model)[row], rtol=1e-5, atol=1e-5)


@each_case
def test_the_identity_combination_gives_that_adapter(
    known: Method, case: Case, options: dict[str, object]
) -> None:
    model = adapted(known, case, options)
    randomise(model, "en")
    expected = case.output(model)
    for way in known.combinations:
        density = {"density": 1.0} if any(word in way for word in ("ties", "dare", "prune")) else {}
        grafts.combine(model, ["en"], [1.0], way, method=way, **density)
        torch.testing.assert_close(
            case.output(model), expected, rtol=1e-4, atol=1e-4, msg=lambda m, way=way: f"{way}: {m}"
        )
        assert not any(p.requires_grad for _, part in parts_of(model, way) for p in part.parameters())
