"""Base models and tokenizers by folder or hub id, with one clear sentence where they are not to be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from grafts.cli.training.tasks import Task
from grafts.errors import RunError


def load_base(source: str, task: Task, labels: list[str] | None, dtype: str = "float32") -> nn.Module:
    """The base model for a task, in evaluation mode.

    Raises:
        RunError: it is not there, or not of a kind that can do the task.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if labels:
        options |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
        # a head for other labels is no use: the adapter trains one of its own
        options |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    model: nn.Module = _loaded(getattr(transformers, task.auto_class), source, **options)
    return model.eval()


def load_tokenizer(source: str, model: nn.Module) -> Any:
    """The tokenizer of a base model; one without padding pads with its end-of-text token.

    Raises:
        RunError: there is none, or it can do neither.
    """
    tokenizer = _loaded(transformers.AutoTokenizer, source)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RunError(f"the tokenizer of {source!r} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # type: ignore[union-attr]
        model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    return tokenizer


def skeleton(source: str, task: Task | None) -> nn.Module:
    """The model without its weights, on the meta device: enough to see how it is built.

    Raises:
        RunError: there is no such model.
    """
    config = _loaded(transformers.AutoConfig, source)
    named = next(iter(config.architectures or ()), None)
    with torch.device("meta"):
        if task is None and named is not None and hasattr(transformers, named):
            return getattr(transformers, named)(config)  # type: ignore[no-any-return]
        if task is not None:
            auto = getattr(transformers, task.auto_class)
        else:
            auto = transformers.AutoModel
        try:
            return auto.from_config(config)  # type: ignore[no-any-return]
        except ValueError as error:
            raise RunError(
                f"{source!r} cannot do {task.name if task else 'anything known'}: {_first_line(error)}"
            ) from error


def _loaded(cls: Any, source: str, **options: Any) -> Any:
    """``cls.from_pretrained(source)``, its errors in one sentence."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RunError(f"{source!r} is a folder without a config.json, so it is no model of transformers")
    try:
        return cls.from_pretrained(str(folder) if folder.is_dir() else source, **options)
    except (OSError, ValueError, ImportError) as error:
        what = cls.__name__.removeprefix("AutoModelFor").removeprefix("Auto")
        if not folder.exists() and isinstance(error, OSError):
            raise RunError(
                f"there is no model {source!r}: no such folder, and the hub does not give it "
                f"({_first_line(error)})"
            ) from error
        raise RunError(f"{source!r} cannot be loaded as {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:240]
