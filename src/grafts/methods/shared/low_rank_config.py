"""The options that methods with low-rank tensors have in common."""

from __future__ import annotations

from typing import Any

from grafts.config import AdapterConfig, config, option


@config
class LowRankConfig(AdapterConfig):
    """What the configs of methods with a low-rank update have in common."""

    lora_alpha: float = option(8, "The update is scaled by lora_alpha / r.")
    lora_dropout: float = option(0.0, "Dropout on the input of the update, while training.")
    bias: str = option("none", "Biases to train as well: none, those of the targets (lora_only), or all.")
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

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        number = isinstance(self.lora_alpha, (int, float)) and not isinstance(self.lora_alpha, bool)
        self.require("lora_alpha", number, "a number")
        self.require("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1")
        self.require("bias", self.bias in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'")
        layered = self.layers_to_transform is not None
        self.require(
            "layers_pattern",
            layered or not self.layers_pattern,
            "left out unless layers_to_transform is given",
        )
        self.require(
            "layers_to_transform",
            not (layered and isinstance(self.target_modules, str)),
            "left out beside a regular expression",
        )
        tokens = self.trainable_token_indices
        lists = list(tokens.values()) if isinstance(tokens, dict) else [() if tokens is None else tokens]
        self.require(
            "trainable_token_indices",
            all(map(_are_tokens, lists)),
            "different token ids, or names -> token ids",
        )


def _are_tokens(value: object) -> bool:
    tokens = value if isinstance(value, (tuple, list)) else (None,)
    return all(isinstance(token, int) and token >= 0 for token in tokens) and len(set(tokens)) == len(tokens)
