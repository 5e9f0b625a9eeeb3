"""``grafts train``: fine-tune a model with an adapter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from grafts.cli.console import err, quiet
from grafts.cli.options import adapter_options, adapter_parameters, settings_parameters, with_signature
from grafts.cli.training.settings import RunSettings

NAME = "train"


def train(
    config: Annotated[
        Path | None, typer.Option("--config", help="A YAML file of settings; flags win over it.")
    ] = None,
    **values: Any,
) -> None:
    """Fine-tune a model of transformers with an adapter, and leave a folder with adapter, figures, settings
    and report.

    The same command takes many processes: accelerate launch -m grafts train ..., or torchrun -m grafts train
    ...
    """
    quiet()
    adapter = {p.name: values.pop(p.name) for p in adapter_parameters()}
    run = importlib.import_module(
        "grafts.cli.training.run"
    ).run  # loads transformers, which help does not need
    run(RunSettings.combined(config, values, adapter_options(adapter)), err)
    distributed = importlib.import_module("torch.distributed")
    if (
        distributed.is_available() and distributed.is_initialized()
    ):  # threads of a group left open end a process by abort
        distributed.barrier()
        distributed.destroy_process_group()


def command() -> Callable[..., None]:
    """The function with a flag for every setting and every adapter option."""
    return with_signature(
        train, [*settings_parameters(RunSettings, without=("adapter",)), *adapter_parameters()]
    )
