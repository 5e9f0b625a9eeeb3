"""What the methods with virtual tokens share: their config fields, the encoders that make the tokens, and
their files.

The files hold what the encoder gives, in one tensor ``prompt_embeddings``, as other libraries read it, and
the encoder itself beside it, so that training can go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, option
from grafts.config import config as config_class
from grafts.errors import CheckpointError, ConfigError
from grafts.methods._registry import FileTarget, Parts, Place
from grafts.modules.patterns import join
from grafts.sites.input import InputPart
from grafts.structure.attention_modules import DECODER_INPUT, ENCODER_INPUT, embedding_of

PROMPT, ENCODER = "prompt_embeddings", "prompt_encoder."
PREFIX = "base_model."


DECODER_TOKENS = (
    "On an encoder-decoder: virtual tokens in front of the decoder's input too, "
    "and not of the encoder's alone."
)


@config_class
class VirtualTokensConfig(AdapterConfig):
    """What the configs of methods with virtual tokens have in common."""

    num_virtual_tokens: int = option(20, "How many virtual tokens.")
    token_dim: int | None = option(None, "Their size; worked out from the model.")
    num_transformer_submodules: int | None = option(
        None, "Worked out, for the file: how many inputs have virtual tokens."
    )
    num_attention_heads: int | None = option(None, "Worked out from the model, for the file.")
    num_layers: int | None = option(None, "Worked out from the model, for the file.")

    own_fields: ClassVar[frozenset[str]] = AdapterConfig.own_fields | {"target_modules", "exclude_modules"}

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        count = self.num_virtual_tokens
        self.require("num_virtual_tokens", isinstance(count, int) and count > 0, "a positive number")
        self.require("num_transformer_submodules", self.num_transformer_submodules in (None, 1, 2), "1 or 2")


def model_sizes(host: nn.Module) -> dict[str, Any]:
    """How many layers and heads the config of a module says that it has, by the fields of the files."""
    config = getattr(host, "config", None)
    names = {
        "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads",),
    }
    names["num_attention_heads"] += ("n_head", "num_heads", "encoder_attention_heads")
    return {
        field: next((v for n in some if (v := getattr(config, n, None)) is not None), None)
        for field, some in names.items()
    }


def split(
    tensors: Mapping[str, Tensor], sizes: Sequence[int], dim: int, shape: tuple[int, int], name: str = PROMPT
) -> list[Tensor]:
    """The pieces of a file's ``prompt_embeddings``, or of what is called so.

    Raises:
        CheckpointError: it is not there, or has another shape.
    """
    if name not in tensors:
        raise CheckpointError(
            f"missing {name!r} in the file; it holds {', '.join(sorted(tensors)[:6]) or 'nothing'}"
        )
    there = tensors[name]
    if tuple(there.shape) != shape:
        raise CheckpointError(f"{name!r} is {tuple(there.shape)} in the file and {shape} here")
    return list(torch.split(there, list(sizes), dim))


def has_encoder(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds what its virtual tokens were made with."""
    return any(name.startswith(ENCODER) for name in tensors)


def encoder_tensors(module: nn.Module) -> dict[str, Tensor]:
    """An encoder's tensors by the names that a file gives them."""
    return {ENCODER + name: tensor for name, tensor in module.named_parameters()}


