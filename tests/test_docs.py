"""Everything that is printed to be pasted runs: the code of the pages, the examples, the README's flags."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from grafts.cli.training.settings import RunSettings
from grafts.methods import Method

ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "```python" in page.read_text("utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), space)


@pytest.mark.parametrize(
    "example", sorted((ROOT / "examples").glob("*.py")), ids=lambda example: example.stem
)
def test_example_runs_and_its_own_checks_hold(example: Path) -> None:
    runpy.run_path(str(example), run_name="__main__")


def test_method_has_a_page_that_names_each_of_its_options(method: Method) -> None:
    page = ROOT / "docs" / "methods" / f"{method.name}.md"
    text = page.read_text("utf-8")
    own = set(method.config.field_names()) - {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "fan_in_fan_out",
    }
    assert [name for name in own if f"`{name}`" not in text] == []


def test_yaml_of_the_command_line_page_is_a_run() -> None:
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "cli.md").read_text("utf-8"), flags=re.DOTALL)
    assert text is not None
    values = yaml.safe_load(text[1])
    assert values.keys() <= {"adapter", *RunSettings.__dataclass_fields__}
