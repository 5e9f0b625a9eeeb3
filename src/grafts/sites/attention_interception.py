"""The two ways of reaching the attention of a module that watch PyTorch's own calls.

Both are function modes: while one is entered, PyTorch shows it every call of its functions.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grafts.sites.attention_routes import unflatten

_PRODUCTS = frozenset({torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm})
_PRODUCTS_WITH_SUM = frozenset({torch.baddbmm, Tensor.baddbmm})
_QUOTIENTS = frozenset(
    {torch.div, torch.true_divide, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__}
)
_MULTIPLES = frozenset({torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__})
_SOFTMAXES = frozenset({torch.softmax, F.softmax, Tensor.softmax})


class Watched(Protocol):
    """What is told of the attention of a module that is watched: its site."""

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
        prefix_weights: Tensor | None,
    ) -> Tensor:
        """Instead of the product of weights and values."""


class Interception(TorchFunctionMode):
    """Brings a module's calls of `F.scaled_dot_product_attention` to its site.

    Attributes:
        reached: whether there was such a call.
    """

    def __init__(self, site: Watched, host: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.host = host
        self.reached = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of PyTorch in the meantime."""
        if func is F.scaled_dot_product_attention:
            self.reached = True
            return self.site.call(self.host, *args, **(kwargs or {}))
        # Compilers cannot trace it from here, though they can where it was written.
        if func is Tensor.unflatten:
            return unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _State(Enum):
    """What was seen last of attention that is written out (the drawing is at `UnfusedAttention`)."""

    NOTHING = auto()
    SCORES = auto()
    WEIGHTS = auto()


