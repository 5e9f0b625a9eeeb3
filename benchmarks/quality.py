"""Test accuracy of the demo's run, with this library and with `peft`, equal settings, three seeds.

    python benchmarks/quality.py [--seeds 0 1 2]

Prints a row a run and writes benchmarks/results/DATE-quality.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path

import peft
import torch
from rich.console import Console
from transformers import set_seed

import grafts
from grafts.cli.console import quiet
from grafts.cli.training.bases import load_base, load_tokenizer
from grafts.cli.training.data import read_rows
from grafts.cli.training.progress import ProgressBar
from grafts.cli.training.run import evaluate, fit
from grafts.cli.training.settings import RunSettings
from grafts.cli.training.tasks import task_named

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))  # the demo is no part of the package

from demo import DATA, encoder

ADAPTER = {"r": 8, "target_modules": "all-linear", "task_type": "SEQ_CLS"}


def settings(seed: int) -> RunSettings:
    return RunSettings(
        model=str(encoder()),
        task="sequence-classification",
        train_file=str(DATA / "train.jsonl"),
        learning_rate=3e-3,
        warmup_steps=50,
        max_length=64,
        seed=seed,
        device="cpu",
        output_dir="unused",
    )


def accuracy(library: str, seed: int, console: Console) -> float:
    run = settings(seed)
    task = task_named(run.task)
    rows = {split: read_rows(DATA / f"{split}.jsonl") for split in ("train", "test")}
    run = dataclasses.replace(run, labels=task.labels(rows["train"], run.train_file, run))
    set_seed(seed)
    model = load_base(run.model, task, run.labels)
    tokenizer = load_tokenizer(run.model, model)
    encoded = {split: task.encode(some, split, tokenizer, run) for split, some in rows.items()}
    if library == "grafts":
        grafts.add(model, grafts.LoraConfig(**ADAPTER))
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTER))
    fitted = fit(model, task, encoded, tokenizer, run, ProgressBar(console, f"{library}, seed {seed}"))
    return evaluate(fitted.trainer, task, encoded["test"], run)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    quiet()
    console = Console()
    found: dict[str, list[float]] = {"grafts": [], "peft": []}
    for seed in given.seeds:
        for library, values in found.items():
            values.append(accuracy(library, seed, console))
            console.print(f"{library}, seed {seed}: {values[-1]:.4f}")
    result = {
        "accuracy": found,
        "seeds": given.seeds,
        "versions": {"grafts": grafts.__version__, "peft": peft.__version__, "torch": torch.__version__},
    }
    file = Path(__file__).parent / "results" / f"{datetime.date.today()}-quality.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {file}")


if __name__ == "__main__":
    main()
