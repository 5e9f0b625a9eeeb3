"""The module site: adapters beside one module, driven by PyTorch's forward hooks.

The module may be quantized, sharded or offloaded: the site uses its input and its output only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.errors import StateError
from grafts.modules.weights import read_weights, to_storage
from grafts.sites.setup import Rows
from grafts.sites.site import Part, Site


class ModulePart(Part):
    """What one adapter holds and computes beside one module.

    A method writes a subclass: its tensors as parameters, its math as ``forward``, whose arguments depend on
    `when`:

    - ``"sees"``: ``forward(x)`` is told of the module's input and changes nothing;
    - ``"before"``: ``forward(x)`` returns the module's new input;
    - ``"after"``: ``forward(x, y)`` returns the module's new output, ``y`` being the output so far, of
      several the first;
    - ``"instead"``: ``forward(*args, **kwargs)`` takes the module's own arguments and returns its new output;
    - ``"weights"``: no ``forward``; the module computes with the tensors that `merged` gives. For a module
      that uses several weights inside, where nothing can stand beside one of them.

    Attributes:
        reads_base: ``forward`` takes the base module as one argument more, to read its weights.
    """

    when: Literal["sees", "before", "after", "instead", "weights"] = "after"
    reads_base: bool = False

    def forward_(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """``forward`` of a part that acts after the module, free to write into ``y``, which nobody else
        holds.
        """
        return cast("Tensor", self(x, y, *base))


class ModuleSite(Site):
    """All adapters beside one module."""

    child = "grafts"
    _swapped: Mapping[str, nn.Parameter] = MappingProxyType({})
    _swaps: bool = False

    def append(self, name: str, part: Part, host: nn.Module) -> None:
        """Add a part to those of adapter ``name``; parts act in the order of adding."""
        super().append(name, part, host)
        if cast("ModulePart", part).when == "weights" and not self._swaps:
            self._swaps = True
            self._handles = (*self._handles, host.register_forward_hook(self._restore, always_call=True))

    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Act before and after the module."""
        return (
            host.register_forward_pre_hook(self._before, with_kwargs=True),
            host.register_forward_hook(self._after, with_kwargs=True),
        )

    def _running(self) -> list[ModulePart]:
        return cast("list[ModulePart]", self.running())

    def _before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.setup.rows is not None:
            return self._before_rows(self.setup.rows, args, kwargs)
        if self.setup.routed:
            self.setup.require_forward()
        changed = False
        weights = []
        for part in self._running():
            if part.when == "sees":
                part(_first_input(args, kwargs))
            elif part.when == "before":
                args, kwargs = _with_first_input(args, kwargs, part(_first_input(args, kwargs)))
                changed = True
            elif part.when == "weights":
                weights.append(part)
        if weights:
            tensors = to_storage(host, fold(read_weights(host), weights))
            self._swapped = {name: _swap(host, name, tensor) for name, tensor in tensors.items()}
        return (args, kwargs) if changed else None

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.setup.rows is not None:
            return self._after_rows(self.setup.rows, host, args, kwargs, output)
        parts = self._running()
        owned = len(parts) > 0 and _is_fresh(host, output)
        for part in parts:
            if part.when == "after":
                x = _first_input(args, kwargs)
                base = (host,) if part.reads_base else ()
                if isinstance(output, Tensor):
                    output = part.forward_(x, output, *base) if owned else part(x, output, *base)
                else:
                    output = _with_first_output(output, part(x, _first_output(host, output), *base))
            elif part.when == "instead":
                output = part(*args, **kwargs)
        return output

    def _restore(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Give a host its own weights back, also when its forward has failed."""
        for name, parameter in self._swapped.items():
            _swap(host, name, parameter)
        self._swapped = {}

    def _routed(self, rows: Rows) -> list[tuple[str, ModulePart]]:
        return cast("list[tuple[str, ModulePart]]", self.routed(rows))

    def _before_rows(
        self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        changed = False
        for key, part in self._routed(rows):
            if part.when not in ("sees", "before"):
                continue
            x = _spread(_first_input(args, kwargs), rows)
            where = rows.of(key, x.shape[0], x.device)
            new = part(x.index_select(0, where))
            if part.when == "before":
                args, kwargs = _with_first_input(args, kwargs, x.index_copy(0, where, new))
                changed = True
        return (args, kwargs) if changed else None

    def _after_rows(
        self, rows: Rows, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        for key, part in self._routed(rows):
            if part.when in ("sees", "before"):
                continue
            y = _spread(_first_output(host, output), rows)
            where = rows.of(key, y.shape[0], y.device)
            if part.when == "instead":
                given = [_rows_of(value, where, rows) for value in (*args, *kwargs.values())]
                new = _first_output(
                    host, part(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
                )
            else:
                x = _rows_of(_first_input(args, kwargs), where, rows)
                new = part(x, y.index_select(0, where), *((host,) if part.reads_base else ()))
            output = _with_first_output(output, y.index_copy(0, where, new))
        return output


def fold(base: Mapping[str, Tensor], parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors of one module that ``parts`` change, with all of them folded in.

    What acts on the module's input acts on its columns, and so comes after everything that adds to its
    weight.

    Args:
        base: the module's tensors, as `grafts.modules.weights.read` gives them.
        parts: in the order in which they act.
    """
    changed: dict[str, Tensor] = {}
    for part in sorted(parts, key=lambda part: cast("ModulePart", part).when == "before"):
        changed.update(part.merged({**base, **changed}, base))
    return changed


def _swap(host: nn.Module, name: str, tensor: Tensor) -> nn.Parameter:
    """Let a module compute with ``tensor`` in place of a parameter; returns the parameter."""
    path, _, leaf = name.rpartition(".")
    owner = host.get_submodule(path)
    before = owner._parameters[leaf]
    assert before is not None
    owner._parameters[leaf] = cast("nn.Parameter", tensor)
    return before


def _spread(x: Tensor, rows: Rows) -> Tensor:
    """``x`` with one row for each of the batch where it has one for all (positions)."""
    return x.expand(len(rows.names), *x.shape[1:]) if x.shape[0] == 1 else x


def _rows_of(value: Any, where: Tensor, rows: Rows) -> Any:
    """The chosen rows of a module's argument, if it is a tensor that has them."""
    return (
        _spread(value, rows).index_select(0, where.to(value.device))
        if isinstance(value, Tensor) and value.dim()
        else value
    )


def _is_fresh(host: nn.Module, output: Any) -> bool:
    """Whether the host's output is memory that nobody else can hold: not a hook, not the graph of the
    backward pass.

    That is so where the host is known to do one product or one look-up with a plain weight and nothing stands
    between it and the site. There a part may add into the output, which saves a pass over it and its memory
    once more.
    """
    return (
        type(host).forward in (nn.Linear.forward, nn.Embedding.forward)
        and "forward" not in host.__dict__
        and type(output) is Tensor
        and type(host._parameters.get("weight")) is nn.Parameter
        and len(host._forward_hooks) == 1
        and not nn.modules.module._global_forward_hooks
    )


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _first_output(host: nn.Module, output: Any) -> Tensor:
    """The tensor that a module gives, or the first of several.

    Raises:
        StateError: it gives none.
    """
    value = output
    if not isinstance(output, Tensor) and output:
        value = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if not isinstance(value, Tensor):
        raise StateError(
            f"the output of a {type(host).__name__} is no tensor and begins with none, so no adapter can act "
            f"on it"
        )
    return value


def _with_first_output(output: Any, y: Tensor) -> Any:
    """A module's output with ``y`` in place of what `_first_output` gives."""
    if isinstance(output, Tensor):
        return y
    if isinstance(output, Mapping):
        output[next(iter(output))] = y  # type: ignore[index]
        return output
    rest = output[1:]
    return type(output)(y, *rest) if hasattr(output, "_fields") else type(output)((y, *rest))


def _with_first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


ModulePart.site = ModuleSite
