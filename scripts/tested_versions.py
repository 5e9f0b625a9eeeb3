"""Run the suite with the versions of other packages that are declared as supported, and write down what was
tested.

    python3 scripts/tested_versions.py run oldest newest    # make the environments, run the suite, record the
    outcomes python3 scripts/tested_versions.py run newest --short   # the truths and generation only; nothing
    is recorded python3 scripts/tested_versions.py table                # write the table of README.md and
    docs/versions.md again python3 scripts/tested_versions.py check                # fail where the table is
    not what was recorded

It needs nothing but Python: each environment is a folder of its own, made by ``scripts/venv.sh``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "tested-versions.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "versions.md")
BEGIN, END = (
    "<!-- tested versions: written by scripts/tested_versions.py -->",
    "<!-- end of tested versions -->",
)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "sentence-transformers", "trl")
SHORT = (
    "tests/matrix/test_truths.py",
    "tests/test_generation.py",
    "tests/test_generation_modes.py",
    "tests/sites",
)


@dataclass(frozen=True)
class Environment:
    """Which versions an environment has.

    Attributes:
        what: the versions in words, for the table.
        pins: the file of constraints, or "none".
        changes: constraints in place of those of the file; OLDEST stands for the lower bound, a bare name
            takes a pin away.
        without: packages that are taken away again.
        warns: warnings of deprecation are printed and are no errors.
    """

    what: str
    pins: str = "constraints.txt"
    changes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    warns: bool = False


ENVIRONMENTS = {
    "oldest": Environment("every lower bound", "constraints-oldest.txt", warns=True),
    "oldest-torch": Environment("the oldest torch below the pins of all else", changes=("torch==OLDEST",)),
    "pinned": Environment("what the gate runs with"),
    "newest": Environment("whatever a fresh install gives", "none", warns=True),
    "no-peft": Environment("without peft", without=("peft",)),
}


def oldest(package: str) -> str:
    """The lower bound of a package."""
    lines = (ROOT / "constraints-oldest.txt").read_text("utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def make(name: str) -> Path:
    """Make an environment, or bring it up to date; returns its Python."""
    environment = ENVIRONMENTS[name]
    folder = ".venv" if name == "pinned" else f".venv-{name}"
    changes = [change.replace("OLDEST", oldest(change.partition("==")[0])) for change in environment.changes]
    subprocess.run(["scripts/venv.sh", folder, "dev", environment.pins, *changes], cwd=ROOT, check=True)
    python = ROOT / folder / "bin" / "python"
    for package in environment.without:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", package], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """The versions of the packages that matter, as they are installed."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        f"found = {{name: version(name) for name in {PACKAGES!r}}}\n"
        "print(json.dumps({'python': platform.python_version()} | {k: v for k, v in found.items() if v}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def run(name: str, workers: str, short: bool) -> int:
    """Run the suite in an environment, and record the outcome of a whole run.

    Returns:
        0 if it passed, 1 if tests failed, 2 if the environment could not be made or the run did not come to
        its end.
    """
    try:
        python = make(name)
    except subprocess.CalledProcessError:
        print(f"{name}: the environment could not be made", file=sys.stderr)
        return 2
    found = versions(python)
    print(f"{name}: {', '.join(f'{package} {version}' for package, version in found.items())}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-n", workers, f"--junitxml={report}"]
        if ENVIRONMENTS[name].warns:
            for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
                command += ["-W", f"default::{category}"]
        done = subprocess.run([*command, *(SHORT if short else ())], cwd=ROOT, check=False)
        if not report.exists():
            print(f"{name}: no test ran", file=sys.stderr)
            return 2
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    tests, failures, errors, skipped = (
        int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    print(f"{name}: {tests - failed - skipped} passed, {failed} failed, {skipped} skipped", flush=True)
    finished = done.returncode in (0, 1)  # else it was interrupted, or tests could not be collected
    if finished and not short:
        outcome = {
            "passed": tests - failed - skipped,
            "failed": failed,
            "skipped": skipped,
            "date": date.today().isoformat(),
        }
        machine = {"machine": f"{platform.system()} {platform.machine()}"}
        record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
        record[name] = {"versions": found} | outcome | machine
        RECORD.write_text(
            json.dumps({key: record[key] for key in ENVIRONMENTS if key in record}, indent=1) + "\n", "utf-8"
        )
        # At once: the suite of the next environment compares the pages with what was recorded.
        write_pages()
    return done.returncode if finished else 2


def table() -> str:
    """What was recorded, as a table in Markdown."""
    record = json.loads(RECORD.read_text("utf-8"))
    shown = ("python", *PACKAGES[:4])
    lines = [
        f"| versions | {' | '.join(shown)} | passed | failed | skipped | on |",
        "|---" * (len(shown) + 5) + "|",
    ]
    for name, row in record.items():
        found = " | ".join(row["versions"].get(package, "none") for package in shown)
        counts = " | ".join(f"{row[key]:,}" for key in ("passed", "failed", "skipped"))
        lines.append(f"| {ENVIRONMENTS[name].what} (`{name}`) | {found} | {counts} | {row['date']} |")
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """The pages that show the table, as they have to be."""
    result = {}
    for page in PAGES:
        text = page.read_text("utf-8")
        before, rest = text.split(BEGIN)
        result[page] = f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"
    return result


def write_pages() -> None:
    """Write the table into the pages that show it."""
    for page, text in pages().items():
        page.write_text(text, "utf-8")


def main() -> None:
    """Do what the command line says; exit with 1 where a suite failed or a table is out of date, 2 where none
    could run.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="make environments and run the suite in them")
    running.add_argument("names", nargs="+", choices=[*ENVIRONMENTS, "all"])
    running.add_argument(
        "--short", action="store_true", help="the truths and generation only; nothing is recorded"
    )
    running.add_argument("--workers", default=os.environ.get("WORKERS", "2"))
    verbs.add_parser("table", help="write the table of the pages again")
    verbs.add_parser("check", help="fail where the table is not what was recorded")
    arguments = parser.parse_args()
    if arguments.verb == "check":
        failed = [name for name, row in json.loads(RECORD.read_text("utf-8")).items() if row["failed"]]
        if failed:
            sys.exit(
                f"the table shows failures, and pyproject.toml declares these as supported: "
                f"{', '.join(failed)}"
            )
        stale = [page.name for page, text in pages().items() if page.read_text("utf-8") != text]
        sys.exit(
            f"make the tables anew (scripts/tested_versions.py table): {', '.join(stale)}" if stale else 0
        )
    if arguments.verb == "table":
        write_pages()
        return
    names = list(ENVIRONMENTS) if "all" in arguments.names else arguments.names
    sys.exit(max(run(name, arguments.workers, arguments.short) for name in names))


if __name__ == "__main__":
    main()
