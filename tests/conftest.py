"""Fixtures for all tests. One thread, so that two workers do not fight over two cores, and no network.

``GRAFTS_TEST_THREADS`` says how many threads PyTorch has, ``GRAFTS_TEST_ALIGNMENT=odd`` where tensors lie.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from torch import nn

import alignment
import grafts
from bases import BY_NAME, Base
from grafts.lifecycle.registry import parts_of
from grafts.methods import Method, methods

torch.set_num_threads(int(os.environ.get("GRAFTS_TEST_THREADS", "1")))
if os.environ.get("GRAFTS_TEST_ALIGNMENT") == "odd":
    alignment.switch_on()


def randomise(model: nn.Module, name: str, seed: int = 5, scale: float = 0.3) -> None:
    """Give an adapter values as training would: nothing is zero any more, and the output moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, part in parts_of(model, name):
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def shake(model: nn.Module, name: str, seed: int) -> None:
    """Give an adapter values that move a model's tokens."""
    randomise(model, name, seed=seed, scale=0.7)


def tensors_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the path of their part."""
    return {
        f"{path}/{number}/{key}": tensor
        for number, (path, part) in enumerate(parts_of(model, name))
        for key, tensor in part.named_parameters()
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`method` runs over every registered method, `base` over every base model unless a test chooses its
    own.
    """
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", methods(), ids=lambda known: known.name)
    if "base" in metafunc.fixturenames and not any(
        "base" in str(m.args[0]) for m in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("base", BY_NAME.values(), ids=lambda base: base.name)


@pytest.fixture(autouse=True)
def forget_accelerate() -> Iterator[None]:
    """What one test's Trainer has told `accelerate` (a number format, by the environment too) is not for the
    next.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(method: Method) -> grafts.AdapterConfig:
    """The method's config for any model: every linear where it stands beside linears, defaults otherwise."""
    return any_config(method)


def any_config(method: Method, **changes: object) -> grafts.AdapterConfig:
    """`config`, with changes: what the method's record offers to try it with."""
    return method.example(**changes)


def fits(method: Method, base: Base) -> bool:
    """Whether the base has any module where the method can stand."""
    layered = "stream" in method.layers or method.members is not None
    return (
        "linear" in method.layers
        or (("attending" in method.layers or layered) and base.attention)
        or (base.embeds and not layered)
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out a method on a base where it has no place; that this is an error is tested apart."""
    given = [getattr(item, "callspec", None) and item.callspec.params for item in items]
    items[:] = [
        item
        for item, params in zip(items, given, strict=True)
        if not params
        or "method" not in params
        or "base" not in params
        or fits(params["method"], params["base"])
    ]


@pytest.fixture
def model(base: Base) -> nn.Module:
    """A fresh base model."""
    return base.model()


@pytest.fixture
def adapted(model: nn.Module, config: grafts.AdapterConfig) -> nn.Module:
    """The base with an adapter "en" that has values as after training, active and trainable."""
    grafts.add(model, config, name="en")
    randomise(model, "en")
    return model
