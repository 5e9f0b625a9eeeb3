"""Model cards: the ``README.md`` beside an adapter, which says what it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from grafts.lifecycle.plan import Plan

_UNTOLD = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type", "configs"}


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model card can say that the adapter itself does not.

    Attributes:
        data: the datasets that it was trained on, hub ids or words.
        figures: what was measured, by the name of the metric.
        measured_on: the data that the figures are of; the first of ``data`` if not given.
        license: an identifier as hubs know them (``"apache-2.0"``).
        tags: more tags.
        text: a paragraph of one's own.
    """

    data: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    measured_on: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()
    text: str = ""

    def source_of_figures(self) -> str | None:
        """The data that the figures are of: what was said, else the first of the data that it was trained on;
        None where nothing is known.
        """
        return self.measured_on or next(iter(self.data), None)


def card(plan: Plan, base: str | None, about: About | None = None) -> str:
    """The text of a card: facts for machines in front, and for people.

    Args:
        plan: of the adapter.
        base: where the base model came from.
        about: what else is known.
    """
    about = about or About()
    lines = ["---", *_front(plan, base, about), "---", ""]
    lines += [f"# {_article(plan.method.title)} adapter", ""]
    if about.text:
        lines += [about.text, ""]
    lines += table(plan, base, about)
    if about.figures:
        lines += [f"Measured on {about.source_of_figures() or 'data not named'}:", ""]
        lines += ["| metric | value |", "|---|---|"]
        for name, value in about.figures.items():
            lines.append(f"| {name} | {value:.6g} |")
        lines.append("")
    code = [
        "```python",
        "import grafts",
        "",
        'model = grafts.from_pretrained("this folder or repository")',
        "```",
        "",
    ]
    return "\n".join([*lines, *code])


def table(plan: Plan, base: str | None, about: About) -> list[str]:
    """What an adapter is, as the lines of a table: method, base, size, data and options.

    Args:
        plan: of the adapter.
        base: where the base model came from.
        about: what else is known.
    """
    # A union may have several of one method.
    methods = [f"{single.method.title} ({single.method.source})" for single in plan.single_plans]
    modules = {target.path for target in plan.targets}
    rows = {
        "Method": ", ".join(dict.fromkeys(methods)),
        "Base model": f"`{base}`" if base else f"not named (a {plan.model_name})",
        "Trained parameters": f"{plan.parameters:,} in {len(modules)} modules",
    }
    if about.data:
        rows["Data"] = ", ".join(about.data)
    rows["Options"] = ", ".join(_shown_options(plan)) or "defaults"
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        # A bar would end the cell.
        cell = value.replace("|", "/")
        lines.append(f"| {name} | {cell} |")
    return [*lines, ""]


def _shown_options(plan: Plan) -> list[str]:
    """The options of all members of a plan that are not at their default, as they would be written."""
    options = []
    for single in plan.single_plans:
        options += [f"`{name}={value!r}`" for name, value in _changed_options(single)]
    return options


def _article(title: str) -> str:
    """A title with its article in front."""
    if title[0] in "AEIOU":
        return f"An {title}"
    return f"A {title}"


def _changed_options(plan: Plan) -> list[tuple[str, object]]:
    """The options that are not at their default."""
    changed = []
    for option in dataclasses.fields(plan.config):
        value = getattr(plan.config, option.name)
        default = option.default
        if option.default_factory is not dataclasses.MISSING:
            default = option.default_factory()
        if option.name not in _UNTOLD and value != default:
            changed.append((option.name, list(value) if isinstance(value, tuple) else value))
    return changed


def _front(plan: Plan, base: str | None, about: About) -> list[str]:
    """The block of metadata, each value as JSON, which is YAML."""
    # The hub sorts adapters in the layout of `peft` under that library's name.
    values: dict[str, object] = {"library_name": "peft"}
    if base:
        values["base_model"] = base
    if about.data:
        values["datasets"] = list(about.data)
    if about.license:
        values["license"] = about.license
    values["tags"] = ["grafts", plan.method.name, *about.tags]
    if about.figures:
        values["model-index"] = [_results(plan, about)]
    return [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]


def _results(plan: Plan, about: About) -> dict[str, object]:
    """What was measured, as the hub's ``model-index`` has it."""
    dataset = about.source_of_figures() or "not named"
    metrics = [{"type": name, "name": name, "value": value} for name, value in about.figures.items()]
    task = {"type": _TASKS.get(plan.config.task_type or "", "other")}
    result = {"task": task, "dataset": {"type": dataset, "name": dataset}, "metrics": metrics}
    return {"name": plan.method.title, "results": [result]}


_TASKS = {
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "CAUSAL_LM": "text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
