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
        """The data that the figures are of, where that is known."""
        return self.measured_on or next(iter(self.data), None)


def card(plan: Plan, base: str | None, about: About | None = None) -> str:
    """The text of a card: facts for machines in front, and for people.

    Args:
        plan: of the adapter.
        base: where the base model came from.
        about: what else is known.
    """
    about = about or About()
    lines = ["---", *_front(plan, base, about), "---", "", f"# {_article(plan.method.title)} adapter", ""]
    lines += [about.text, ""] if about.text else []
    lines += table(plan, base, about)
    if about.figures:
        lines += [f"Measured on {about.source_of_figures() or 'data not named'}:", "", "| metric | value |"]
        lines += ["|---|---|", *(f"| {name} | {value:.6g} |" for name, value in about.figures.items()), ""]
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
    """What an adapter is, as the lines of a table."""
    methods = [f"{single.method.title} ({single.method.source})" for single in plan.single_plans]
    modules = {target.path for target in plan.targets}
    options = []
    for single in plan.single_plans:
        options += [f"`{name}={value!r}`" for name, value in _changed_options(single)]
    rows = {
        "Method": ", ".join(dict.fromkeys(methods)),
        "Base model": f"`{base}`" if base else f"not named (a {plan.model_name})",
        "Trained parameters": f"{plan.parameters:,} in {len(modules)} modules",
    }
    if about.data:
        rows["Data"] = ", ".join(about.data)
    rows["Options"] = ", ".join(options) or "defaults"
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        cell = value.replace("|", "/")
        lines.append(f"| {name} | {cell} |")
    return [*lines, ""]


def _article(title: str) -> str:
    return f"{'An' if title[0] in 'AEIOU' else 'A'} {title}"


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
    values: dict[str, object] = {"library_name": "peft"}
    values |= {"base_model": base} if base else {}
    values |= {"datasets": list(about.data)} if about.data else {}
    values |= {"license": about.license} if about.license else {}
    values["tags"] = ["grafts", plan.method.name, *about.tags]
    if about.figures:
        on = about.source_of_figures() or "not named"
        metrics = [{"type": name, "name": name, "value": value} for name, value in about.figures.items()]
        task = {"type": _TASKS.get(plan.config.task_type or "", "other")}
        result = {"task": task, "dataset": {"type": on, "name": on}, "metrics": metrics}
        values["model-index"] = [{"name": plan.method.title, "results": [result]}]
    return [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]


_TASKS = {
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "CAUSAL_LM": "text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
