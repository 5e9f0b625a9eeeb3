"""Hold the types of the public surface, as a type checker sees them from outside.

`pyright --verifytypes` judges the installed package. What `grafts`, `grafts.methods` and `grafts.testing`
export, with all that it has, must have types that are known and the same for every checker. Print what does
not hold, and exit 1.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PUBLIC = ("grafts", "grafts.methods", "grafts.testing")


def verified() -> list[dict[str, Any]]:
    """What the checker says of each symbol of the package."""
    binaries = Path(sys.executable).parent
    command = [str(binaries / "basedpyright"), "--verifytypes", "grafts", "--ignoreexternal", "--outputjson"]
    # It judges the package of the interpreter that it finds first.
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    symbols: list[dict[str, Any]] = json.loads(run.stdout)["typeCompleteness"]["symbols"]
    return symbols


def exported() -> set[str]:
    """The names under which exported objects are defined: ``grafts.lifecycle.attach.add``."""
    names = set()
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            defined_in = getattr(value, "__module__", package)
            names.add(f"{defined_in}.{getattr(value, '__qualname__', name)}")
            names.add(f"{package}.{name}")
    return names


def faults(symbols: list[dict[str, Any]], public: set[str]) -> list[str]:
    """Public symbols whose type is not known, or another for another checker, with where and why."""
    found = []
    for symbol in symbols:
        name = symbol["name"]
        is_public = name in public or name.rpartition(".")[0] in public
        if symbol["isTypeKnown"] or not is_public:
            continue
        for diagnostic in symbol["diagnostics"]:
            line = diagnostic.get("range", {}).get("start", {}).get("line", 0) + 1
            found.append(f"{name} ({diagnostic.get('file', '')}:{line}): {diagnostic['message']}")
    return found


def main() -> None:
    symbols = verified()
    if len(symbols) < 100:
        sys.exit("the type checker found no package grafts")
    found = faults(symbols, exported())
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
