"""How the attention of a class of modules is reached, and the two ways of reaching it that watch PyTorch's own calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Route = Literal["interface", "call", "steps"]


class Listener(Protocol):
    """What is told of the attention of a module that is watched."""

    def call(self, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Instead of `F.scaled_dot_product_attention`."""

    def prefix_scores(self, host: nn.Module, query: Tensor, key: Tensor, scaling: float) -> Tensor | None:
        """The scores of a prefix, before the softmax."""

    def read(
        self,
        host: nn.Module,
        query: Tensor,
        key: Tensor,
        scaling: float,
        weights: Tensor,
        value: Tensor,
        of_prefix: Tensor | None,
    ) -> Tensor:
        """Instead of the product of weights and values."""


class Interception(TorchFunctionMode):
    """Brings a module's calls of `F.scaled_dot_product_attention` to its site.

    Attributes:
        reached: whether there was such a call.
    """

    def __init__(self, site: Listener, host: nn.Module) -> None:
        super().__init__()
        self.site, self.host, self.reached = site, host, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of PyTorch in the meantime."""
        if func is F.scaled_dot_product_attention:
            self.reached = True
            return self.site.call(self.host, *args, **(kwargs or {}))
        if func is Tensor.unflatten:  # compilers cannot trace it from here, though they can where it was written
            return unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_QUOTIENTS = {torch.div, torch.true_divide, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__}
_MULTIPLES = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__}
_SOFTMAXES = {torch.softmax, F.softmax, Tensor.softmax}


class Steps(Interception):
    """Follows a module that computes attention in steps: queries by keys, some number, softmax, weights by values.

    All of them are four-dimensional, ``(batch, heads, ..., ...)``. The softmax is given the scores of a prefix as well and
    gives back the weights of the module's own keys; what the prefix and the prompts give is added to the last product.

    Attributes:
        query: the queries, once they were multiplied by keys.
        key: the keys.
        scaling: what that product was multiplied by since.
    """

    def __init__(self, site: Listener, host: nn.Module) -> None:
        super().__init__(site, host)
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.scaling = 1.0
        self._scores: Tensor | None = None
        self._weights: torch.Size | None = None
        self._of_prefix: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of PyTorch in the meantime."""
        if func in _PRODUCTS and len(args) == 2 and all(isinstance(x, Tensor) and x.dim() == 4 for x in args):
            return self._product(*args)
        if (
            len(args) == 2
            and args[0] is self._scores
            and self._scores is not None
            and (func in _QUOTIENTS or func in _MULTIPLES)
        ):
            self._scale(func, args[1])
            self._scores = func(*args, **(kwargs or {}))
            return self._scores
        if func in _SOFTMAXES and self.query is not None and args and args[0].shape[:-1] == self.query.shape[:-1]:
            return self._softmax(args[0], lambda x: func(x, *args[1:], **(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        if self._weights is not None and left.shape == self._weights:
            self.reached, self._weights = True, None
            assert self.query is not None
            assert self.key is not None
            return self.site.read(self.host, self.query, self.key, self.scaling, left, right, self._of_prefix)
        self.query, self.key, self.scaling = left, right.transpose(-1, -2), 1.0
        self._scores = left @ right
        return self._scores

    def _scale(self, func: Any, by: Any) -> None:
        if isinstance(by, (int, float)) or (isinstance(by, Tensor) and by.numel() == 1):
            self.scaling = self.scaling / float(by) if func in _QUOTIENTS else self.scaling * float(by)

    def _softmax(self, scores: Tensor, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        assert self.query is not None
        assert self.key is not None
        prefix = self.site.prefix_scores(self.host, self.query, self.key, self.scaling)
        if prefix is None:
            weights, self._of_prefix = softmax(scores), None
        else:
            length = prefix.shape[-1]
            both = softmax(torch.cat([prefix.expand(*scores.shape[:-1], length).to(scores.dtype), scores], -1))
            self._of_prefix, weights = both[..., :length], both[..., length:]
        self._weights = weights.shape
        return weights


def unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """`Tensor.unflatten`, as compilers can trace it anywhere."""
    dim = dim % x.dim()
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def written_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """A class's ``forward`` as it was written, without decorators."""
    return cast(Callable[..., Any], inspect.unwrap(cls.forward))


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
    methods = [inspect.unwrap(f) for c in cls.__mro__ if c is not nn.Module for f in vars(c).values() if inspect.isfunction(f)]
    everything = {name for f in methods if hasattr(f, "__code__") for name in f.__code__.co_names}
    for names in (set(code.co_names), everything):  # what it calls itself says more than what it could call
        if "scaled_dot_product_attention" in names:
            return "call"
        if "matmul" in names and "softmax" in names:
            return "steps"
    return None
