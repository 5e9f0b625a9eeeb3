"""An adapter's directory together with the base that it belongs on: what ``predict`` and ``merge`` start
from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import grafts
from grafts.checkpoints.peft_format import read_config
from grafts.cli.training import classification, generation
from grafts.cli.training.bases import load_base, load_tokenizer
from grafts.cli.training.settings import RunSettings, read_yaml
from grafts.cli.training.tasks import Task, task_named, task_names
from grafts.errors import RunError

__all__ = ["Saved", "classification", "generation", "open_adapter"]


@dataclass(frozen=True)
class Saved:
    """A base with a saved adapter on it, active.

    Attributes:
        model: the adapted model, in evaluation mode.
        tokenizer: the base's tokenizer.
        task: what it was trained for.
        settings: the settings of its run, as far as they are known.
        report: what loading said.
    """

    model: nn.Module
    tokenizer: Any
    task: Task
    settings: Mapping[str, Any]
    report: grafts.LoadReport


def open_adapter(
    directory: Path,
    *,
    model: str | None = None,
    task: str | None = None,
    labels: list[str] | None = None,
    device: str = "auto",
) -> Saved:
    """Load an adapter onto its base.

    Args:
        directory: what ``grafts train``, `grafts.save` or `peft` wrote.
        model: the base; the one that the directory names if not given.
        task: the task; the directory's own if not given.
        labels: for classification, the labels in order; those of the run if not given.
        device: ``"auto"`` or ``"cpu"``.

    Raises:
        RunError: the directory does not say which base or task, and neither does the call.
        GraftsError: the adapter cannot be read, or does not fit.
    """
    config = read_config(directory)
    run_file = directory / "run.yaml"
    defaults = {"max_length": RunSettings.max_length}
    settings = defaults | (dict(read_yaml(run_file)) if run_file.is_file() else {})
    source = model or settings.get("model") or config.base_model_name_or_path
    if not source:
        raise RunError(f"{str(directory)!r} does not name its base model: give it with --model")
    name = (
        task
        or settings.get("task")
        or next((n for n in task_names() if task_named(n).task_type == config.task_type), None)
    )
    if name is None:
        raise RunError(
            f"{str(directory)!r} does not name its task: give it with --task, one of "
            f"{', '.join(task_names())}"
        )
    known = task_named(name)
    settings["labels"] = labels or settings.get("labels")
    if known.predicts and not settings["labels"]:
        raise RunError(f"{str(directory)!r} does not name its labels: give them in order with --labels a,b,c")
    base = load_base(source, known, settings["labels"], settings.get("dtype", "float32"))
    tokenizer = load_tokenizer(source, base)
    report = grafts.load(base, directory)
    if device == "auto" and torch.cuda.is_available():
        base.cuda()
    return Saved(base.eval(), tokenizer, known, settings, report)
