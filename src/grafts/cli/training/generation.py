"""Language modelling: texts that go on, and texts made from texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from grafts.cli.training.data import require_text
from grafts.cli.training.settings import RunSettings
from grafts.cli.training.tasks import Metrics, register
from grafts.errors import RunError


class _Generation:
    """What the two language tasks have in common: no labels, figures from the loss, answers from
    ``generate``.
    """

    predicts = False

    def labels(self, rows: datasets.Dataset, file: str, settings: RunSettings) -> list[str] | None:
        """None."""
        return None

    def metrics(self, choices: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Metrics:
        """None beyond the loss."""
        return {}

    @torch.no_grad()
    def predict(
        self, model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """The text that the model makes of each row's."""
        column = settings.get("text_column") or "text"
        texts = [row[column] for row in rows]
        is_encoder_decoder = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
        # A decoder goes on where a row ends, so padding stands in front; an encoder reads from the beginning.
        side = tokenizer.padding_side
        tokenizer.padding_side = "right" if is_encoder_decoder else "left"
        batch = tokenizer(
            texts, truncation=True, max_length=settings["max_length"], padding=True, return_tensors="pt"
        )
        tokenizer.padding_side = side
        # Some tokenizers give them to every model, and `generate` refuses what a model does not take.
        batch.pop("token_type_ids", None)
        generated = model.generate(  # type: ignore[operator]
            **batch.to(model.device),
            max_new_tokens=settings["max_new_tokens"],
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        # A decoder gives the text back in front of what it has made of it.
        start = 0 if is_encoder_decoder else batch["input_ids"].shape[1]
        answers = tokenizer.batch_decode(generated[:, start:], skip_special_tokens=True)
        for text, answer in zip(texts, answers, strict=True):
            yield {"text": text, "output": answer}


@register
class CausalLM(_Generation):
    """Predicting the next token of texts."""

    name = "causal-lm"
    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"

    def encode(
        self, rows: datasets.Dataset, file: str, tokenizer: Any, settings: RunSettings
    ) -> datasets.Dataset:
        """``input_ids``: the texts joined and cut into blocks, or one text a row; each ends with the
        end-of-text token.
        """
        column = settings.text_column or "text"
        require_text(rows, column, file, "text_column")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(list(rows[column]), add_special_tokens=True)["input_ids"]
        texts = [ids + end for ids in encoded if ids]
        size = settings.max_length
        if settings.pack:
            joined = list(chain.from_iterable(texts))
            blocks = [joined[start : start + size] for start in range(0, len(joined), size)]
        else:
            blocks = [ids[:size] for ids in texts]
        # Of a single token there is nothing to predict.
        blocks = [ids for ids in blocks if len(ids) > 1]
        if not blocks:
            raise RunError(f"{file!r} holds no text of two tokens or more")
        return datasets.Dataset.from_dict(
            {"input_ids": blocks, "attention_mask": [[1] * len(ids) for ids in blocks]}
        )

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Pads to the longest row; the labels are the inputs, but for the padding."""
        return _CausalCollator(tokenizer)


class _CausalCollator:
    """Pads, and marks as no label what is padding by the mask, so that real end-of-text tokens are
    learned.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.inner = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def __call__(self, rows: list[Any]) -> Mapping[str, Any]:
        batch = self.inner(rows)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch  # type: ignore[no-any-return]


@register
class Seq2SeqLM(_Generation):
    """Making one text from another."""

    name = "seq2seq-lm"
    task_type = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"

    def encode(
        self, rows: datasets.Dataset, file: str, tokenizer: Any, settings: RunSettings
    ) -> datasets.Dataset:
        """``input_ids``, ``attention_mask`` of the source and ``labels`` of the target."""
        source, target = settings.text_column or "text", settings.target_column or "target"
        require_text(rows, source, file, "text_column")
        require_text(rows, target, file, "target_column")
        encoded = tokenizer(list(rows[source]), truncation=True, max_length=settings.max_length)
        answers = tokenizer(
            text_target=list(rows[target]), truncation=True, max_length=settings.max_target_length
        )
        kept = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        return datasets.Dataset.from_dict({**kept, "labels": answers["input_ids"]})

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Pads source and target each to its longest row."""
        return DataCollatorForSeq2Seq(tokenizer, model=model)  # type: ignore[no-any-return]
