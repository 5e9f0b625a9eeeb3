"""What is declared as supported is what was tested: bounds, pins and the table of the pages agree."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return {
        line.partition("==")[0]: Version(line.partition("==")[2])
        for line in lines
        if not line.startswith("#")
    }


def declared() -> dict[str, Version]:
    """The lower bound of everything that the package itself may need; not of what develops it."""
    extras = {
        name: wanted
        for name, wanted in PROJECT["optional-dependencies"].items()
        if name not in ("dev", "docs")
    }
    wanted = [
        Requirement(text)
        for text in (*PROJECT["dependencies"], *(text for texts in extras.values() for text in texts))
    ]
    return {
        r.name: Version(next(s.version for s in r.specifier if s.operator == ">="))
        for r in wanted
        if r.name != "grafts"
    }


def test_oldest_pins_are_the_lower_bounds() -> None:
    assert pins("constraints-oldest.txt") == declared()


def test_pins_lie_within_the_bounds() -> None:
    bounds = declared()
    assert all(version >= bounds.get(name, version) for name, version in pins("constraints.txt").items())


def test_table_of_the_pages_is_what_was_recorded() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "tested_versions.py", "check"], check=True)
