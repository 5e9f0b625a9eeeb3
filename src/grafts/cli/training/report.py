"""The loss curve and the report page of a run."""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from grafts.cli.training.settings import RunSettings
from grafts.lifecycle.plan import Plan

Losses = Sequence[tuple[int, float]]
Validation = Sequence[Mapping[str, float]]

_STYLE = """
:root { color-scheme: light dark; --line: #d8dde3; --soft: #5b6672; --back: #ffffff; --text: #1a2027; --card: #f5f7f9; --bar: #2f7d5b; }
@media (prefers-color-scheme: dark) {
  :root { --line: #333c46; --soft: #9aa6b2; --back: #14181d; --text: #e6eaee; --card: #1d232a; --bar: #4fae86; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; background: var(--back); color: var(--text); }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } p.soft { color: var(--soft); margin: 0; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0; }
.card { background: var(--card); border-radius: .6rem; padding: .7rem 1rem; min-width: 8.5rem; }
.card b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; } .card span { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; } td.n, th.n { text-align: right; }
td code { font-size: .88em; overflow-wrap: anywhere; } figure { margin: 0; background: #fff; border-radius: .6rem; } svg { width: 100%; height: auto; display: block; }
.meter { background: var(--line); height: .5rem; border-radius: .25rem; min-width: 7rem; } .meter i { display: block; height: 100%; border-radius: .25rem; background: var(--bar); }
"""


def loss_picture(losses: Losses, validation: Validation, format: str = "png") -> bytes:
    """The training loss over steps, with the validation loss where there is one, as a picture file.

    Args:
        losses: (step, training loss).
        validation: figures with ``step`` and ``eval_loss``; may be empty.
        format: as `matplotlib` calls it; an ``"svg"`` is the same for the same figures.
    """
    with matplotlib.rc_context({"svg.hashsalt": "grafts", "font.size": 10}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axes = figure.add_subplot()
        steps, values = zip(*losses, strict=True) if losses else ((), ())
        axes.plot(
            steps,
            values,
            color="#2f7d5b",
            linewidth=1.4,
            label="training",
        )
        if validation:
            points = [(entry["step"], entry["eval_loss"]) for entry in validation]
            axes.plot(
                *zip(*points, strict=True),
                "o-",
                color="#c2572b",
                markersize=5,
                linewidth=1.2,
                label="validation",
            )
            axes.legend(frameon=False)
        axes.set(xlabel="step", ylabel="loss", xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e7eb", linewidth=0.8)
        picture = io.BytesIO()
        figure.savefig(picture, format=format, dpi=150, metadata={"Date": None} if format == "svg" else None)
    return picture.getvalue()


def report_page(
    settings: RunSettings, plan: Plan, metrics: Mapping[str, Any], losses: Losses, validation: Validation
) -> str:
    """One HTML page on a run, with nothing to fetch: figures, loss curve, classes, adapter, settings.

    Args:
        settings: of the run.
        plan: of its adapter.
        metrics: as in ``metrics.json``.
        losses: (step, training loss).
        validation: figures after each epoch; may be empty.
    """
    curve = loss_picture(losses, validation, "svg").decode()
    used = [(name, value) for name, value in dataclasses.asdict(settings).items() if value is not None]
    title = f"{plan.method.title} on {'/'.join(Path(settings.model).parts[-2:])}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(settings.task)}, trained on {_text(settings.train_file)}</p>',
        _cards(plan, metrics),
        f"<h2>Loss</h2><figure>{curve[curve.index('<svg') :]}</figure>",
        *_class_tables(metrics),
        "<h2>Adapter</h2>",
        f"<p class='soft'>{_text(plan.summary())}</p>",
        _table(("module", "role", "shape", "part", "count", "parameters"), plan.rows(), numbers=2),
        "<h2>Settings</h2>",
        _table(("setting", "value"), used),
        "<h2>Versions</h2>",
        _table(("package", "version"), metrics["versions"].items()),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _cards(plan: Plan, metrics: Mapping[str, Any]) -> str:
    """The figures that matter most, large."""
    cards = []
    for split in ("test", "validation"):
        for name in ("accuracy", "macro_f1", "perplexity", "loss"):
            if name in metrics.get(split, {}):
                cards.append((f"{metrics[split][name]:.4g}", f"{split} {name.replace('_', ' ')}"))
    share = plan.parameters / plan.base_parameters
    cards.append((f"{plan.parameters:,}", f"trainable parameters ({share:.2%})"))
    cards.append((f"{metrics['seconds']:.0f} s", "training time"))
    lines = ['<div class="cards">']
    for figure, caption in cards:
        lines.append(f'<div class="card"><b>{figure}</b><span>{_text(caption)}</span></div>')
    lines.append("</div>")
    return "".join(lines)


def _class_tables(metrics: Mapping[str, Any]) -> Iterable[str]:
    """How each class did on the last split that was measured, lowest F1 first."""
    for split in ("test", "validation"):
        classes = metrics.get(split, {}).get("classes")
        if not classes:
            continue
        yield f"<h2>Classes, {split}</h2>"
        yield '<table><tr><th>class</th><th class="n">rows</th><th class="n">precision</th><th class="n">recall</th><th>F1</th><th></th></tr>'
        for label, figures in sorted(classes.items(), key=lambda item: float(item[1]["f1"])):
            yield (
                f'<tr><td>{_text(label)}</td><td class="n">{figures["rows"]}</td><td class="n">{figures["precision"]:.3f}</td>'
                f'<td class="n">{figures["recall"]:.3f}</td><td>{figures["f1"]:.3f}</td>'
                f'<td><div class="meter"><i style="width:{figures["f1"]:.0%}"></i></div></td></tr>'
            )
        yield "</table>"
        return


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int = 0) -> str:
    """A table whose last ``numbers`` columns are numbers."""
    first_number = len(head) - numbers
    headings = []
    for column, cell in enumerate(head):
        kind = ' class="n"' if column >= first_number else ""
        headings.append(f"<th{kind}>{_text(cell)}</th>")
    lines = [f"<tr>{''.join(headings)}</tr>"]
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            shown = _text(_shown(cell))
            if column >= first_number:
                cells.append(f'<td class="n">{shown}</td>')
            else:
                cells.append(f"<td><code>{shown}</code></td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _shown(cell: object) -> str:
    """A cell as text, large numbers with commas."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return str(cell)


def _text(value: object) -> str:
    """A value as text in which nothing is markup."""
    return html.escape(str(value))
