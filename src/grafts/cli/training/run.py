"""One fine-tuning run, from settings to a directory that holds adapter, figures, settings, picture and
report.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

import grafts
from grafts.checkpoints.atomic_write import write_all
from grafts.checkpoints.save import checkpoint_files
from grafts.cli.training import classification, generation
from grafts.cli.training.bases import load_base, load_tokenizer
from grafts.cli.training.data import read_rows
from grafts.cli.training.progress import ProgressBar
from grafts.cli.training.report import loss_picture, report_page
from grafts.cli.training.settings import RunSettings
from grafts.cli.training.tasks import Metrics, Task, task_named
from grafts.errors import RunError
from grafts.lifecycle.plan import Plan
from grafts.lifecycle.registry import registry_of

__all__ = ["Fitted", "classification", "evaluate", "fit", "generation", "run"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Fitted:
    """What training left behind.

    Attributes:
        losses: (step, training loss) as logged.
        validation: the validation figures after each epoch, with ``step`` and ``epoch``.
        seconds: how long it took.
        trainer: the trainer, for figures on other data.
    """

    losses: list[tuple[int, float]]
    validation: list[dict[str, float]]
    seconds: float
    trainer: Trainer

    def last_loss(self) -> float | None:
        """The mean training loss over the last tenth of the run."""
        last = [loss for _, loss in self.losses[-max(1, len(self.losses) // 10) :]]
        if last:
            return sum(last) / len(last)
        return None


def run(settings: RunSettings, console: Console) -> Metrics:
    """Fine-tune as the settings say and write ``settings.output_dir``, whole or not at all.

    Everything that can be checked is checked before training: files, columns, labels, model, and the room to
    write.

    Returns:
        The figures, as in ``metrics.json``.

    Raises:
        RunError, GraftsError: one sentence on what is wrong; nothing was written.
    """
    # What can be refused without the model.
    task = task_named(settings.task)
    config = settings.adapter_config(task.task_type)
    output = Path(settings.output_dir)
    _require_free(output, settings.overwrite)
    files = {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}
    rows = {split: read_rows(file) for split, file in files.items() if file}
    if settings.labels is None:
        settings = dataclasses.replace(
            settings, labels=task.labels(rows["train"], settings.train_file, settings)
        )

    # The model, with its adapter, and the data as it takes them.
    set_seed(settings.seed)
    model = load_base(settings.model, task, settings.labels, settings.dtype)
    tokenizer = load_tokenizer(settings.model, model)
    encoded = {}
    for split, rows_of_split in rows.items():
        encoded[split] = task.encode(rows_of_split, str(files[split]), tokenizer, settings)
    grafts.add(model, config)
    plan = registry_of(model).require("default")
    if _is_first():
        console.print(plan.summary(), highlight=False)

    fitted = fit(model, task, encoded, tokenizer, settings, ProgressBar(console, "training"))
    metrics: Metrics = {
        "train": {"loss": fitted.last_loss(), "rows": len(encoded["train"])},
        "parameters": {"trainable": plan.parameters, "base": plan.base_parameters},
        "seconds": round(fitted.seconds, 2),
        "versions": {
            "grafts": grafts.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    for split in SPLITS[1:]:
        if split in encoded:
            metrics[split] = evaluate(fitted.trainer, task, encoded[split], settings)
    # Of several processes one writes, and all of it at once.
    if _is_first():
        files_left = checkpoint_files(model, "default") | run_files(plan, settings, metrics, fitted)
        write_all(output, files_left)
        _show(console, metrics, output)
    return metrics


def fit(
    model: nn.Module,
    task: Task,
    encoded: Mapping[str, datasets.Dataset],
    tokenizer: Any,
    settings: RunSettings,
    bar: ProgressBar,
) -> Fitted:
    """Train what is trainable in ``model`` with the `Trainer` of `transformers`.

    Raises:
        RunError: nothing is trainable.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise RunError("nothing in the model is trainable: grafts.train_only(model, name) chooses an adapter")
    # A Trainer wants a folder, though nothing is to be left in it.
    scratch = tempfile.mkdtemp(prefix="grafts-")
    trainer = Trainer(
        model=model,
        args=_arguments(settings, scratch, evaluates="validation" in encoded, predicts=task.predicts),
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("validation"),
        data_collator=task.collator(tokenizer, model),
        compute_metrics=_scalar_metrics(task, settings.labels or []) if task.predicts else None,
        preprocess_logits_for_metrics=_choices if task.predicts else None,
        callbacks=[bar],
    )
    # The bar shows what these would print.
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    started = time.monotonic()
    try:
        trainer.train()
    finally:
        bar.close()
        shutil.rmtree(scratch, ignore_errors=True)
    validation = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return Fitted(bar.losses, validation, time.monotonic() - started, trainer)


