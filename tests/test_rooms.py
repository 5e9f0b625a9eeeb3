"""The rooms of the package import down their list only, and in no circle."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_imports.py"


def test_rooms_import_only_those_above_them() -> None:
    assert runpy.run_path(str(SCRIPT))["faults"]() == []


def test_an_import_that_goes_up_is_found(tmp_path: Path) -> None:
    rooms = runpy.run_path(str(SCRIPT))
    low, high = tmp_path / "weights.py", tmp_path / "merge.py"
    low.write_text("def f():\n    from grafts.lifecycle.merge import merge\n")
    high.write_text("from grafts.modules.weights import read_weights\n")
    paths = {"grafts.modules.weights": low, "grafts.lifecycle.merge": high}
    assert list(rooms["upwards"](paths)) == ["grafts.modules.weights imports grafts.lifecycle.merge"]
