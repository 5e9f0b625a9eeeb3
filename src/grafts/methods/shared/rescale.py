"""Multiplying activations by a learned vector, precisely in every number format."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(y: Tensor, factor: Tensor) -> Tensor:
    """``y * factor``, rounded once.

    In a half-precision format a learned factor near 1 would be rounded to it and its training lost (bfloat16
    has 1 and 1.0078 and nothing between), so there its distance from 1 is what is rounded.

    Args:
        y: activations of any shape, in any format.
        factor: at least float32, in a shape that lies along ``y``.

    Returns:
        A new tensor like ``y``.
    """
    if y.dtype in (torch.float32, torch.float64):
        return y * factor.to(y.dtype)
    return torch.addcmul(y, y, (factor - 1).to(y.dtype))
