"""``grafts merge``: make a plain model of a base and an adapter."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

import grafts
from grafts.cli.console import err, quiet
from grafts.errors import RunError

NAME = "merge"


def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    output: Annotated[
        Path, typer.Argument(help="Where the merged model goes; a folder that is not there yet.")
    ],
    model: Annotated[str | None, typer.Option(help="The base model; the adapter's own if not given.")] = None,
    task: Annotated[str | None, typer.Option(help="The task; the adapter's own if not given.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="The labels in order, with commas; those of the run if not given.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Give a weight that others share a copy of its own.")
    ] = False,
) -> None:
    """Fold an adapter into its base and write a plain model that needs no library to load."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{str(output)!r} is there already: name a new folder")
    quiet()
    open_adapter = importlib.import_module("grafts.cli.training.saved").open_adapter
    saved = open_adapter(
        adapter, model=model, task=task, labels=labels.split(",") if labels else None, device="cpu"
    )
    plain = grafts.detach(grafts.merge(saved.model, untie=untie), keep_merged=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".merging-") as scratch:
            staged = Path(scratch) / output.name
            plain.save_pretrained(staged)
            saved.tokenizer.save_pretrained(staged)
            if output.is_dir():
                output.rmdir()
            shutil.move(staged, output)
    except OSError as error:
        raise RunError(f"cannot write to {str(output)!r}: {error.strerror or error}") from error
    err.print(f"{saved.report.plan.summary()}, merged into {output}", highlight=False, soft_wrap=True)


def command() -> Callable[..., None]:
    """The function that typer calls."""
    return merge
