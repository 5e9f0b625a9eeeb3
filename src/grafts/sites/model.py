"""The model site: at the base model's own call, where the rows of a batch choose their adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.composition import Rows, Setup
from grafts.errors import StateError

ARGUMENT = "adapter_names"
Choose = Callable[[Sequence[str | None]], Rows]


class ModelSite:
    """Takes ``adapter_names`` out of the model's calls, and tells the module sites what the rows have asked for.

    Attributes:
        setup: the model's shared setup.
        choose: checks names and makes them rows.
    """

    def __init__(self, setup: Setup, choose: Choose) -> None:
        self.setup = setup
        self.choose = choose
        self._hook: RemovableHandle | None = None
        self._end: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Hook the model's calls, and its ``generate`` if it has one."""
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        if callable(getattr(type(model), "generate", None)):
            model.__dict__["generate"] = RoutedGenerate(self, model)

    def detach(self, model: nn.Module) -> None:
        """The exact inverse of `attach`."""
        for handle in (self._hook, self._end):
            if handle is not None:
                handle.remove()
        self._hook = self._end = None
        model.__dict__.pop("generate", None)

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        setup = self.setup
        if kwargs.get(ARGUMENT) is not None:
            setup.rows = self.rows(model, kwargs[ARGUMENT], args, kwargs)
            if self._end is not None:
                self._end.remove()
            # only for such a call, because compilers do not like hooks that are called come what may
            self._end = model.register_forward_hook(self._after, always_call=True)
        if setup.routed != (setup.rows is not None):
            setup.routed = setup.rows is not None
        if ARGUMENT not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.setup.rows = None
        if output is not None and self._end is not None:  # PyTorch is looking at its hooks when the call has failed
            self._end.remove()
            self._end = None

    def rows(self, model: nn.Module, names: Sequence[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """What the rows of a call ask for.

        Raises:
            AdapterNameError: a name is unknown.
            StateError: there is not one name a row, or rows cannot choose now.
        """
        rows = self.choose(names)
        preferred = [kwargs.get(name) for name in (getattr(model, "main_input_name", None), "inputs_embeds") if name]
        given = [value for value in (*args, *preferred, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        if given and given[0].shape[0] != len(rows.names):
            raise StateError(f"adapter_names has {len(rows.names)} names for a batch of {given[0].shape[0]} rows")
        return rows


class RoutedGenerate:
    """A model's ``generate`` with ``adapter_names``, one a row of its inputs; beams follow their row."""

    def __init__(self, site: ModelSite, model: nn.Module) -> None:
        self.site = site
        self.model = model

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The class's own method, for those who look at its signature."""
        return functools.partial(type(self.model).generate, self.model)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Generate; see the model's own ``generate``.

        Raises:
            AdapterNameError: a name is unknown.
            StateError: there is not one name a row, or rows cannot choose now.
        """
        if adapter_names is None:
            return self.__wrapped__(*args, **kwargs)
        site = self.site
        site.setup.rows = site.rows(self.model, adapter_names, args, kwargs)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            site.setup.rows = None
