"""`check_method` passes every method that is right, and names what is wrong with one that is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grafts.methods import (
    AdapterConfig,
    ModulePart,
    Part,
    Place,
    _registry,
    config,
    method,
    method_names,
    roles,
)
from grafts.testing import check_method

VERA = Path(__file__).parents[2] / "examples" / "vera"


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_the_properties(name: str) -> None:
    report = check_method(name)
    assert "an adapter that is not zero changes the output" in report.held
    assert len(report.held) + len(report.not_claimed) == 13


def test_a_method_from_outside_has_them() -> None:
    environment = {**os.environ, "PYTHONPATH": str(VERA.parents[1] / "src")}
    command = [sys.executable, "-m", "pytest", "-c", str(VERA / "pyproject.toml"), str(VERA)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@config
class ShiftConfig(AdapterConfig):
    peft_type = "SHIFT"


class Shift(ModulePart):
    """A learned vector that is added to a layer's output: the simplest method that is right."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(place.layer.out_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.shift.to(y.dtype)

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        bias = tensors.get("bias")
        return {"bias": self.shift if bias is None else bias + self.shift.to(bias.dtype)}


class StartsAtOne(Shift):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        nn.init.ones_(self.shift)


class DoesNothing(Shift):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + 0 * self.shift.to(y.dtype)


class ComputesInFloat32(Shift):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y.float() + self.shift


class StoresInHalf(Shift):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.shift = nn.Parameter(self.shift.data.bfloat16())


class HasAnUntrainedTensor(Shift):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.unused = nn.Parameter(torch.zeros(3))


class LosesATensorInFiles(Shift):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y * self.scale.to(y.dtype))

    def file_tensors(self) -> Mapping[str, Tensor]:
        return {"shift": self.shift}


class LooksAtOtherRows(Shift):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (self.shift * y.mean(0, keepdim=True)).to(y.dtype)


class MergesTwice(Shift):
    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"bias": tensors["bias"] + 2 * self.shift}


class MergesInPlace(Shift):
    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            base["bias"].add_(self.shift)
        return super().merged(tensors, base)


def register_shift(part: type[Shift], monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a method whose parts are of this class, until the test ends."""
    _registry.methods()  # those that are imported later would be forgotten with the registry
    monkeypatch.setattr(_registry, "_registered", dict(_registry._registered))

    @method(
        "shift",
        title="Shift",
        config=ShiftConfig,
        layers={"linear"},
        default_roles=({roles.QUERY},),
        inert=True,
        mergeable=True,
        source="none",
    )
    def build(config: ShiftConfig, place: Place) -> Part:
        return part(place)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (StartsAtOne, "a fresh adapter leaves the output bitwise as it was"),
        (DoesNothing, "an adapter that is not zero changes the output"),
        (StoresInHalf, "tensors are stored in float32"),
        (HasAnUntrainedTensor, "all of its parameters are trained"),
        (LosesATensorInFiles, "what was saved loads into a fresh base"),
        (LooksAtOtherRows, "rows of a batch with other adapters give what they give alone"),
        (MergesTwice, "merging computes the same"),
        (MergesInPlace, "merging computes the same, and unmerging gives the base back bitwise"),
    ],
)
def test_what_is_wrong_is_named(part: type[Shift], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_shift(part, monkeypatch)
    with pytest.raises(AssertionError, match=f"^shift: .*{what}.* does not hold"):
        check_method("shift")


def test_what_is_right_has_all_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    register_shift(Shift, monkeypatch)
    assert len(check_method("shift").held) == 12


def test_an_error_of_the_method_says_when_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    register_shift(ComputesInFloat32, monkeypatch)
    with pytest.raises(RuntimeError) as error:
        check_method("shift")
    assert "while it checked: tensors are stored in float32, and the output" in error.value.__notes__[0]