class UnfusedAttention(Interception):
    """Follows the attention of a module that writes it out, and brings its steps to the module's site.

    A module computes ``softmax(query @ key.T * scaling + mask) @ value`` with calls of its own. Which product
    is which is told by the order of the steps and by sizes::

                     a product of two tensors
                     with heads: query, key
        NOTHING  ------------------------------->  SCORES  ---.
           ^                                        |  ^      |  times or divided by a number: the scaling
           |                                        |  `------'  (another such product: those were no scores)
           |        the weights times a tensor:     |
           |        value; the site reads           |  softmax over as many numbers as there are keys;
           |                                        v  a prefix joins it
           `------------------------------------  WEIGHTS

    Whatever does not fit runs as it is and changes no state (a mask is added to the scores, dropout is on the
    weights).

    Attributes:
        batch: how many rows; where batch and heads are one dimension it tells them apart.
        query: ``(batch, heads, queries, head_dim)``, of the last scores; None before the first.
        key: ``(batch, heads, keys, head_dim)``, likewise.
        scaling: what their products were multiplied with.
    """

    def __init__(self, site: Watched, host: nn.Module, batch: int) -> None:
        super().__init__(site, host)
        self.batch = batch
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.scaling = 1.0
        self._state = _State.NOTHING
        # In the state SCORES: the scores as they are now, to know them again when they are scaled.
        self._scores: Tensor | None = None
        # In the state WEIGHTS: the shape of the weights of the module's own keys, and the weights of a
        # prefix.
        self._weights_shape: torch.Size | None = None
        self._prefix_weights: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of PyTorch in the meantime: a step of the drawing, or what runs as it is."""
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) == 2 and self._may_attend(args[0], args[1]):
            return self._product(func, args[0], args[1])
        if func in _PRODUCTS_WITH_SUM and self._state is not _State.WEIGHTS:
            left, right = _factors_of_sum(args, kwargs)
            if self._may_attend(left, right):
                result = self._scored(left, right, lambda: func(*args, **kwargs))
                self.scaling = float(kwargs.get("alpha", 1.0))
                return result
        may_scale = func in _QUOTIENTS or func in _MULTIPLES
        if may_scale and len(args) == 2 and self._is_scores(args[0]):
            self._scale(func, args[1])
            self._scores = func(*args, **kwargs)
            return self._scores
        if func in _SOFTMAXES and args and self._fits_scores(args[0]):
            return self._softmax(args[0], lambda x: func(x, *args[1:], **kwargs))
        return super().__torch_function__(func, types, args, kwargs)

    def _product(self, func: Any, left: Tensor, right: Tensor) -> Any:
        """A product of attention: of the weights and the values, or else of queries and keys."""
        if self._are_weights(left):
            return self._read(left, right)
        return self._scored(left, right, lambda: func(left, right))

    def _may_attend(self, left: Any, right: Any) -> bool:
        """Whether a product of these may be one of attention: both have heads, apart or with the batch."""
        if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.dim() != right.dim():
            return False
        return left.dim() == 4 or self._has_heads_in_batch(left)

    def _has_heads_in_batch(self, x: Tensor) -> bool:
        """Whether batch and heads may be the first dimension.

        A module that knows how many heads it has says so how large the batch is: that of cross-attention over
        a prompt is another than that of the call.
        """
        if x.dim() != 3:
            return False
        heads = getattr(self.host, "num_heads", None)
        if isinstance(heads, int) and x.shape[0] % heads == 0:
            self.batch = x.shape[0] // heads
        return x.shape[0] % self.batch == 0

    def _with_heads(self, x: Tensor) -> Tensor:
        """A tensor with batch and heads apart, ``(batch, heads, ...)``."""
        if x.dim() == 4:
            return x
        return x.view(self.batch, -1, *x.shape[1:])

    def _scored(self, left: Tensor, right: Tensor, product: Callable[[], Tensor]) -> Tensor:
        """A product of queries and keys: remember them, and compute it."""
        self.query = self._with_heads(left)
        self.key = self._with_heads(right).transpose(-1, -2)
        self.scaling = 1.0
        if self._state is not _State.WEIGHTS:
            self._state = _State.SCORES
        self._scores = product()
        return self._scores

    def _is_scores(self, value: Any) -> bool:
        """Whether a value is the very tensor of the scores."""
        return self._scores is not None and value is self._scores

    def _scale(self, func: Any, by: Any) -> None:
        """Note what the scores are multiplied with or divided by, where it is one number."""
        is_number = isinstance(by, (int, float)) or (isinstance(by, Tensor) and by.numel() == 1)
        if not is_number:
            return
        if func in _QUOTIENTS:
            self.scaling = self.scaling / float(by)
        else:
            self.scaling = self.scaling * float(by)

    def _fits_scores(self, x: Tensor) -> bool:
        """Whether a tensor has the size of the scores: as many rows as queries, as many numbers as keys."""
        if self.query is None or self.key is None:
            return False
        rows = x.numel() // x.shape[-1]
        return x.shape[-1] == self.key.shape[2] and rows == self.query.numel() // self.query.shape[-1]

    def _softmax(self, scores: Tensor, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        """The softmax of the scores, over those of a prefix too; gives the weights of the module's own
        keys.
        """
        assert self.query is not None
        assert self.key is not None
        prefix_scores = self.site.prefix_scores(self.host, self.query, self.key, self.scaling)
        if prefix_scores is None:
            weights = softmax(scores)
            self._prefix_weights = None
        else:
            length = prefix_scores.shape[-1]
            prefix_scores = prefix_scores.expand(*self.query.shape[:-1], length)
            prefix_scores = prefix_scores.reshape(*scores.shape[:-1], length)
            both = softmax(torch.cat([prefix_scores.to(scores.dtype), scores], -1))
            self._prefix_weights = self._with_heads(both[..., :length])
            weights = both[..., length:]
        self._weights_shape = weights.shape
        self._state = _State.WEIGHTS
        return weights

    def _are_weights(self, x: Tensor) -> bool:
        """Whether a tensor may be the weights: they may have been through dropout since, and had another
        form.
        """
        if self._state is not _State.WEIGHTS or self._weights_shape is None:
            return False
        return x.numel() == self._weights_shape.numel() and x.shape[-1] == self._weights_shape[-1]

    def _read(self, weights: Tensor, values: Tensor) -> Tensor:
        """The product of weights and values, with what the adapters add to it."""
        assert self.query is not None
        assert self.key is not None
        self.reached = True
        self._state = _State.NOTHING
        self._weights_shape = None
        output = self.site.read(
            self.host,
            self.query,
            self.key,
            self.scaling,
            self._with_heads(weights),
            self._with_heads(values),
            self._prefix_weights,
        )
        if weights.dim() == 4:
            return output
        return output.reshape(-1, *output.shape[2:])


def _factors_of_sum(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The factors of a product with a sum (`torch.baddbmm`), given by position or by name."""
    left, right = kwargs.get("batch1"), kwargs.get("batch2")
    if len(args) > 1:
        left = args[1]
    if len(args) > 2:
        right = args[2]
    return left, right
