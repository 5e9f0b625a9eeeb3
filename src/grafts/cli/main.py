"""``grafts``: the entry point, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import Annotated

try:
    import typer
    from rich.markup import escape
except ImportError as missing:
    sys.exit(f"error: the command line needs {missing.name}: pip install 'grafts[cli]'")

import grafts
from grafts.cli import inspect, merge, predict, train
from grafts.cli.console import err, out
from grafts.errors import GraftsError

app = typer.Typer(
    name="grafts",
    help="Small trainable adapters on frozen PyTorch models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (inspect, train, predict, merge):
    app.command(command.NAME)(command.command())


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; works at any place.")
    ] = False,
) -> None:
    """Small trainable adapters on frozen PyTorch models."""
    if version:
        out.print(f"grafts {grafts.__version__}", highlight=False)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 for success, 1 for an error in one sentence, 2 for a call that cannot
    be read.
    """
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    try:
        status = app([word for word in words if word != "--debug"], standalone_mode=True)
    except GraftsError as error:
        if debug:
            raise
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted; nothing was written")
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        text = escape(" ".join(f"{type(error).__name__}: {error}".split())[:400])
        err.print(f"[bold red]error:[/] {text} (--debug shows where)", highlight=False, soft_wrap=True)
        sys.exit(1)
    sys.exit(status)
