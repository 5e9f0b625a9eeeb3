"""What the methods with virtual tokens share: their config fields, the networks that make the tokens, and
their files.

The files hold the tokens as they are, in one tensor ``prompt_embeddings``, as other libraries read it, and
the network that made them beside it, so that training can go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Size, Tensor, nn

from grafts.config import AdapterConfig, option
from grafts.config import config as config_class
from grafts.errors import CheckpointError, ConfigError
from grafts.methods._files import FileTarget, PackedFiles, Parts
from grafts.methods._registry import Place
from grafts.modules.layers import Layer
from grafts.modules.patterns import join
from grafts.sites.input import InputPart
from grafts.structure.attention_modules import DECODER_INPUT, ENCODER_INPUT, embedding_of

# The names in files: of the tokens, and what the names of the network's tensors begin with.
PROMPT, ENCODER = "prompt_embeddings", "prompt_encoder."

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


@config_class
class InputTokensConfig(VirtualTokensConfig):
    """What the configs of methods have in common whose virtual tokens come in front of a stack's input."""

    decoder_tokens: bool = option(False, DECODER_TOKENS)

    own_fields: ClassVar[frozenset[str]] = VirtualTokensConfig.own_fields | {"decoder_tokens"}

    def is_after_first(self) -> bool:
        """Whether they come after the first token and not before it."""
        return False

    def is_after_embeddings(self) -> bool:
        """Whether they come behind the embeddings' positions and norm."""
        return False


C = TypeVar("C", bound=InputTokensConfig)

# The names that configs of models give to what a file says of a model's sizes.
_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def model_sizes(host: nn.Module) -> dict[str, Any]:
    """How many layers and heads the config of a module says that it has, by the fields of the files."""
    config = getattr(host, "config", None)
    sizes: dict[str, Any] = dict.fromkeys(_SIZES)
    for field, names in _SIZES.items():
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                sizes[field] = value
                break
    return sizes


def split(
    tensors: Mapping[str, Tensor], sizes: Sequence[int], dim: int, shape: tuple[int, int], name: str = PROMPT
) -> list[Tensor]:
    """A file's ``prompt_embeddings``, or what is called so, divided among several parts.

    Args:
        tensors: those of the file, by name.
        sizes: how much each part gets.
        dim: the dimension that is divided.
        shape: what it must have.
        name: what it is called.

    Raises:
        CheckpointError: it is not there, or has another shape.
    """
    if name not in tensors:
        raise CheckpointError(
            f"missing {name!r} in the file; it holds {', '.join(sorted(tensors)[:6]) or 'nothing'}"
        )
    prompt = tensors[name]
    if tuple(prompt.shape) != shape:
        raise CheckpointError(f"{name!r} is {tuple(prompt.shape)} in the file and {shape} here")
    return list(torch.split(prompt, list(sizes), dim))


