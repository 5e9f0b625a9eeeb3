"""What the package exports: names, laziness, registration from other packages, import order."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor, nn

import grafts
from grafts.config import config as as_config
from grafts.methods import method, method_named, method_names, methods
from grafts.methods._registry import _registered
from grafts.sites.module import ModulePart

SOURCE = Path(grafts.__file__).parent


def test_public_names_are_sorted_and_all_there() -> None:
    assert sorted(grafts.__all__) == grafts.__all__
    for name in grafts.__all__:
        assert getattr(grafts, name).__doc__
    with pytest.raises(AttributeError):
        _ = grafts.nothing


def test_config_of_every_method_is_found_by_its_name() -> None:
    for known in methods():
        assert getattr(grafts, known.config.__name__) is known.config


def test_import_loads_neither_torch_nor_transformers_nor_a_method() -> None:
    code = (
        "import sys, grafts; assert not {'torch', 'transformers', 'grafts.methods.lora'} & set(sys.modules); "
        "grafts.add; grafts.load; grafts.merge; grafts.combine; grafts.LoraConfig; from grafts.methods "
        "import method_named; method_named('LORA'); assert not {'transformers', 'grafts.methods.ia3', "
        "'grafts.methods.adalora'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_option_of_every_method_is_documented() -> None:
    import dataclasses

    for known in methods():
        for field in dataclasses.fields(known.config):
            assert field.metadata.get("help"), f"{known.name}: {field.name}"


def test_method_from_another_package_is_used_like_a_built_in_one(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    @as_config
    class ShiftConfig(grafts.AdapterConfig):
        start: float = 0.0
        peft_type: ClassVar[str] = "SHIFT"

    class Shift(ModulePart):
        def __init__(self, config: ShiftConfig, size: int) -> None:
            super().__init__()
            self.shift = nn.Parameter(Tensor([config.start] * size))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y + self.shift

        def merged(self, tensors: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"bias": tensors["bias"] + self.shift}

    record = {"title": "Shift", "layers": {"linear"}, "default_roles": ({"head"},)}
    register = method("shift", config=ShiftConfig, inert=True, mergeable=True, source="none", **record)
    register(lambda config, place: Shift(config, place.layer.out_features))
    request.addfinalizer(lambda: _registered.pop("shift"))
    with pytest.raises(grafts.ConfigError, match="registered already"):
        register(lambda *args: None)
    assert "shift" in method_names()

    import torch

    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    before = model(x)
    grafts.add(model, ShiftConfig(start=1.0, target_modules="all-linear"))
    torch.testing.assert_close(model(x), before + 1)
    grafts.save(model, "default", tmp_path)
    torch.testing.assert_close(grafts.merge(model)(x), before + 1)
    again = nn.Linear(3, 2)
    grafts.load(again, tmp_path)
    assert torch.equal(again.grafts.parts("default")[0].shift, torch.ones(2))


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(grafts.ConfigError, match="did you mean 'lora'"):
        method_named("lorra")
    with pytest.raises(
        grafts.ConfigError,
        match=r"grafts\.config\.AdapterConfig is not the config of a method; known: "
        r".*grafts\.methods\.lora\.LoraConfig",
    ):
        grafts.plan(nn.Linear(2, 2), grafts.AdapterConfig())


def test_no_import_of_the_package_hides_in_a_function() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                hidden = [
                    n
                    for n in ast.walk(node)
                    if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("grafts")
                ]
                assert not hidden, f"{path}: {node.name}"


# Where names of methods may stand outside of `grafts.methods`, and why.
NAMES_OF_OTHERS = {
    "structure/interface.py": "the words of AdapterHub's interface, which say what a model may have",
    "integrations/peft_models.py": "the classes of peft's that are about one method, under its names",
    "integrations/adapterhub_methods.py": "AdapterHub's class of those words",
    "__init__.py": "the public names of configs",
}


def test_core_knows_no_method_by_name() -> None:
    names = set()
    for known in methods():
        names |= {known.name, known.peft_type, known.config.__name__, f"grafts.methods.{known.name}"}
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        if place.parts[0] == "methods" or str(place) in NAMES_OF_OTHERS:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            words: list[str] = []
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = [node.value]
            elif isinstance(node, ast.ImportFrom):
                words = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                words = [alias.name for alias in node.names]
            found += [f"{place}: {word}" for word in words if word in names]
    assert not found


def test_private_names_of_transformers_are_imported_in_one_module_alone() -> None:
    found = []
    for file in sorted(Path(grafts.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            )
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            paths = [f"{module}.{name}" if module else name for name in names]
            found += [
                (file.name, path) for path in paths if path.startswith("transformers.") and "._" in path
            ]
    assert {name for name, _ in found} <= {"transformers_private.py"}
