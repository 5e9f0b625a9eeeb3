"""Refuse a package version that the changelog does not begin with."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import grafts


def main() -> None:
    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[([\d.]+)\]", text, flags=re.MULTILINE)
    if not versions or versions[0] != grafts.__version__:
        sys.exit(f"CHANGELOG.md begins with {versions[:1]}, the package is {grafts.__version__}")


if __name__ == "__main__":
    main()
