"""A product of two thin matrices, ``B A``, beside each kind of layer: how its output is had, and what weight
it stands for.

Every method whose update is low-rank shares this; what A and B are made of is the method's own affair.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafts.modules.layers import Layer, row_scale


class Product(abc.ABC):
    """How ``s B A`` acts beside one layer; holds sizes and options only, no tensor.

    With ``(out, in)`` the layer's `Layer.matrix`, A is ``(r, in)`` and B ``(out, r)``, in the shapes of
    `shapes`.

    Attributes:
        names: what the two are called in a checkpoint.
    """

    names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        rows, columns = self.layer.matrix
        return (rank, columns), (rows, rank)

    def reset(self, a: Tensor, b: Tensor) -> None:
        """The usual start: A random, B zero."""
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def reset_both(self, a: Tensor, b: Tensor) -> None:
        """A start at which the update is not zero: both random."""
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))

    @abc.abstractmethod
    def add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """``y + scaling B A x``, a new tensor like ``y``.

        Args:
            y: the layer's output.
            x: its input, on the device of ``y``.
            a: A, in any dtype.
            b: B, in any dtype.
            scaling: a number.
        """

    def add_(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """`add` into ``y`` itself where that saves something."""
        return self.add(y, x, a, b, scaling)

    def along(self, v: Tensor) -> Tensor:
        """A vector ``(out,)`` in the shape in which it lies along the layer's output."""
        return v

    def matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight as a matrix ``(out, in)``, a view."""
        return weight

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix

    def flat(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B as matrices ``(r, in)`` and ``(out, r)``."""
        return a.flatten(1), b.flatten(1)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """``B A`` as a matrix ``(out, in)``."""
        a, b = self.flat(a, b)
        return b @ a

    def plus(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """``W + scaling B A`` in the shape and dtype of the weight."""
        a, b = self.flat(a.to(weight.dtype), b.to(weight.dtype))
        return self.weight(torch.addmm(self.matrix(weight), b, a, alpha=scaling), weight)

    @property
    def output_scale(self) -> float:
        """What the layer multiplies the rows of its weight with."""
        return 1.0


class LinearProduct(Product):
    """Beside ``nn.Linear`` and ``Conv1D``: x ``(*batch, in)``, y ``(*batch, out)``."""

    def _down(self, x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        """``A x``, ``(*batch, r)``."""
        return F.linear(x, a.to(x.dtype))

    def add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """``y + scaling B A x``, the product added as it is made, in one pass over ``y``."""
        u = self._down(x, y, a)
        if u.dtype != y.dtype:
            return y + (scaling * F.linear(u, b.to(u.dtype))).to(y.dtype)
        flat_y, flat_u = y.reshape(-1, y.shape[-1]), u.reshape(-1, u.shape[-1])
        return torch.addmm(flat_y, flat_u, b.to(u.dtype).T, alpha=scaling).view(y.shape)

    def add_(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """`add` into ``y``: no copy, and no second tensor of its size."""
        if y.dim() not in (2, 3):
            return self.add(y, x, a, b, scaling)
        u = self._down(x, y, a)
        if u.dtype != y.dtype:
            return y + (scaling * F.linear(u, b.to(u.dtype))).to(y.dtype)
        b_T = b.to(u.dtype).T
        if y.dim() == 2:
            return y.addmm_(u, b_T, alpha=scaling)
        # Not through a view of two dimensions: autograd would copy every gradient of y on its way back.
        return y.baddbmm_(u, b_T.expand(y.shape[0], -1, -1), alpha=scaling)


class EmbeddingProduct(LinearProduct):
    """Beside ``nn.Embedding``: x indices ``(*batch)``, y ``(*batch, dim)``; A ``(r, rows)``, B
    ``(dim, r)``.
    """

    names = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, layer: Layer, host: nn.Module) -> None:
        super().__init__(layer)
        self.row_scale = row_scale(host)

    def reset(self, a: Tensor, b: Tensor) -> None:
        """The usual start beside an embedding: A zero, B random."""
        nn.init.zeros_(a)
        nn.init.normal_(b)

    def reset_both(self, a: Tensor, b: Tensor) -> None:
        """Both random."""
        nn.init.normal_(a)
        nn.init.normal_(b)

    def _down(self, x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        """The looked-up columns of A, ``(*batch, r)``."""
        return F.embedding(x, a.T.to(y.dtype))

    def matrix(self, weight: Tensor) -> Tensor:
        """``(dim, rows)``."""
        return weight.T

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """``(rows, dim)``."""
        return matrix.T

    @property
    def output_scale(self) -> float:
        """What the embedding's ``forward`` multiplies its rows with."""
        return self.row_scale


# By how many dimensions of space there are.
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvProduct(Product):
    """Beside a convolution: A is a convolution like it with r channels, B one with a kernel of one point.

    With groups, ``B A`` is low-rank as a matrix of the grouped weight, so any rank will do and the sum is a
    weight of the layer; the update is one more grouped convolution then.
    """

    def __init__(self, layer: Layer, host: nn.Module) -> None:
        super().__init__(layer)
        assert isinstance(host, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        self.options: dict[str, Any] = {"stride": host.stride, "dilation": host.dilation}
        self.padding: Any = host.padding
        self.padding_mode = host.padding_mode
        self.edges = list(host._reversed_padding_repeated_twice)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(r, in / groups, *kernel)`` and ``(out, r, 1, ...)``."""
        layer = self.layer
        a = (rank, layer.in_features // layer.groups, *layer.kernel_size)
        b = (layer.out_features, rank, *(1,) * len(layer.kernel_size))
        return a, b

    def add(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """``y + scaling B A x``, ``(batch, out, *space)``."""
        if self.layer.groups > 1:
            matrix = b.flatten(1).to(x.dtype) @ a.flatten(1).to(x.dtype)
            update = self._convolve(x, matrix.view(self.layer.out_features, *a.shape[1:]))
        else:
            pointwise = _CONVOLUTIONS[len(self.layer.kernel_size)]
            update = pointwise(self._convolve(x, a.to(x.dtype)), b.to(x.dtype))
        return y + (scaling * update).to(y.dtype)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own convolution with another weight, and no bias."""
        convolve = _CONVOLUTIONS[len(self.layer.kernel_size)]
        groups = self.layer.groups
        if self.padding_mode == "zeros":
            return convolve(x, weight, groups=groups, padding=self.padding, **self.options)
        padded = F.pad(x, self.edges, mode=self.padding_mode)
        return convolve(padded, weight, groups=groups, **self.options)

    def along(self, v: Tensor) -> Tensor:
        """``(out, 1, ...)``, one for each dimension of space."""
        return v.view(-1, *[1] * len(self.layer.kernel_size))

    def matrix(self, weight: Tensor) -> Tensor:
        """``(out, in / groups * kernel)``."""
        return weight.flatten(1)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The shape of the layer's weight."""
        return matrix.view(like.shape)


def product(layer: Layer, host: nn.Module) -> Product:
    """The product beside ``host``, which is a linear layer, an embedding or a convolution."""
    if layer.kind == "embedding":
        return EmbeddingProduct(layer, host)
    if layer.kind == "convolution":
        return ConvProduct(layer, host)
    return LinearProduct(layer)


def is_transposed(layers: Mapping[str, Layer]) -> bool:
    """What a file says in ``fan_in_fan_out``: whether weights are ``(in_features, out_features)`` (GPT-2)."""
    return any(layer.kind == "transposed-linear" for layer in layers.values())
