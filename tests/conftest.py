"""Fixtures for all tests. One thread, so that two workers do not fight over two cores, and no network.

``GRAFTS_TEST_THREADS`` says how many threads PyTorch has, ``GRAFTS_TEST_ALIGNMENT=odd`` where tensors lie.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from torch import nn

import grafts
from grafts.methods import Method, methods
from helpers import alignment
from helpers.adapters import any_config, fits, randomise
from helpers.bases import BY_NAME, Base

torch.set_num_threads(int(os.environ.get("GRAFTS_TEST_THREADS", "1")))
if os.environ.get("GRAFTS_TEST_ALIGNMENT") == "odd":
    alignment.switch_on()


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
def config(method: Method[Any]) -> grafts.AdapterConfig:
    """The method's config for any model: every linear where it stands beside linears, defaults otherwise."""
    return any_config(method)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out a method on a base where it has no place; that this is an error is tested apart."""
    kept = []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        chooses_both = "method" in parameters and "base" in parameters
        if not chooses_both or fits(parameters["method"], parameters["base"]):
            kept.append(item)
    items[:] = kept


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
