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
from grafts.config import AdapterConfig
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
    config = _config(method, options)
    show_plan(plan(bases.skeleton(source, wanted), config))


def _config(method: str, options: dict[str, Any]) -> AdapterConfig:
    """The config of a method, a preset or a union, with these options.

    Raises:
        ConfigError: an option is unknown or cannot be.
    """
    if method in method_names():
        config_class: type[AdapterConfig] = method_named(method).config
        config_class.check_names(options)
        return config_class(**options)
    config = config_from(method)
    config.check_names(options)
    return dataclasses.replace(config, **options)


def show_interface(interface: AdapterModelInterface) -> None:
    """Print an interface as Python, and how each accessor was found.

    Args:
        interface: one that was worked out, with its report.
    """
    out.print(str(interface), highlight=False, markup=False, soft_wrap=True)
    table = _table("accessor", "how sure", "why")
    for finding in interface.report:
        table.add_row(finding.accessor, finding.sure, finding.why)
    out.print()
    out.print(table)


def show_plan(planned: Plan) -> None:
    """Print a plan as a table, repeated layers as one row, with a line of totals.

    Args:
        planned: the plan.
    """
    table = _table("module", "role", "shape", "part", ">count", ">parameters")
    for module, role, shape, part, count, parameters in planned.rows():
        table.add_row(module, role, shape, part, str(count), f"{parameters:,}")
    table.add_section()
    table.add_row("total", "", "", "", str(len(planned.targets)), f"{planned.parameters:,}", style="bold")
    out.print(table)
    out.print(planned.summary(), highlight=False, soft_wrap=True)


def show_adapter(directory: Path) -> None:
    """Print an adapter's config, without what is off, and its tensors, those of repeated layers as one row.

    Args:
        directory: the adapter's, in the layout of `peft`.
    """
    checkpoint = peft.read(directory)
    method = method_of(checkpoint.config)
    settings = _table("option", "value", title=f"{method.title} in {directory}")
    for name, value in checkpoint.config.to_dict().items():
        if value not in (None, {}, [], False):
            settings.add_row(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    out.print(settings)
    # The same tensor of every layer -> how many elements each has.
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, tensor in checkpoint.tensors.items():
        shape = " x ".join(map(str, tensor.shape))
        group = (collapsed(name), shape, str(tensor.dtype).removeprefix("torch."))
        groups.setdefault(group, []).append(tensor.numel())
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