class VirtualPart(InputPart):
    """The virtual tokens in front of one input of a model, whatever makes them.

    Attributes:
        total: how many virtual tokens there are in front of all inputs of the model.
        offset: how many of them belong to inputs before this one.
        sizes: what the model's config says of itself, for the file.
    """

    def __init__(self, config: VirtualTokensConfig, place: Place) -> None:
        super().__init__()
        filled = [other for other in place.others if takes_tokens(config, other, place.others)]
        count = config.num_virtual_tokens
        self.total = count * len(filled)
        self.offset = count * [other.path for other in filled].index(place.path) if place in filled else 0
        self.length = count if place in filled else 0
        self.kept = place.role == ENCODER_INPUT
        self.after_first = bool(getattr(config, "after_first", False))
        self.after_embeddings = bool(getattr(config, "after_embeddings", False))
        if self.after_embeddings and not isinstance(getattr(place.host, "embeddings", None), nn.Module):
            raise ConfigError(
                f"after_embeddings: a {type(place.host).__name__} has no module of embeddings to come behind"
            )
        self.encoder_length = (
            count if place.role == DECODER_INPUT and any(p.role == ENCODER_INPUT for p in filled) else 0
        )
        self.sizes = {**model_sizes(place.host), "token_dim": place.layer.in_features}

    def embed(self, host: nn.Module) -> nn.Module:
        """What makes embeddings of tokens in ``host``."""
        return cast("nn.Module", embedding_of(host))

    def numbers(self) -> Tensor:
        """What a file holds of it, ``(length, embedding size)``."""
        return self.virtual_tokens()


def takes_tokens(config: VirtualTokensConfig, place: Place, places: Sequence[Place]) -> bool:
    """Whether virtual tokens come in front of that input: of a decoder if the config says so, or no encoder
    takes any.
    """
    encoders = any(other.role == ENCODER_INPUT for other in places)
    return place.role != DECODER_INPUT or bool(getattr(config, "decoder_tokens", False)) or not encoders


def narrow_inputs(
    config: VirtualTokensConfig, places: Sequence[Place], candidates: Sequence[Place]
) -> list[Place]:
    """All inputs, the encoder's first, as files have them."""
    return sorted(places, key=lambda place: place.role == DECODER_INPUT)


def file_values(values: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The sizes, as `peft` completes them from the model."""
    own = [part for part in parts.values() if isinstance(part, VirtualPart)]
    changed = own[0].sizes | {"num_transformer_submodules": sum(part.length > 0 for part in own)}
    if "encoder_hidden_size" in values:
        changed["encoder_hidden_size"] = values["encoder_hidden_size"] or changed["token_dim"]
    return changed


def _by_offset(parts: Parts) -> list[VirtualPart]:
    own = [part for part in parts.values() if isinstance(part, VirtualPart) and part.length]
    return sorted(own, key=lambda part: part.offset)


def packed(config: VirtualTokensConfig, parts: Parts) -> dict[str, Tensor]:
    """The tensors of the file."""
    own = _by_offset(parts)
    with torch.no_grad():
        tensors = {PROMPT: torch.cat([part.numbers() for part in own])}
    encoders = [encoder for part in own if isinstance(encoder := getattr(part, "encoder", None), nn.Module)]
    return tensors | (encoder_tensors(encoders[0]) if encoders else {})


def unpacked(
    config: VirtualTokensConfig, tensors: Mapping[str, Tensor], targets: Sequence[FileTarget]
) -> dict[str, Tensor]:
    """The parts' tensors by path and name."""
    result = {
        name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)
    }
    owner = next(
        (path for path, names, _ in targets if any(name.startswith("encoder.") for name in names)), None
    )
    if owner is not None:
        encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
        return result | {
            join(owner, name.removeprefix("prompt_")): tensor for name, tensor in encoder.items()
        }
    own = sorted(
        ((path, names["prompt"]) for path, names, _ in targets if "prompt" in names),
        key=lambda item: "decoder" in item[0],
    )
    lengths = [shape[0] for _, shape in own]
    if config.num_transformer_submodules == 2 and len(own) == 1 and PROMPT in tensors:
        # `peft` writes tokens for the decoder too, and puts only the first half, in front of the encoder
        tensors = {**tensors, PROMPT: tensors[PROMPT][: tensors[PROMPT].shape[0] // 2]}
    pieces = split(tensors, lengths, 0, (sum(lengths), own[0][1][1]))
    return result | {join(path, "prompt"): piece for (path, _), piece in zip(own, pieces, strict=True)}


def from_file(config: VirtualTokensConfig, tensors: Mapping[str, Tensor]) -> VirtualTokensConfig:
    """The config as it is: nothing but the tokens themselves is in the file."""
    return config
