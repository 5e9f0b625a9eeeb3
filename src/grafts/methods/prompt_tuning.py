"""Prompt tuning: learned tokens in front of the input (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grafts.config import config, option
from grafts.errors import ConfigError
from grafts.methods._registry import Place, method
from grafts.methods.shared.virtual_tokens import (
    InputTokensConfig,
    VirtualPart,
    VirtualTokenFiles,
    narrow_inputs,
)
from grafts.structure.attention_modules import DECODER_INPUT, ENCODER_INPUT, INPUT

_STARTS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")


@config
class PromptTuningConfig(InputTokensConfig):
    """What prompt tuning is: embeddings of virtual tokens that come before those of the input.

    >>> PromptTuningConfig(num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB").num_virtual_tokens
    8
    """

    prompt_tuning_init: str = option(
        "RANDOM",
        "Start with normal random numbers (RANDOM), a text's tokens (TEXT), or random tokens (SAMPLE_VOCAB).",
    )
    prompt_tuning_init_text: str | None = option(
        None, "The text; repeated or cut to the number of virtual tokens."
    )
    tokenizer_name_or_path: str | None = option(None, "The tokenizer that makes the text into tokens.")
    tokenizer_kwargs: dict[str, Any] | None = option(
        None, "What else AutoTokenizer.from_pretrained is given."
    )
    after_first: bool = option(False, "Put them after the first token (BOS, CLS) and not before it.")
    after_embeddings: bool = option(
        False,
        "Put them behind the embeddings' positions and norm, as AdapterHub does; for models with a module of "
        "those.",
    )

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    own_fields: ClassVar[frozenset[str]] = InputTokensConfig.own_fields | {"after_first", "after_embeddings"}

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        self.require("prompt_tuning_init", self.prompt_tuning_init in _STARTS, f"one of {', '.join(_STARTS)}")
        if self.prompt_tuning_init == "TEXT":
            for field in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                self.require(field, bool(getattr(self, field)), "given where prompt_tuning_init is 'TEXT'")
        trusts_code = (self.tokenizer_kwargs or {}).get("trust_remote_code")
        self.require(
            "tokenizer_kwargs",
            not trusts_code,
            "without trust_remote_code, which would run code of the tokenizer",
        )

    def is_after_first(self) -> bool:
        """Whether they come after the first token and not before it."""
        return self.after_first

    def is_after_embeddings(self) -> bool:
        """Whether they come behind the embeddings' positions and norm."""
        return self.after_embeddings


class PromptPart(VirtualPart):
    """The virtual tokens in front of one input.

    Attributes:
        prompt: their embeddings, ``(length, embedding size)``.
    """

    def __init__(self, config: PromptTuningConfig, place: Place) -> None:
        super().__init__(config, place)
        self.config = config
        self.prompt = nn.Parameter(torch.randn(self.length, place.layer.in_features)) if self.length else None

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Start with the embeddings of tokens, where the config says so.

        Raises:
            ConfigError: there is no such tokenizer, or the text has no tokens.
        """
        if not fresh or self.prompt is None or self.config.prompt_tuning_init == "RANDOM":
            return
        embed: Any = self.embed(host)
        if self.config.prompt_tuning_init == "SAMPLE_VOCAB":
            tokens = torch.randint(embed.num_embeddings, (self.length,))
        else:
            # The text over and over, going on where the inputs before this one have stopped.
            ids = _text_tokens(self.config)
            repeated = ids * math.ceil((self.offset + self.length) / len(ids))
            tokens = torch.tensor(repeated[self.offset : self.offset + self.length])
            if int(tokens.max()) >= embed.num_embeddings:
                raise ConfigError(
                    f"the tokenizer gives token {int(tokens.max())}, and there are {embed.num_embeddings} "
                    f"rows"
                )
        with torch.no_grad():
            self.prompt.copy_(embed(tokens.to(embed.weight.device)))

    def virtual_tokens(self) -> Tensor:
        """The embeddings, ``(length, embedding size)`` (Lester et al. 2021, section 2)."""
        assert self.prompt is not None
        return self.prompt


def _text_tokens(config: PromptTuningConfig) -> list[int]:
    """The ids of the tokens that a prompt is to start with.

    Raises:
        ConfigError: there is no such tokenizer, or the text has no tokens.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - only for those who start with a text

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {})
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer_name_or_path={config.tokenizer_name_or_path!r}: {error}") from error
    ids: list[int] = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens")
    return ids


@method(
    "prompt_tuning",
    title="Prompt tuning",
    config=PromptTuningConfig,
    layers={"input"},
    default_roles=({INPUT, ENCODER_INPUT, DECODER_INPUT},),
    inert=False,
    mergeable=False,
    source="Lester et al. 2021, https://arxiv.org/abs/2104.08691",
    example=partial(PromptTuningConfig, num_virtual_tokens=5),
    narrow=narrow_inputs,
    files=VirtualTokenFiles(),
)
def prompt_part(config: PromptTuningConfig, place: Place) -> PromptPart:
    """The part for one input."""
    return PromptPart(config, place)