def evaluate(trainer: Trainer, task: Task, rows: datasets.Dataset, settings: RunSettings) -> Metrics:
    """The figures of a task on encoded rows: the loss, and accuracy and F1 or perplexity.

    Args:
        trainer: the one that has trained the model.
        task: the task.
        rows: as the task has encoded them.
        settings: of the run; its labels name the classes.
    """
    if not task.predicts:
        loss = float(trainer.evaluate(rows)["eval_loss"])
        # Beyond 700 the exponential is no number any more.
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "rows": len(rows)}
    result = trainer.predict(rows)
    figures = task.metrics(_array(result.predictions), np.asarray(result.label_ids), settings.labels or [])
    return {"loss": float(result.metrics["test_loss"]), "rows": len(rows), **figures}


def _arguments(settings: RunSettings, scratch: str, *, evaluates: bool, predicts: bool) -> TrainingArguments:
    """The settings in the words of `transformers`.

    Args:
        settings: of the run.
        scratch: a folder in which nothing is left.
        evaluates: there is data for figures after each epoch.
        predicts: these figures are made of what the model has chosen, and not of the loss alone.
    """
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        use_cpu=settings.device == "cpu" or not torch.accelerator.is_available(),
        seed=settings.seed,
        eval_strategy="epoch" if evaluates else "no",
        prediction_loss_only=not predicts,
        logging_steps=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available() and settings.device != "cpu",
        remove_unused_columns=False,
    )


def _choices(logits: Any, labels: Any) -> torch.Tensor:
    """The chosen class of each item, so that no logits are kept."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(-1)  # type: ignore[no-any-return]


def _scalar_metrics(task: Task, labels: Sequence[str]) -> Any:
    """What a Trainer calls for figures: those of a task that are single numbers."""

    def compute(prediction: transformers.EvalPrediction) -> dict[str, float]:
        figures = task.metrics(_array(prediction.predictions), np.asarray(prediction.label_ids), labels)
        return _scalars(figures)

    return compute


def _scalars(figures: Metrics) -> dict[str, float]:
    """The figures that are single numbers; others are of each class."""
    return {name: value for name, value in figures.items() if isinstance(value, float)}


def _array(predictions: Any) -> np.ndarray:
    """What a Trainer gives as predictions, of several tensors the first, as an array."""
    if isinstance(predictions, tuple):
        return np.asarray(predictions[0])
    return np.asarray(predictions)


def _is_first() -> bool:
    """Whether this is the process that writes and speaks, among those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


def _require_free(output: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds a run, or that cannot be written to, before anything else is
    done.
    """
    if output.exists() and not output.is_dir():
        raise RunError(f"{str(output)!r} is a file; output_dir must be a folder")
    if output.is_dir() and (output / "adapter_config.json").exists() and not overwrite:
        raise RunError(f"{str(output)!r} holds a run already: --overwrite replaces it")
    # Written to and not only looked at: rights do not tell whether there is space.
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=parent) as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
    except OSError as error:
        raise RunError(f"cannot write to {str(parent)!r}: {error.strerror or error}") from error


def run_files(plan: Plan, settings: RunSettings, metrics: Metrics, fitted: Fitted) -> dict[str, bytes]:
    """The files beside the adapter that a run leaves, by name."""
    header = "# grafts train --config run.yaml --output-dir ELSEWHERE reproduces this run\n"
    header += "".join(f"# {name} {version}\n" for name, version in metrics["versions"].items())
    return {
        "metrics.json": (json.dumps(metrics, indent=2) + "\n").encode(),
        "run.yaml": (header + dataclasses.replace(settings, overwrite=False).to_yaml()).encode(),
        "loss.png": loss_picture(fitted.losses, fitted.validation),
        "report.html": report_page(settings, plan, metrics, fitted.losses, fitted.validation).encode(),
    }


def _show(console: Console, metrics: Metrics, output: Path) -> None:
    """A line of figures for each split, and where things are."""
    for split in SPLITS[1:]:
        if split in metrics:
            figures = []
            for name, value in _scalars(metrics[split]).items():
                figures.append(f"{name.replace('_', ' ')} {value:.4f}")
            console.print(f"{split}: {', '.join(figures)}", highlight=False)
    console.print(
        f"trained in {metrics['seconds']:.0f} s; adapter and report are in {output}",
        highlight=False,
        soft_wrap=True,
    )
