"""The tasks of ``grafts train`` and ``grafts predict``: what each asks of the data, the model and the
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np
from torch import nn

from grafts.cli.training.settings import RunSettings
from grafts.errors import RunError, did_you_mean

Metrics = dict[str, Any]


class Task(Protocol):
    """One kind of training.

    Attributes:
        name: its name on the command line.
        task_type: its name in ``adapter_config.json``.
        auto_class: the class of `transformers` that makes its models.
        predicts: whether figures need the model's choices, and not its loss alone.
    """

    name: str
    task_type: str
    auto_class: str
    predicts: bool

    def labels(self, rows: datasets.Dataset, file: str, settings: RunSettings) -> list[str] | None:
        """The labels that the training data use, sorted; None for tasks without labels."""

    def encode(
        self, rows: datasets.Dataset, file: str, tokenizer: Any, settings: RunSettings
    ) -> datasets.Dataset:
        """Rows as the model's inputs. Raises RunError where a row cannot be."""

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], Mapping[str, Any]]:
        """What makes a batch of encoded rows."""

    def metrics(self, choices: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Metrics:
        """Figures from the model's choices, where `predicts`."""

    def predict(
        self, model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """One answer for each row."""


_tasks: dict[str, Task] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task known by its name."""
    _tasks[task.name] = task()
    return task


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        RunError: there is none; names the nearest.
    """
    if name not in _tasks:
        raise RunError(f"no task is called {name!r}; {did_you_mean(name, _tasks)}")
    return _tasks[name]


def task_names() -> list[str]:
    """The names of all tasks, sorted."""
    return sorted(_tasks)


@dataclass(frozen=True)
class ClassFigures:
    """How well one class was recognised: precision, recall and F1 in 0 to 1, and how many rows it has."""

    precision: float
    recall: float
    f1: float
    rows: int


def classification_metrics(choices: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Metrics:
    """Accuracy, macro F1 over the classes that occur, and the figures of each class.

    Args:
        choices: chosen class of each item, ``(items,)``.
        truth: right class of each item, ``(items,)``.
        labels: the classes' names.
    """
    by_class = {}
    for index, label in enumerate(labels):
        chosen, right = choices == index, truth == index
        hits = int((chosen & right).sum())
        precision = hits / max(int(chosen.sum()), 1)
        recall = hits / max(int(right.sum()), 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-12)
        if right.any() or chosen.any():
            by_class[label] = ClassFigures(precision, recall, f1, int(right.sum()))
    return {
        "accuracy": float((choices == truth).mean()),
        "macro_f1": float(np.mean([figures.f1 for figures in by_class.values()])),
        "classes": {label: vars(figures) for label, figures in by_class.items()},
    }
