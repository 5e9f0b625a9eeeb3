"""`grafts.init`: the methods of `PeftAdapterMixin` on a model that is there."""

from __future__ import annotations

import copyreg
import functools
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from grafts.errors import StateError
from grafts.integrations.transformers_mixin import PeftAdapterMixin
from grafts.lifecycle import registry
from grafts.sites.root_call import ENTERED

M = TypeVar("M", bound=nn.Module)

_classes: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def init(model: M) -> M:
    """Give ``model`` the methods of `PeftAdapterMixin`, in place; the inverse is `deinit`.

    Its class becomes a subclass with the same name, made for the purpose: what looks at the name,
    ``isinstance``, copies, pickles and what the model is saved as see no difference. A library that calls
    ``model.forward`` itself, and so passes by hooks, reaches the adapters too. The Trainer of `transformers`
    learns to load adapters back into such models (`grafts.integrations.transformers_patches`).

    Returns:
        The same model.
    """
    inner = registry.unwrapped(model)
    if not isinstance(inner, PeftAdapterMixin):
        inner.__class__ = _with_methods(type(inner))
    return model


def deinit(model: M) -> M:
    """Take the methods of `init` away again; adapters stay, and the verbs of this library go on working.

    Raises:
        StateError: the methods do not come from `init`.
    """
    inner = registry.unwrapped(model)
    if type(inner) not in _classes.values():
        raise StateError(f"this {type(inner).__name__} has not got its methods from grafts.init")
    inner.__class__ = type(inner).__bases__[1]
    inner.__dict__.pop("_adapter_mixin_state", None)
    return model


def _with_methods(cls: type) -> type:
    """The subclass of a model class that has the methods, one for each class."""
    if cls not in _classes:

        def reduce(self: Any, protocol: Any) -> Any:
            """As the model's own class would be pickled, but for the class to begin with, which is made
            anew.
            """
            make, _, *state = super(cast("Any", _classes[cls]), self).__reduce_ex__(protocol)
            assert make is copyreg.__newobj__  # type: ignore[attr-defined]  # not a way of the class's own
            return (_blank, (cls,), *state)

        written: Any = getattr(cls, "forward")  # noqa: B009 - not every class has one by its type

        @functools.wraps(written)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            entered = self.__dict__.get(ENTERED)
            passes_by_hooks = entered is False and not torch.compiler.is_compiling()
            if passes_by_hooks:
                # A library has called ``forward`` itself: the call is made once more, with its hooks.
                return self(*args, **kwargs)
            if entered:
                self.__dict__[ENTERED] = False
            return written(self, *args, **kwargs)

        kept = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _classes[cls] = type(
            cls.__name__, (PeftAdapterMixin, cls), {**kept, "__reduce_ex__": reduce, "forward": forward}
        )
    return _classes[cls]


def _blank(cls: type) -> Any:
    """An instance to be filled, of the class with methods; copies and pickles begin with it."""
    subclass: Any = _with_methods(cls)
    return subclass.__new__(subclass)
