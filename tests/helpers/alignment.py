"""Puts the tensors of every model at odd addresses, as files mapped into memory and other allocators do.

Kernels choose another order of summation by address, so numbers that are equal bit for bit on one machine
differ by a rounding on another. A run with this switched on (``make test-alignment``) finds tests that ask
for more than is promised: bitwise is for the *same* tensors at the same addresses.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

LINE = 64  # bytes: what allocators align to, and the widest registers
_odd = itertools.cycle(range(1, LINE // 2, 2))  # how many elements past such an address the next tensor lies


def lies_even(tensor: Tensor) -> bool:
    """Whether a tensor of plain memory lies where an allocator puts it."""
    return movable(tensor) and tensor.data_ptr() % LINE == 0


def movable(tensor: Tensor) -> bool:
    """Whether a tensor has plain memory of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor) or tensor.is_meta:
        return False
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.numel() > 0
    )


def at_odd_address(tensor: Tensor) -> Tensor:
    """A copy of a tensor at another odd address each time; what has no plain memory of its own stays as it
    is.
    """
    if not movable(tensor):
        return tensor
    size = tensor.element_size()
    memory = bytearray(tensor.numel() * size + 2 * LINE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    offset = -start % LINE + next(_odd) * size % LINE
    result = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(
        tensor.shape
    )
    with torch.no_grad():
        return result.copy_(tensor)


def switch_on() -> None:
    """Let every parameter and buffer that is made or cast from now on lie at an odd address; copies of
    buffers do not.
    """
    new, register_buffer, apply = nn.Parameter.__new__, nn.Module.register_buffer, nn.Module._apply

    def odd_parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        return new(cls, at_odd_address(data) if isinstance(data, Tensor) else data, requires_grad)

    def odd_buffer(self: nn.Module, name: str, tensor: Any, *args: Any, **options: Any) -> None:
        register_buffer(
            self, name, at_odd_address(tensor) if isinstance(tensor, Tensor) else tensor, *args, **options
        )

    def odd_apply(self: nn.Module, *args: Any, **options: Any) -> nn.Module:
        apply(self, *args, **options)  # goes through the children itself
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None and lies_even(tensor):
                tensor.data = at_odd_address(tensor.data)
        return self

    nn.Parameter.__new__ = odd_parameter  # type: ignore[method-assign]
    nn.Module.register_buffer = odd_buffer  # type: ignore[method-assign]
    nn.Module._apply = odd_apply  # type: ignore[method-assign]
