"""Activations by the names that configs give them, those of `transformers`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from grafts.errors import ConfigError

Activation = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


_KNOWN: dict[str, Activation] = {
    **dict.fromkeys(("linear", "identity"), _same),
    "gelu": F.gelu,
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), partial(F.gelu, approximate="tanh")),
    **dict.fromkeys(("leaky_relu", "leakyrelu"), F.leaky_relu),
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": F.sigmoid,
    **dict.fromkeys(("silu", "swish"), F.silu),
    "tanh": F.tanh,
}


def activation(name: str | None) -> Activation:
    """The function of that name, in any case; none is the identity. Rarer ones come from `transformers`.

    >>> activation("Swish") is F.silu
    True

    Raises:
        ConfigError: there is none.
    """
    key = "linear" if name is None else name.lower()
    if key in _KNOWN:
        return _KNOWN[key]
    try:
        return cast("Activation", importlib.import_module("transformers.activations").ACT2FN[key])
    except (ImportError, KeyError) as error:
        raise ConfigError(
            f"no activation is called {name!r}; known: {', '.join(_KNOWN)}, and those of transformers"
        ) from error


def is_activation(name: object) -> bool:
    """Whether there is one of that name."""
    if name is not None and not isinstance(name, str):
        return False
    try:
        activation(name)
    except ConfigError:
        return False
    return True
