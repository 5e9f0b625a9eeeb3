"""Refuse import cycles inside the package: print one and exit 1, or exit 0."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "grafts"


def module_name(path: Path) -> str:
    return ".".join(["grafts", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= inner or {node.module}
    return found & modules - {module_name(path)}


def main() -> None:
    paths = {module_name(path): path for path in SOURCE.rglob("*.py")}
    graph = {name: imports(path, set(paths)) for name, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        sys.exit(f"import cycle: {' -> '.join(error.args[1])}")


if __name__ == "__main__":
    main()
