"""The options that methods with low-rank tensors have in common."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from grafts.config import BIASES, AdapterConfig, Auxiliary, Biases, LayerSelection, config, option


@config
class LowRankConfig(AdapterConfig):
    """What the configs of methods with a low-rank update have in common."""

    lora_alpha: float = option(8, "The update is scaled by lora_alpha / r.")
    lora_dropout: float = option(0.0, "Dropout on the input of the update, while training.")
    bias: Biases = option("none", "Biases to train as well: none, those of the targets (lora_only), or all.")
    layers_to_transform: int | tuple[int, ...] | None = option(
        None, "Only targets in the layers with these indices."
    )
    layers_pattern: str | tuple[str, ...] | None = option(
        None,
        "The name of the list of layers that layers_to_transform counts in, where the first number is not "
        "it.",
    )
    trainable_token_indices: tuple[int, ...] | dict[str, Any] | None = option(
        None,
        "Rows of the input embedding to train, by token id; or names of embeddings -> ids. Heads with the "
        "same weight follow.",
    )
    ensure_weight_tying: bool = option(
        False,
        "Where a target or a saved module shares its weight with another (embedding and head), adapt both as "
        "one.",
    )
    fan_in_fan_out: bool = option(
        False, "Written for other libraries; here the layout of a weight is found out."
    )

    selecting_fields: ClassVar[frozenset[str]] = AdapterConfig.selecting_fields | {
        "layers_to_transform",
        "layers_pattern",
    }

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        is_number = isinstance(self.lora_alpha, (int, float)) and not isinstance(self.lora_alpha, bool)
        self.require("lora_alpha", is_number, "a number")
        self.require("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")
        self.require("bias", self.bias in BIASES, "'none', 'all' or 'lora_only'")
        chooses_layers = self.layers_to_transform is not None
        self.require(
            "layers_pattern",
            chooses_layers or not self.layers_pattern,
            "left out unless layers_to_transform is given",
        )
        self.require(
            "layers_to_transform",
            not (chooses_layers and isinstance(self.target_modules, str)),
            "left out beside a regular expression",
        )
        tokens = self.trainable_token_indices
        if isinstance(tokens, dict):
            are_tokens = all(_are_tokens(ids) for ids in tokens.values())
        else:
            are_tokens = tokens is None or _are_tokens(tokens)
        self.require("trainable_token_indices", are_tokens, "different token ids, or names -> token ids")

    def auxiliary(self) -> Auxiliary:
        """The biases and tokens that are trained as well."""
        tokens: Any = self.trainable_token_indices
        if isinstance(tokens, dict):
            tokens = {name: tuple(ids) for name, ids in tokens.items()}
        return Auxiliary(self.bias, tokens, self.ensure_weight_tying)

    def layer_selection(self) -> LayerSelection | None:
        """The layers of ``layers_to_transform``."""
        indices, lists = self.layers_to_transform, self.layers_pattern
        if indices is None:
            return None
        if isinstance(indices, int):
            indices = (indices,)
        if isinstance(lists, str):
            lists = (lists,)
        return LayerSelection(indices, lists or ())

    def for_modules(self, targets: tuple[str, ...] | None, copies: tuple[str, ...], biases: Biases) -> Self:
        """The same config for exactly these modules."""
        return dataclasses.replace(super().for_modules(targets, copies, biases), bias=biases)


def _are_tokens(value: object) -> bool:
    """Whether a value is a list of token ids, none of which stands twice."""
    if not isinstance(value, (tuple, list)):
        return False
    are_ids = all(isinstance(token, int) and token >= 0 for token in value)
    return are_ids and len(set(value)) == len(value)
