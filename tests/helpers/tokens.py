"""A tokenizer of words for the models of the tests: ``w5`` to ``w49`` are their own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def tokenizer(folder: Path | None = None) -> Any:
    """The tokenizer, written into a folder where one is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "<mask>": 4} | {f"w{i}": i for i in range(5, 50)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    result = PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)
    if folder is not None:
        result.save_pretrained(folder)
    return result
