"""How the attention of a class of modules is reached."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

Route = Literal["interface", "call", "steps"]


def unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`Tensor.unflatten`, as compilers can trace it anywhere."""
    dim = dim % x.dim()
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def written_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """A class's ``forward`` as it was written, without decorators."""
    return cast("Callable[..., Any]", inspect.unwrap(cls.forward))


@functools.cache
def route_of(cls: type[nn.Module]) -> Route | None:
    """How the attention of a class of modules is reached; None where it has none.

    - ``"interface"``: it fetches its kernel from `transformers` by the name in its config;
    - ``"call"``: it calls `F.scaled_dot_product_attention`;
    - ``"steps"``: it multiplies, takes a softmax and multiplies again.

    >>> route_of(nn.Linear) is None
    True
    """
    forward = written_forward(cls)
    code = getattr(forward, "__code__", None)
    if cls.__module__.startswith("torch.") or code is None:
        return None
    if "ALL_ATTENTION_FUNCTIONS" in code.co_names and "ALL_ATTENTION_FUNCTIONS" in forward.__globals__:
        return "interface"
    methods = [
        inspect.unwrap(f)
        for c in cls.__mro__
        if c is not nn.Module
        for f in vars(c).values()
        if inspect.isfunction(f)
    ]
    everything = {name for f in methods if hasattr(f, "__code__") for name in f.__code__.co_names}
    for names in (set(code.co_names), everything):  # what it calls itself says more than what it could call
        if "scaled_dot_product_attention" in names:
            return "call"
        if names & {"matmul", "bmm", "baddbmm"} and names & {"softmax", "Softmax"}:
            return "steps"
    return None
