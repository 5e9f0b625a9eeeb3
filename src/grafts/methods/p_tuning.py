"""P-tuning: virtual tokens in front of the input, made by a small network (Liu et al. 2021,
arXiv:2103.10385).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from grafts.config import config, option
from grafts.methods._registry import Place, method
from grafts.methods.shared.virtual_tokens import (
    InputTokensConfig,
    VirtualPart,
    VirtualTokenFiles,
    has_encoder,
    narrow_inputs,
)
from grafts.sites.site import Part, Reference
from grafts.structure.attention_modules import DECODER_INPUT, ENCODER_INPUT, INPUT


@config
class PromptEncoderConfig(InputTokensConfig):
    """What p-tuning is: virtual tokens that an MLP or an LSTM makes from embeddings of its own.

    >>> PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=64).encoder_reparameterization_type
    'MLP'
    """

    encoder_reparameterization_type: str = option("MLP", "What makes the tokens: MLP or LSTM.")
    encoder_hidden_size: int | None = option(None, "Its hidden size; that of the embeddings if not given.")
    encoder_num_layers: int = option(2, "How many layers an LSTM has.")
    encoder_dropout: float = option(0.0, "Dropout between the layers of an LSTM, while training.")
    flat: bool = option(
        False, "Only what the network has made, as in files that do not hold it; training goes on with that."
    )

    peft_type: ClassVar[str] = "P_TUNING"
    own_fields: ClassVar[frozenset[str]] = InputTokensConfig.own_fields | {"flat"}

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        self.require("encoder_reparameterization_type", kind in ("MLP", "LSTM"), "'MLP' or 'LSTM'")
        size = self.encoder_hidden_size
        self.require(
            "encoder_hidden_size", size is None or (isinstance(size, int) and size > 0), "a positive number"
        )
        self.require("encoder_dropout", 0 <= self.encoder_dropout < 1, "at least 0 and below 1")
        layers = self.encoder_num_layers
        self.require("encoder_num_layers", isinstance(layers, int) and layers > 0, "a positive number")


class PromptEncoder(nn.Module):
    """The network that makes virtual tokens (Liu et al. 2021, section 3.2); names are those of the files in
    memory.

    Attributes:
        embedding: what it starts from, ``(tokens, embedding size)``.
        lstm_head: two-way LSTM; None for an MLP.
        mlp_head: linears with ReLU between them.
    """

    def __init__(self, config: PromptEncoderConfig, tokens: int, size: int) -> None:
        super().__init__()
        hidden = config.encoder_hidden_size or size
        self.embedding = nn.Embedding(tokens, size)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder_reparameterization_type == "LSTM":
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(
                size, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True
            )
            self.mlp_head = nn.Sequential(
                nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, size)
            )
        else:
            self.mlp_head = nn.Sequential(
                nn.Linear(size, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, size),
            )

    def forward(self) -> Tensor:
        """The embeddings of all virtual tokens, ``(tokens, embedding size)``."""
        x = self.embedding.weight[None]
        if self.lstm_head is not None:
            x = self.lstm_head(x)[0]
        tokens: Tensor = self.mlp_head(x)[0]
        return tokens


class EncodedPromptPart(VirtualPart):
    """The virtual tokens in front of one input.

    Attributes:
        prompt: their embeddings, where the network that made them is not there; else None.
        encoder: the network, at the first input of the model; else None.
    """

    def __init__(self, config: PromptEncoderConfig, place: Place) -> None:
        super().__init__(config, place)
        size = place.layer.in_features
        self.prompt: nn.Parameter | None = None
        self.encoder: PromptEncoder | None = None
        if config.flat and self.length:
            self.prompt = nn.Parameter(torch.randn(self.length, size))
        elif not config.flat and self.length and self.offset == 0:
            self.encoder = PromptEncoder(config, self.total, size)
        # The network of the first input makes the tokens of all of them.
        self._shared_encoder: Reference[PromptEncoder] | None = None

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Find the network: a decoder's stands at the encoder."""
        for part in parts.values():
            if isinstance(part, EncodedPromptPart) and part.encoder is not None:
                self._shared_encoder = Reference(part.encoder)
                return

    def virtual_tokens(self) -> Tensor:
        """The embeddings, ``(length, embedding size)``."""
        if self.prompt is not None:
            return self.prompt
        assert self._shared_encoder is not None
        tokens: Tensor = self._shared_encoder.module()
        return tokens[self.offset : self.offset + self.length]

    def encoder_module(self) -> nn.Module | None:
        """The network, where this part has it."""
        return self.encoder


class PromptEncoderFiles(VirtualTokenFiles[PromptEncoderConfig]):
    """The files of p-tuning: its tokens, and the network that makes them."""

    def config_of(self, config: PromptEncoderConfig, tensors: Mapping[str, Tensor]) -> PromptEncoderConfig:
        """Without the network where the file holds only what it gave."""
        return replace(config, flat=not has_encoder(tensors))


@method(
    "p_tuning",
    title="P-tuning",
    config=PromptEncoderConfig,
    layers={"input"},
    default_roles=({INPUT, ENCODER_INPUT, DECODER_INPUT},),
    inert=False,
    mergeable=False,
    source="Liu et al. 2021, https://arxiv.org/abs/2103.10385",
    example=partial(PromptEncoderConfig, num_virtual_tokens=5),
    narrow=narrow_inputs,
    files=PromptEncoderFiles(),
)
def encoded_prompt_part(config: PromptEncoderConfig, place: Place) -> EncodedPromptPart:
    """The part for one input."""
    return EncodedPromptPart(config, place)
