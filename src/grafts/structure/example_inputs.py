"""Tiny inputs with which a model can be run once, made from its config, its ``forward`` and its first
layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grafts.modules.layers import describe
from grafts.modules.tree import base_modules

# Two rows of so many tokens: enough to tell batch, tokens, heads and sizes apart.
_TOKENS = 9


def example_inputs(model: nn.Module) -> list[dict[str, Any]]:
    """Tiny inputs that the model may take, as keyword arguments, the likeliest first."""
    device = torch.device("cpu")
    dtype = torch.float32
    for weight in model.parameters():
        device = weight.device
        break
    for weight in model.parameters():
        if weight.is_floating_point():
            dtype = weight.dtype
            break
    parameters = inspect.signature(type(model).forward).parameters
    config = getattr(model, "config", None)
    with torch.device(device):
        if config is None:
            required = []
            for name, parameter in parameters.items():
                by_position = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
                if name != "self" and parameter.default is parameter.empty and by_position:
                    required.append(name)
            return _for_plain_model(model, required)
        return _for_configured_model(config, set(parameters), dtype)


def _for_configured_model(config: Any, names: set[str], dtype: torch.dtype) -> list[dict[str, Any]]:
    """For a `transformers` model: tokens, then images and sounds, alone and beside tokens.

    Args:
        config: the model's.
        names: the arguments of its ``forward``.
        dtype: of images and sounds.
    """
    tokens = _tokens(config)
    common: dict[str, Any]
    if "use_cache" in names:
        common = {"use_cache": False}
    else:
        common = {}
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
    if hasattr(config, "get_text_config"):
        text = config.get_text_config()
    else:
        text = config
    size = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 8
    if not isinstance(size, int):
        size = 8
    special: list[Any] = []
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        special.append(getattr(text, name, None))
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")):
            special.append(value)
    plain = [token for token in range(size) if token not in special][:12] or [0]
    repeated = plain * 12
    return torch.tensor([repeated[:_TOKENS], repeated[3 : 3 + _TOKENS]])


def _signals(config: Any, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Images and sounds by the name of their argument, in every form that models take them in."""
    vision = getattr(config, "vision_config", None) or config
    audio = getattr(config, "audio_config", None) or config
    height, width = _image_size(vision)
    channels = int(getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3)
    bins = int(getattr(audio, "num_mel_bins", None) or getattr(audio, "feature_size", None) or 16)
    spectrogram_frames = 2 * int(getattr(audio, "max_source_positions", None) or 32)
    video_frames = int(getattr(config, "num_frames", 4))
    patch_frames = int(getattr(config, "max_length", 64))
    hidden_size = int(getattr(config, "hidden_size", 16))
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
        layer = describe(module)
        dtype = torch.float32
        for parameter in module.parameters():
            dtype = parameter.dtype
            break
        if isinstance(module, nn.Embedding):
            tensor = torch.arange(10).view(2, 5) % module.num_embeddings
        elif layer is not None and layer.is_linear:
            tensor = torch.rand(2, 5, layer.in_features, dtype=dtype)
        elif layer is not None and layer.kind == "convolution":
            tensor = torch.rand(2, layer.in_features, *[16] * len(layer.kernel_size), dtype=dtype)
        else:
            continue
        attempts.append({required[0]: tensor})
        if len(attempts) == 3:
            break
    return attempts
