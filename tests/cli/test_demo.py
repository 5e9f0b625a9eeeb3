"""The demo from end to end, with a few steps of training."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from demo import demo, encoder  # examples/demo, which pyproject.toml puts on the path of tests
from rich.console import Console

from grafts.cli.console import quiet


@pytest.mark.filterwarnings("ignore")
def test_demo_trains_saves_reloads_merges_and_classifies(tmp_path: Path) -> None:
    said = io.StringIO()
    quiet()
    demo(str(tmp_path / "out"), epochs=0.05, seed=0, console=Console(file=said, width=120))
    text = said.getvalue()
    assert "logits of 256 test rows from two fresh bases: identical, bit for bit" in text
    assert "same class for 256 of 256" in text
    assert "unmerged again: bitwise as before" in text
    assert "linear probe" in text
    assert (tmp_path / "out" / "report.html").exists()
    assert (encoder() / "model.safetensors").exists()
