"""Tiny inputs with which a model can be run once, made from its config, its ``forward`` and its first
layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grafts.modules.layers import describe
from grafts.modules.tree import base_modules

# Two rows of so many tokens: enough to tell batch, tokens, heads and sizes apart.
_TOKENS = 9


def example_inputs(model: nn.Module) -> list[dict[str, Any]]:
    """Tiny inputs that the model may take, as keyword arguments, the likeliest first.

    Args:
        model: any model; it is not run.
    """
    weights = list(model.parameters())
    device = weights[0].device if weights else torch.device("cpu")
    dtype = _format_of(weights)
    parameters = inspect.signature(type(model).forward).parameters
    config = getattr(model, "config", None)
    with torch.device(device):
        if config is None:
            return _for_plain_model(model, _required(parameters))
        return _for_configured_model(config, set(parameters), dtype)


def _format_of(weights: Sequence[Tensor]) -> torch.dtype:
    """The format of the first weight that is of floating point; float32 where none is."""
    for weight in weights:
        if weight.is_floating_point():
            return weight.dtype
    return torch.float32


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The arguments of a ``forward`` that can be given by position and have no default."""
    required = []
    for name, parameter in parameters.items():
        by_position = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if name != "self" and parameter.default is parameter.empty and by_position:
            required.append(name)
    return required


def _for_configured_model(config: Any, names: set[str], dtype: torch.dtype) -> list[dict[str, Any]]:
    """For a `transformers` model: tokens, then images and sounds, alone and beside tokens.

    Args:
        config: the model's.
        names: the arguments of its ``forward``.
        dtype: of images and sounds.
    """
    tokens = _tokens(config)
    common: dict[str, Any] = {}
    if "use_cache" in names:
        common["use_cache"] = False
    if "decoder_input_ids" in names:
        common["decoder_input_ids"] = tokens
    attempts = []
    if "input_ids" in names:
        text = {"input_ids": tokens, **common}
        attempts.append(text)
        attempts.append({**text, "attention_mask": torch.ones_like(tokens)})
    for name, signal in _signals(config, dtype):
        if name not in names:
            continue
        attempts.append({name: signal, **common})
        if "input_ids" in names:
            attempts.append({name: signal, **common, "input_ids": tokens})
    return attempts


def _tokens(config: Any) -> Tensor:
    """Two rows of plain tokens, ``(2, tokens)``: no padding, no marks of images."""
    text = config
    if hasattr(config, "get_text_config"):
        text = config.get_text_config()
    size = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
    if not isinstance(size, int) or size == 0:
        size = 8
    special = _special_tokens(config, text)
    plain = [token for token in range(size) if token not in special][:12] or [0]
    # Two rows that differ, and in which no two neighbours are the same.
    repeated = plain * 12
    return torch.tensor([repeated[:_TOKENS], repeated[3 : 3 + _TOKENS]])


def _special_tokens(config: Any, text: Any) -> list[Any]:
    """The ids of tokens that stand for something else than text, and what else a config has under such names.

    Args:
        config: the model's.
        text: the one of its text model, which may be the same.
    """
    special = [getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")):
            special.append(value)
    return special


def _signals(config: Any, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Images and sounds by the name of their argument, in every form that models take them in."""
    vision = getattr(config, "vision_config", None) or config
    audio = getattr(config, "audio_config", None) or config
    height, width = _image_size(vision)
    channels = _size(vision, 3, "num_channels", "in_channels")
    bins = _size(audio, 16, "num_mel_bins", "feature_size")
    spectrogram_frames = 2 * _size(audio, 32, "max_source_positions")
    video_frames = _size(config, 4, "num_frames")
    patch_frames = _size(config, 64, "max_length")
    hidden_size = _size(config, 16, "hidden_size")
    shapes = [
        ("pixel_values", (2, channels, height, width)),
        ("pixel_values", (2, video_frames, channels, height, width)),
        ("input_features", (2, bins, spectrogram_frames)),
        ("input_features", (2, 64, bins)),
        ("input_values", (2, 2400)),
        ("input_values", (2, patch_frames, bins)),
        ("inputs_embeds", (2, _TOKENS, hidden_size)),
    ]
    return [(name, torch.rand(*shape, dtype=dtype)) for name, shape in shapes]


def _size(config: Any, default: int, *names: str) -> int:
    """What a config says under the first of several names that it has, or a default."""
    for name in names:
        value = getattr(config, name, None)
        if value:
            return int(value)
    return default


def _image_size(config: Any) -> tuple[int, int]:
    """Height and width of a model's images."""
    size = getattr(config, "image_size", 32)
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence):
        height, width = tuple(size)[:2]
        return height, width
    return 32, 32


def _for_plain_model(model: nn.Module, required: Sequence[str]) -> list[dict[str, Any]]:
    """For a model without a config: tokens for its first embedding, numbers for a linear or convolution.

    Args:
        model: the model.
        required: the arguments that its ``forward`` cannot go without.
    """
    if len(required) != 1:
        return []
    attempts = []
    for _, module in base_modules(model):
        tensor = _input_of(module)
        if tensor is not None:
            attempts.append({required[0]: tensor})
        if len(attempts) == 3:
            break
    return attempts


def _input_of(module: nn.Module) -> Tensor | None:
    """What an embedding, a linear or a convolution could be called with; None for other modules."""
    if isinstance(module, nn.Embedding):
        return torch.arange(10).view(2, 5) % module.num_embeddings
    layer = describe(module)
    if layer is None:
        return None
    weights = list(module.parameters())
    dtype = weights[0].dtype if weights else torch.float32
    if layer.is_linear:
        return torch.rand(2, 5, layer.in_features, dtype=dtype)
    if layer.kind == "convolution":
        return torch.rand(2, layer.in_features, *[16] * len(layer.kernel_size), dtype=dtype)
    return None
