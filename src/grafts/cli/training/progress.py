"""A progress bar with loss and speed for the `Trainer` of `transformers`, and the record of what it logs."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss, speed and remaining time; on a console that is no terminal, a line an epoch.

    Attributes:
        losses: (step, training loss) as logged.
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self.losses: list[tuple[int, float]] = []
        self.started = 0.0
        self.loss = float("nan")
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} rows/s"),
            TimeRemainingColumn(),
            console=console,
            transient=False,
            disable=not console.is_terminal,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock and the bar."""
        self.started = time.monotonic()
        if state.is_world_process_zero:
            self.progress.start()
            self.bar = self.progress.add_task(self.title, total=state.max_steps, loss="  -  ", speed="-")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        if state.is_world_process_zero:
            self.progress.update(
                self.bar, completed=state.global_step, speed=f"{self._speed(args, state):.0f}"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Take down the loss."""
        if logs and "loss" in logs and state.is_world_process_zero:
            self.loss = float(logs["loss"])
            self.losses.append((state.global_step, self.loss))
            self.progress.update(self.bar, loss=f"{self.loss:.4f}")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say a line where there is no bar."""
        if state.is_world_process_zero and not self.console.is_terminal:
            speed = self._speed(args, state)
            self.console.print(
                f"{self.title}: epoch {state.epoch:.0f}, step {state.global_step}/{state.max_steps}, "
                f"loss {self.loss:.4f}, {speed:.0f} rows/s"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the bar down."""
        self.close()

    def close(self) -> None:
        """Take the bar down, also after an error."""
        self.progress.stop()

    def _speed(self, args: TrainingArguments, state: TrainerState) -> float:
        rows = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return float(rows) / max(time.monotonic() - self.started, 1e-9)
