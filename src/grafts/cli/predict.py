"""``grafts predict``: use a saved adapter on new texts."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from grafts.checkpoints.atomic_write import write_all
from grafts.cli.console import err, quiet
from grafts.errors import RunError

NAME = "predict"


def predict(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; without them and --file, a line of standard input each."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Rows to answer, in a file as for train.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the answers go, as JSON lines; standard output if not given.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base model; the adapter's own if not given.")] = None,
    task: Annotated[str | None, typer.Option(help="The task; the adapter's own if not given.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="The labels in order, with commas; those of the run if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How long a made text may be.", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.", min=1)] = 32,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one) or cpu.")] = "auto",
) -> None:
    """Answer texts with a saved adapter: labels, tags, or texts, one JSON object a line."""
    quiet()
    rows = list(_rows(texts, file))
    open_adapter = importlib.import_module("grafts.cli.training.saved").open_adapter
    names = labels.split(",") if labels else None
    saved = open_adapter(adapter, model=model, task=task, labels=names, device=device)
    settings = {**saved.settings, "max_new_tokens": max_new_tokens}
    column = settings.get("text_column") or "text"
    answers = _answers(saved, _with_column(rows, column), settings, batch_size)
    # To a terminal each as soon as it is there, into a file all of them or none.
    if output is None:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
        return
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
    write_all(output.parent, {output.name: "".join(lines).encode()})
    err.print(f"{len(lines)} answers are in {output}", highlight=False, soft_wrap=True)


def _with_column(rows: Sequence[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """Rows in which the text stands in the column that the adapter was trained with.

    Args:
        rows: to be answered; texts of the command line stand in ``text``.
        column: the name of the column.

    Raises:
        RunError: a row has no text; names it.
    """
    result = []
    for number, row in enumerate(rows, start=1):
        named = row
        if column not in row and "text" in row:
            named = {**row, column: row["text"]}
        if column not in named and not isinstance(row.get("tokens"), list):
            raise RunError(f"row {number} has no column {column!r}; it has {', '.join(row)}")
        result.append(named)
    return result


def _answers(
    saved: Any, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], size: int
) -> Iterator[dict[str, Any]]:
    """The answers of a saved adapter, one for each row, so many rows at a time."""
    for start in range(0, len(rows), size):
        yield from saved.task.predict(saved.model, saved.tokenizer, rows[start : start + size], settings)


def _rows(texts: list[str] | None, file: Path | None) -> Iterator[dict[str, Any]]:
    """The rows to answer, from wherever they are given.

    Raises:
        RunError: there are none, or they are given twice.
    """
    if texts and file:
        raise RunError("texts are given both as arguments and with --file: choose one")
    if file is not None:
        yield from importlib.import_module("grafts.cli.training.data").read_rows(file)
        return
    lines = texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise RunError("there is nothing to answer: give texts, --file, or lines on standard input")
    yield from ({"text": line} for line in lines)


def command() -> Callable[..., None]:
    """The function that typer calls."""
    return predict
