"""Classifying whole texts, and classifying their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from grafts.cli.training.data import require_column, require_text
from grafts.cli.training.settings import RunSettings
from grafts.cli.training.tasks import Metrics, classification_metrics, register
from grafts.errors import RunError, did_you_mean

IGNORED = -100


def _indices(labels: Sequence[str], values: Sequence[Any], file: str, where: str) -> list[int]:
    """The labels' numbers.

    Raises:
        RunError: a value is not among them; names the row and the nearest label.
    """
    index = {label: number for number, label in enumerate(labels)}
    for value in values:
        if str(value) not in index:
            raise RunError(
                f"{file!r}: {where} has the unknown label {str(value)!r}; {did_you_mean(str(value), labels)}"
            )
    return [index[str(value)] for value in values]


@register
class SequenceClassification:
    """One label a text, or a pair of texts."""

    name = "sequence-classification"
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    predicts = True

    def labels(self, rows: datasets.Dataset, file: str, settings: RunSettings) -> list[str] | None:
        """The labels that occur; at least two."""
        column = settings.label_column or "label"
        require_column(rows, column, file, "label_column")
        labels = sorted({str(value) for value in rows[column]})
        if len(labels) < 2:
            raise RunError(f"{file!r} has the label {labels[0]!r} in every row: nothing to learn")
        return labels

    def encode(
        self, rows: datasets.Dataset, file: str, tokenizer: Any, settings: RunSettings
    ) -> datasets.Dataset:
        """``input_ids``, ``attention_mask`` and ``labels`` (a number a row)."""
        text, pair = settings.text_column or "text", settings.text_pair_column
        label = settings.label_column or "label"
        require_text(rows, text, file, "text_column")
        if pair:
            require_text(rows, pair, file, "text_pair_column")
        require_column(rows, label, file, "label_column")
        # One by one, so that the message can name the row.
        numbers = []
        for row, value in enumerate(rows[label]):
            numbers.append(_indices(settings.labels or [], [value], file, f"row {row + 1}")[0])
        encoded = tokenizer(
            list(rows[text]),
            list(rows[pair]) if pair else None,
            truncation=True,
            max_length=settings.max_length,
        )
        return datasets.Dataset.from_dict({**encoded, "labels": numbers})

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Pads to the longest row."""
        return DataCollatorWithPadding(tokenizer)  # type: ignore[no-any-return]

    def metrics(self, choices: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Metrics:
        """Accuracy, macro F1, and each class."""
        return classification_metrics(choices, truth, labels)

    @torch.no_grad()
    def predict(
        self, model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """The most likely label and its probability."""
        text, pair = settings.get("text_column") or "text", settings.get("text_pair_column")
        batch = tokenizer(
            [row[text] for row in rows],
            [row[pair] for row in rows] if pair else None,
            truncation=True,
            max_length=settings["max_length"],
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        for row, scores in zip(rows, model(**batch).logits.float().softmax(-1), strict=True):
            best = int(scores.argmax())
            yield {
                "text": row[text],
                "label": settings["labels"][best],
                "score": round(float(scores[best]), 4),
            }


@register
class TokenClassification:
    """One label a word, the words being given."""

    name = "token-classification"
    task_type = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"
    predicts = True

    def labels(self, rows: datasets.Dataset, file: str, settings: RunSettings) -> list[str] | None:
        """The labels that occur."""
        self._require_lists(rows, file, settings)
        return sorted({str(value) for values in rows[settings.label_column or "tags"] for value in values})

    def encode(
        self, rows: datasets.Dataset, file: str, tokenizer: Any, settings: RunSettings
    ) -> datasets.Dataset:
        """``input_ids``, ``attention_mask`` and ``labels``: the word's label at its first token, else
        -100.
        """
        if not tokenizer.is_fast:
            raise RunError(
                f"token-classification needs a fast tokenizer, which {settings.model!r} does not have"
            )
        words, tags = self._require_lists(rows, file, settings)
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=settings.max_length)
        labels = []
        for row, values in enumerate(tags):
            numbers = _indices(settings.labels or [], values, file, f"row {row + 1}")
            ids = encoded.word_ids(row)
            # The loss passes over what is ignored: special tokens, and all of a word but its beginning.
            of_tokens = [IGNORED] * len(ids)
            for place in _first_tokens(ids):
                of_tokens[place] = numbers[ids[place]]
            labels.append(of_tokens)
        return datasets.Dataset.from_dict({**encoded, "labels": labels})

    def _require_lists(
        self, rows: datasets.Dataset, file: str, settings: RunSettings
    ) -> tuple[list[list[str]], list[list[Any]]]:
        """The words and their labels, row by row.

        Raises:
            RunError: a column is missing, or a row does not have as many labels as words.
        """
        text, label = settings.text_column or "tokens", settings.label_column or "tags"
        require_column(rows, text, file, "text_column")
        require_column(rows, label, file, "label_column")
        words, tags = list(rows[text]), list(rows[label])
        for row, (words_of_row, tags_of_row) in enumerate(zip(words, tags, strict=True)):
            are_lists = isinstance(words_of_row, list) and isinstance(tags_of_row, list)
            if not are_lists or len(words_of_row) != len(tags_of_row):
                raise RunError(
                    f"{file!r}: row {row + 1} needs lists of equal length in {text!r} and {label!r}"
                )
        return words, tags

    def collator(self, tokenizer: Any, model: nn.Module) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Pads inputs and labels to the longest row."""
        return DataCollatorForTokenClassification(tokenizer)  # type: ignore[no-any-return]

    def metrics(self, choices: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Metrics:
        """Accuracy, macro F1 and each class, over words."""
        counted = truth != IGNORED
        return classification_metrics(choices[counted], truth[counted], labels)

    @torch.no_grad()
    def predict(
        self, model: nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """The label of each word; a text is divided at white space."""
        column = settings.get("text_column") or "tokens"
        words = [row[column] if isinstance(row.get(column), list) else row["text"].split() for row in rows]
        batch = tokenizer(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=settings["max_length"],
            padding=True,
            return_tensors="pt",
        )
        choices = model(**batch.to(model.device)).logits.argmax(-1).tolist()
        for row, words_of_row in enumerate(words):
            # Words that were cut off have no token, and get no label.
            tags = [settings["labels"][choices[row][place]] for place in _first_tokens(batch.word_ids(row))]
            yield {"tokens": words_of_row, "tags": tags}


def _first_tokens(word_ids: Sequence[int | None]) -> list[int]:
    """Where the first token of each word stands in a row.

    Args:
        word_ids: the word that each token belongs to; None for tokens that stand for no text.

    >>> _first_tokens([None, 0, 0, 1, None])
    [1, 3]
    """
    places = []
    before: int | None = None
    for place, word in enumerate(word_ids):
        if word is not None and word != before:
            places.append(place)
        before = word
    return places
