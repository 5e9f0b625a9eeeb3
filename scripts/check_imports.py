"""Hold the rooms of the package: imports go down `ROOMS` only, and in no circle. Print what does not hold,
and exit 1.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "grafts"
# Each may import itself and those that stand before it.
ROOMS = (
    "errors",
    "config",
    "modules",
    "sites",
    "structure",
    "methods",
    "lifecycle",
    "checkpoints",
    "testing",
    "integrations",
    "cli",
)
LOOSE = 8  # files in the package's root, at most


def module_name(path: Path) -> str:
    return ".".join(["grafts", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def imported(node: ast.AST, modules: set[str]) -> set[str]:
    """Modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & modules
    if isinstance(node, ast.ImportFrom) and node.module:
        inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
        return inner or {node.module} & modules
    return set()


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        found |= imported(node, modules)
    return found - {module_name(path)}


def upwards(paths: dict[str, Path]) -> Iterator[str]:
    """Imports, those within functions too, from a room that stands after the one that imports."""
    for name, path in paths.items():
        room = name.split(".")[1] if "." in name else ""
        if room not in ROOMS:  # the package itself and its ``__main__`` stand above all rooms
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for other in imported(node, set(paths)):
                if "." not in other:
                    if room != "cli":  # the command line uses the package as its users do
                        yield f"{name} imports the package itself"
                elif ROOMS.index(other.split(".")[1]) > ROOMS.index(room):
                    yield f"{name} imports {other}"


def faults() -> list[str]:
    """What does not hold, in words."""
    paths = {module_name(path): path for path in SOURCE.rglob("*.py")}
    found = list(upwards(paths))
    loose = [path.name for path in SOURCE.iterdir() if path.is_file()]
    if len(loose) > LOOSE:
        found.append(f"{len(loose)} files lie loose in the package: {', '.join(sorted(loose))}")
    try:
        TopologicalSorter({name: imports(path, set(paths)) for name, path in paths.items()}).prepare()
    except CycleError as error:
        found.append(f"import cycle: {' -> '.join(error.args[1])}")
    return found


def main() -> None:
    found = faults()
    sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
