"""What two computations of the same thing may differ by.

Bitwise equality is promised for the *same* tensors: at the same addresses, of the same shapes. Kernels choose
the order in which they sum by address, shape, processor and number of threads, and sums of floating-point
numbers depend on their order. So what another model object computes (a copy, one read from a file, one that
lies on a disk) is compared within a rounding, while its tensors, which were only copied, are compared bit for
bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# In the models of the tests a number is the end of some ten sums of up to 64 terms, one after the other. Each
# may be off by 64 roundings, and what is off in one layer goes on through the others: a thousand roundings of
# the largest number.
ROUNDINGS = 1000


def roundings(expected: Tensor) -> float:
    """By how much a tensor may be off that was computed in another order."""
    if not expected.is_floating_point() or expected.numel() == 0:
        return 0.0
    assert torch.finfo(expected.dtype).eps < 1e-6, (
        "a thousand roundings of a half type are more than the numbers themselves"
    )
    return ROUNDINGS * torch.finfo(expected.dtype).eps * float(expected.detach().abs().max())


def assert_rounded(actual: Any, expected: Any) -> None:
    """The same numbers, computed by tensors that lie elsewhere."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=roundings(expected))


def assert_all_rounded(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors by name, computed by tensors that lie elsewhere."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_rounded(actual[name], tensor)


def assert_bitwise(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors by name, bit for bit: they were copied."""
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []
