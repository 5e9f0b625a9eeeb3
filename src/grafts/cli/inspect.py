"""``grafts inspect``: what an adapter would do to a model, or what an adapter's folder holds."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from grafts.checkpoints import peft_format as peft
from grafts.checkpoints.atomic_write import find
from grafts.cli.console import out, quiet
from grafts.cli.options import adapter_options, adapter_parameters, with_signature
from grafts.lifecycle.plan import Plan
from grafts.lifecycle.resolve import plan
from grafts.methods._presets import USUAL, config_from
from grafts.methods._registry import method_named, method_names, method_of
from grafts.modules.patterns import collapsed
from grafts.structure.infer import infer_interface
from grafts.structure.interface import AdapterModelInterface

NAME = "inspect"


def inspect(
    source: Annotated[str, typer.Argument(help="A model (folder or hub id), or an adapter's folder.")],
    method: Annotated[
        str, typer.Option(help="The kind of adapter to plan, a preset, or a union of several.")
    ] = USUAL,
    task: Annotated[str | None, typer.Option(help="Plan for the model with this task's head.")] = None,
    interface: Annotated[
        bool,
        typer.Option(
            "--interface", help="Show what the model's modules are, ready to paste, and how sure that is."
        ),
    ] = False,
    **values: Any,
) -> None:
    """Show a plan for a model (which modules, which shapes, how many parameters), or the contents of an
    adapter's folder.
    """
    directory = Path(source)
    if directory.is_dir() and find(directory, peft.CONFIG_FILE) is not None:
        show_adapter(directory)
        return
    quiet()
    bases, tasks = (importlib.import_module(f"grafts.cli.training.{name}") for name in ("bases", "saved"))
    wanted = tasks.task_named(task) if task else None
    if interface:
        show_interface(infer_interface(bases.skeleton(source, wanted)))
        return
    options = adapter_options(values)
    if wanted is not None:
        options["task_type"] = wanted.task_type
    if method in method_names():
        config = method_named(method).config
        config.check_names(options)
        made = config(**options)
    else:
        made = config_from(method)
        made.check_names(options)
        made = dataclasses.replace(made, **options)
    show_plan(plan(bases.skeleton(source, wanted), made))


def show_interface(found: AdapterModelInterface) -> None:
    """An interface as Python, and how each accessor was found."""
    out.print(str(found), highlight=False, markup=False, soft_wrap=True)
    table = _table("accessor", "how sure", "why")
    for finding in found.report:
        table.add_row(finding.accessor, finding.sure, finding.why)
    out.print()
    out.print(table)


def show_plan(made: Plan) -> None:
    """The plan as a table."""
    table = _table("module", "role", "shape", "part", ">count", ">parameters")
    for module, role, shape, part, count, parameters in made.rows():
        table.add_row(module, role, shape, part, str(count), f"{parameters:,}")
    table.add_section()
    table.add_row("total", "", "", "", str(len(made.targets)), f"{made.parameters:,}", style="bold")
    out.print(table)
    out.print(made.summary(), highlight=False, soft_wrap=True)


def show_adapter(directory: Path) -> None:
    """An adapter's config and tensors."""
    checkpoint = peft.read(directory)
    known = method_of(checkpoint.config)
    settings = _table("option", "value", title=f"{known.title} in {directory}")
    for name, value in checkpoint.config.to_dict().items():
        if value not in (None, {}, [], False):
            settings.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    out.print(settings)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, tensor in checkpoint.tensors.items():
        shape = " x ".join(map(str, tensor.shape))
        groups.setdefault((collapsed(name), shape, str(tensor.dtype).removeprefix("torch.")), []).append(
            tensor.numel()
        )
    tensors = _table("tensor", "shape", "type", ">count", ">parameters")
    for key, sizes in groups.items():
        tensors.add_row(*key, str(len(sizes)), f"{sum(sizes):,}")
    tensors.add_section()
    total = sum(map(sum, groups.values()))
    tensors.add_row("total", "", "", str(len(checkpoint.tensors)), f"{total:,}", style="bold")
    out.print(tensors)
    out.print(f"{checkpoint.size:,} bytes", highlight=False)


def _table(*columns: str, title: str | None = None) -> Table:
    """A table; a column whose name begins with > is of numbers."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    return table


def command() -> Callable[..., None]:
    """The function with a flag for every adapter option."""
    return with_signature(inspect, adapter_parameters())