def has_encoder(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds what its virtual tokens were made with."""
    return any(name.startswith(ENCODER) for name in tensors)


def encoder_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A network's tensors by the names that a file gives them."""
    return {ENCODER + name: tensor for name, tensor in module.named_parameters()}


class VirtualPart(InputPart):
    """The virtual tokens in front of one input of a model, whatever makes them.

    Attributes:
        total: how many virtual tokens there are in front of all inputs of the model.
        offset: how many of them belong to inputs before this one.
        sizes: what the model's config says of itself, for the file.
    """

    def __init__(self, config: InputTokensConfig, place: Place) -> None:
        super().__init__()
        filled = [other for other in place.others if takes_tokens(config, other, place.others)]
        paths = [other.path for other in filled]
        count = config.num_virtual_tokens
        self.total = count * len(filled)
        self.offset = 0
        if place.path in paths:
            self.length = count
            self.offset = count * paths.index(place.path)
        self.kept = place.role == ENCODER_INPUT
        self.after_first = config.is_after_first()
        self.after_embeddings = config.is_after_embeddings()
        has_embeddings = isinstance(getattr(place.host, "embeddings", None), nn.Module)
        if self.after_embeddings and not has_embeddings:
            raise ConfigError(
                f"after_embeddings: a {type(place.host).__name__} has no module of embeddings to come behind"
            )
        # A decoder sees the virtual tokens of its encoder.
        if place.role == DECODER_INPUT and any(other.role == ENCODER_INPUT for other in filled):
            self.encoder_length = count
        self.sizes = {**model_sizes(place.host), "token_dim": place.layer.in_features}

    def embed(self, host: nn.Module) -> nn.Module:
        """What makes embeddings of tokens in ``host``."""
        embedding = embedding_of(host)
        assert embedding is not None
        return embedding

    def encoder_module(self) -> nn.Module | None:
        """The network that makes the tokens, where this part has it; None for tokens that are trained
        themselves.
        """
        return None


def takes_tokens(config: InputTokensConfig, place: Place, places: Sequence[Place]) -> bool:
    """Whether virtual tokens come in front of that input: of a decoder if the config says so, or no encoder
    takes any.
    """
    if place.role != DECODER_INPUT or config.decoder_tokens:
        return True
    return not any(other.role == ENCODER_INPUT for other in places)


def narrow_inputs(
    config: VirtualTokensConfig, places: Sequence[Place], candidates: Sequence[Place]
) -> list[Place]:
    """All inputs, the encoder's first, as files have them."""
    return sorted(places, key=lambda place: place.role == DECODER_INPUT)


class VirtualTokenFiles(PackedFiles[C]):
    """The files of methods whose virtual tokens come in front of a stack's input."""

    def config_values(
        self, config: C, values: Mapping[str, Any], parts: Parts, layers: Mapping[str, Layer]
    ) -> Mapping[str, Any]:
        """The sizes, as `peft` completes them from the model."""
        virtual_parts = [part for part in parts.values() if isinstance(part, VirtualPart)]
        if not virtual_parts:
            return {}
        changed = dict(virtual_parts[0].sizes)
        changed["num_transformer_submodules"] = sum(part.length > 0 for part in virtual_parts)
        if "encoder_hidden_size" in values:
            changed["encoder_hidden_size"] = values["encoder_hidden_size"] or changed["token_dim"]
        return changed

    def pack(self, config: C, parts: Parts) -> Mapping[str, Tensor]:
        """The tokens of all inputs in one tensor, ``(tokens, embedding size)``, and the network that makes
        them.
        """
        filled = [part for part in parts.values() if isinstance(part, VirtualPart) and part.length > 0]
        filled.sort(key=lambda part: part.offset)
        with torch.no_grad():
            tensors = {PROMPT: torch.cat([part.virtual_tokens() for part in filled])}
        for part in filled:
            encoder = part.encoder_module()
            if encoder is not None:
                return tensors | encoder_tensors(encoder)
        return tensors

    def unpack(
        self, config: C, tensors: Mapping[str, Tensor], targets: Sequence[FileTarget]
    ) -> Mapping[str, Tensor]:
        """The network for the part that has it, else the tokens of each input."""
        by_path = without_prefix(tensors, self.prefix)
        for target in targets:
            if has_encoder_tensors(target):
                return by_path | encoder_by_path(tensors, target.path)

        # The encoder's input first, as `peft` has it.
        filled = [target for target in targets if "prompt" in target.tensors]
        filled.sort(key=lambda target: "decoder" in target.path)
        prompts: list[tuple[str, Size]] = [(target.path, target.tensors["prompt"]) for target in filled]
        lengths = [shape[0] for _, shape in prompts]
        if config.num_transformer_submodules == 2 and len(prompts) == 1 and PROMPT in tensors:
            # `peft` writes tokens for the decoder too, and puts only the first half, in front of the encoder.
            half = tensors[PROMPT].shape[0] // 2
            tensors = {**tensors, PROMPT: tensors[PROMPT][:half]}
        embedding_size = prompts[0][1][1]
        prompt_of_each = split(tensors, lengths, 0, (sum(lengths), embedding_size))
        for (path, _), prompt in zip(prompts, prompt_of_each, strict=True):
            by_path[join(path, "prompt")] = prompt
        return by_path


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a file whose names begin with a prefix, under the names behind it."""
    result = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            result[name.removeprefix(prefix)] = tensor
    return result


def has_encoder_tensors(target: FileTarget) -> bool:
    """Whether the part of a target has the network that makes the virtual tokens, and so takes its tensors
    from a file.
    """
    return any(name.startswith("encoder.") for name in target.tensors)


def encoder_by_path(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors of a file's network, by the names that they have at the part that has it."""
    encoder = without_prefix(tensors, ENCODER)
    return {join(path, f"encoder.{name}"): tensor for name, tensor in encoder.items()}
