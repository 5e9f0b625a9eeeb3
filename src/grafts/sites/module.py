"""The module site: adapters beside one module, driven by PyTorch's forward hooks.

The module may be quantized, sharded or offloaded: the site uses its input and its output only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        reads_base: ``forward`` takes the base module as one argument more, to read its weights; for parts
            that act after the module.
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
    # The host's own parameters by name, while it computes with others.
    _swapped: Mapping[str, nn.Parameter] = MappingProxyType({})
    _gives_back: bool = False

    def append(self, name: str, part: Part, host: nn.Module) -> None:
        """Add a part to those of adapter ``name``; parts act in the order of adding."""
        super().append(name, part, host)
        if cast("ModulePart", part).when == "weights" and not self._gives_back:
            # Only where it is needed: compilers cannot follow hooks that are called also after an error.
            self._gives_back = True
            handle = host.register_forward_hook(self._give_weights_back, always_call=True)
            self._handles = (*self._handles, handle)

    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Act before and after the module."""
        return (
            host.register_forward_pre_hook(self._before, with_kwargs=True),
            host.register_forward_hook(self._after, with_kwargs=True),
        )

    def _acting(self) -> Iterator[tuple[ModulePart, _ChosenRows | None]]:
        """The parts that act now, in order, each with the rows of the batch that it acts on, or None for
        all.
        """
        rows = self.setup.rows
        if rows is None:
            for part in self.running():
                yield cast("ModulePart", part), None
        else:
            for key, part in self.routed(rows):
                yield cast("ModulePart", part), _ChosenRows(rows, key)

    def _before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.setup.rows is None and self.setup.routed:
            self.setup.require_forward()
        is_changed = False
        through_weights: list[Part] = []
        for part, chosen in self._acting():
            if part.when == "weights":
                if chosen is not None:
                    raise StateError(
                        f"adapter_names: a {type(part).__name__} acts through the weights of its module, "
                        "which all rows of a batch have in common"
                    )
                through_weights.append(part)
            elif part.when == "sees":
                x = _first_input(args, kwargs)
                part(x if chosen is None else chosen.take(x, chosen.indices(x)))
            elif part.when == "before":
                x = _first_input(args, kwargs)
                if chosen is None:
                    x = part(x)
                else:
                    indices = chosen.indices(x)
                    x = chosen.put(x, indices, part(chosen.take(x, indices)))
                args, kwargs = _with_first_input(args, kwargs, x)
                is_changed = True
        if through_weights:
            self._take_weights(host, through_weights)
        if is_changed:
            return args, kwargs
        return None

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # Whether a part may write into the output, which saves a copy: where nobody else holds it. Asked
        # once, since what a part of all rows gives is ours too; never where rows choose, as their results are
        # put into a copy anyway.
        is_ours: bool | None = None
        for part, chosen in self._acting():
            if part.when == "after":
                base = (host,) if part.reads_base else ()
                x = _first_input(args, kwargs)
                if chosen is not None:
                    y = _first_output(host, output)
                    indices = chosen.indices(y)
                    result = part(chosen.take(x, indices), chosen.take(y, indices), *base)
                    output = _with_first_output(output, chosen.put(y, indices, result))
                elif not isinstance(output, Tensor):
                    output = _with_first_output(output, part(x, _first_output(host, output), *base))
                else:
                    if is_ours is None:
                        is_ours = _is_unshared(host, output)
                    if is_ours:
                        output = part.forward_(x, output, *base)
                    else:
                        output = part(x, output, *base)
            elif part.when == "instead":
                is_ours = False  # who holds what stands in the place of the output is not known
                if chosen is None:
                    output = part(*args, **kwargs)
                else:
                    y = _first_output(host, output)
                    indices = chosen.indices(y)
                    chosen_args = [chosen.take(value, indices) for value in args]
                    chosen_kwargs = {name: chosen.take(value, indices) for name, value in kwargs.items()}
                    result = _first_output(host, part(*chosen_args, **chosen_kwargs))
                    output = _with_first_output(output, chosen.put(y, indices, result))
        return output

    def _take_weights(self, host: nn.Module, parts: Sequence[Part]) -> None:
        """Let the host compute with what these parts make of its weights, until its forward ends."""
        tensors = to_storage(host, fold(read_weights(host), parts))
        self._swapped = {name: _swap(host, name, tensor) for name, tensor in tensors.items()}

    def _give_weights_back(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Give a host its own weights back, also when its forward has failed."""
        for name, parameter in self._swapped.items():
            _swap(host, name, parameter)
        self._swapped = {}


class _ChosenRows:
    """The rows of a batch that one adapter acts on."""

    def __init__(self, rows: Rows, key: str) -> None:
        self.rows = rows
        self.key = key

    def indices(self, x: Tensor) -> Tensor:
        """Where the rows lie in a tensor whose first dimension is the batch, or one for all of it."""
        x = self._spread(x)
        return self.rows.of(self.key, x.shape[0], x.device)

    def take(self, value: Any, indices: Tensor) -> Any:
        """These rows of an argument of the module, where it is a tensor."""
        if isinstance(value, Tensor) and value.dim() > 0:
            return self._spread(value).index_select(0, indices.to(value.device))
        return value

    def put(self, x: Tensor, indices: Tensor, changed: Tensor) -> Tensor:
        """A tensor with what the adapter has made of its rows in it."""
        return self._spread(x).index_copy(0, indices, changed)

    def _spread(self, x: Tensor) -> Tensor:
        """A tensor with one row for each of the batch, where it has one for all (positions)."""
        if x.shape[0] == 1:
            return x.expand(len(self.rows.names), *x.shape[1:])
        return x


def fold(base: Mapping[str, Tensor], parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors of one module that ``parts`` change, with all of them folded in.

    What acts on the module's input acts on its columns, and so comes after everything that adds to its
    weight.

    Args:
        base: the module's tensors, as `grafts.modules.weights.read_weights` gives them.
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


def _is_unshared(host: nn.Module, output: Any) -> bool:
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
    """The first argument of a module's call, which for most is the tensor that they work on."""
    if args:
        return args[0]
    return next(iter(kwargs.values()))


def _first_output(host: nn.Module, output: Any) -> Tensor:
    """The tensor that a module gives, or the first of several.

    Raises:
        StateError: it gives none.
    """
    value = output
    if isinstance(output, Mapping) and output:
        value = next(iter(output.values()))
    elif isinstance(output, (tuple, list)) and output:
        value = output[0]
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
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(y, *rest)
    return type(output)((y, *rest))


def _with_first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


ModulePart.site = ModuleSite
