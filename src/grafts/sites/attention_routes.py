"""How the attention of a class of modules is reached."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

Route = Literal["interface", "call", "steps"]


def unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`Tensor.unflatten`, as compilers can trace it anywhere.

    Args:
        x: any tensor.
        dim: which dimension becomes several; counted from the end where below 0.
        sizes: of those; one of them may be -1.
    """
    dim = dim % x.dim()
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def written_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """A class's ``forward`` as it was written, without the decorators that keep what they wrap
    (``functools.wraps``).
    """
    return cast("Callable[..., Any]", inspect.unwrap(cls.forward))


def route_of(cls: type[nn.Module]) -> Route | None:
    """How the attention of a class of modules is reached; None where it has none.

    - ``"interface"``: it fetches its kernel from `transformers` by the name in its config;
    - ``"call"``: it calls `F.scaled_dot_product_attention`;
    - ``"steps"``: it multiplies, takes a softmax and multiplies again.

    It is read off the names in the code of the class; nothing is run.

    >>> route_of(nn.Linear) is None
    True
    """
    return _route_of(cls)  # type: ignore[arg-type]  # a metaclass may have no hash; those of modules have


@functools.cache
def _route_of(cls: type[nn.Module]) -> Route | None:
    forward = written_forward(cls)
    code = getattr(forward, "__code__", None)
    if cls.__module__.startswith("torch.") or code is None:
        return None
    if "ALL_ATTENTION_FUNCTIONS" in code.co_names and "ALL_ATTENTION_FUNCTIONS" in forward.__globals__:
        return "interface"
    # What ``forward`` calls itself says more than what its class could call.
    return _route_by_names(set(code.co_names)) or _route_by_names(_names_in_methods(cls))


def _route_by_names(names: set[str]) -> Route | None:
    """How attention is reached in code that uses these names; None where it computes none."""
    if "scaled_dot_product_attention" in names:
        return "call"
    if names & {"matmul", "bmm", "baddbmm"} and names & {"softmax", "Softmax"}:
        return "steps"
    return None


def _names_in_methods(cls: type[nn.Module]) -> set[str]:
    """The names that the code of a class's methods uses, those of its parents' too."""
    names: set[str] = set()
    for parent in cls.__mro__:
        if parent is nn.Module:
            continue
        for function in vars(parent).values():
            if not inspect.isfunction(function):
                continue
            code = getattr(inspect.unwrap(function), "__code__", None)
            if code is not None:
                names.update(code.co_names)
    return names
