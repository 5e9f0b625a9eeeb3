"""Adapters for tests: their values, their tensors, and which method has a place on which base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from grafts.methods import Method
from helpers.bases import Base


def randomise(model: nn.Module, name: str, seed: int = 5, scale: float = 0.3) -> None:
    """Give an adapter values as training would: nothing is zero any more, and the output moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, part in parts_of(model, name):
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def shake(model: nn.Module, name: str, seed: int) -> None:
    """Give an adapter values that move a model's tokens."""
    randomise(model, name, seed=seed, scale=0.7)


def tensors_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the path of their part."""
    return {
        f"{path}/{number}/{key}": tensor
        for number, (path, part) in enumerate(parts_of(model, name))
        for key, tensor in part.named_parameters()
    }


def any_config(method: Method[Any], **changes: object) -> grafts.AdapterConfig:
    """`config`, with changes: what the method's record offers to try it with."""
    return method.example(**changes)


def fits(method: Method[Any], base: Base) -> bool:
    """Whether the base has any module where the method can stand."""
    if "linear" in method.layers:
        return True
    needs_layers = "stream" in method.layers or method.members is not None
    if needs_layers:
        return base.attention
    return base.embeds or ("attending" in method.layers and base.attention)
