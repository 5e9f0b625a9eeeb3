"""The two ways of reaching the attention of a module that watch PyTorch's own calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grafts.sites.attention_routes import unflatten


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
        if (
            func is Tensor.unflatten
        ):  # compilers cannot trace it from here, though they can where it was written
            return unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SUMS = {torch.baddbmm, Tensor.baddbmm}
_QUOTIENTS = {torch.div, torch.true_divide, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__}
_MULTIPLES = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__}
_SOFTMAXES = {torch.softmax, F.softmax, Tensor.softmax}


class UnfusedAttention(Interception):
    """Follows a module that computes attention in steps: queries by keys, some number, softmax, weights by
    values.

    All of them are four-dimensional, ``(batch, heads, ..., ...)``, or have batch and heads in one dimension.
    The softmax is given the scores of a prefix as well and gives back the weights of the module's own keys;
    what the prefix and the prompts give is added to the last product.

    Attributes:
        query: the queries, once they were multiplied by keys.
        key: the keys.
        scaling: what that product was multiplied by since.
        batch: how many rows the module was called with.
    """

    def __init__(self, site: Listener, host: nn.Module, batch: int) -> None:
        super().__init__(site, host)
        self.batch = batch
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.scaling = 1.0
        self._scores: Tensor | None = None
        self._weights: torch.Size | None = None
        self._of_prefix: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of PyTorch in the meantime."""
        if func in _PRODUCTS and len(args) == 2 and self._may_attend(args[0], args[1]):
            return self._product(args[0], args[1], lambda: func(*args))
        if func in _SUMS and self._weights is None:
            options = kwargs or {}
            left, right = (options.get(f"batch{i}", args[i] if len(args) > i else None) for i in (1, 2))
            if self._may_attend(left, right):
                self._begin(left, right)
                self.scaling = float(options.get("alpha", 1.0))
                self._scores = func(*args, **options)
                return self._scores
        if (
            len(args) == 2
            and args[0] is self._scores
            and self._scores is not None
            and (func in _QUOTIENTS or func in _MULTIPLES)
        ):
            self._scale(func, args[1])
            self._scores = func(*args, **(kwargs or {}))
            return self._scores
        if func in _SOFTMAXES and self.query is not None and args and self._are_scores(args[0]):
            return self._softmax(args[0], lambda x: func(x, *args[1:], **(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs)

    def _rows(self, x: Tensor) -> bool:
        """Whether batch and heads may be the first dimension; a module that knows its heads says how large
        the batch is.
        """
        heads = getattr(self.host, "num_heads", None)
        if x.dim() == 3 and isinstance(heads, int) and x.shape[0] % heads == 0:
            self.batch = x.shape[0] // heads
        return x.shape[0] % self.batch == 0 and x.dim() == 3

    def _may_attend(self, left: Any, right: Any) -> bool:
        if not (isinstance(left, Tensor) and isinstance(right, Tensor) and left.dim() == right.dim()):
            return False
        return left.dim() == 4 or self._rows(left)

    def _four(self, x: Tensor) -> Tensor:
        """With batch and heads apart."""
        return x if x.dim() == 4 else x.view(self.batch, -1, *x.shape[1:])

    def _are_scores(self, x: Tensor) -> bool:
        assert self.query is not None
        assert self.key is not None
        return (
            x.shape[-1] == self.key.shape[2]
            and x.numel() // x.shape[-1] == self.query.numel() // self.query.shape[-1]
        )

    def _begin(self, left: Any, right: Any) -> None:
        self.query, self.key, self.scaling = self._four(left), self._four(right).transpose(-1, -2), 1.0

    def _product(self, left: Tensor, right: Tensor, product: Callable[[], Tensor]) -> Tensor:
        if (
            self._weights is not None
            and left.numel() == self._weights.numel()
            and left.shape[-1] == self._weights[-1]
        ):
            self.reached, self._weights = True, None
            assert self.query is not None
            assert self.key is not None
            values = self._four(right)
            output = self.site.read(
                self.host, self.query, self.key, self.scaling, self._four(left), values, self._of_prefix
            )
            return output if left.dim() == 4 else output.reshape(-1, *output.shape[2:])
        self._begin(left, right)
        self._scores = product()
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
            own = prefix.expand(*self.query.shape[:-1], length).reshape(*scores.shape[:-1], length)
            both = softmax(torch.cat([own.to(scores.dtype), scores], -1))
            self._of_prefix, weights = self._four(both[..., :length]), both[..., length:]
        self._weights = weights.shape
        return weights
