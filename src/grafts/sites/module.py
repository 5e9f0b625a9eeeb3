"""The module site: adapters beside one module, driven by PyTorch's forward hooks.

A site is registered as a child of the module that it serves, under the name `CHILD`. It holds the parts of every adapter
that targets this module and runs those that the shared setup names. The module's class, its own parameters and its
``forward`` stay untouched, so quantized, sharded or offloaded modules are served like any other.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.composition import CHILD, Rows, Setup, child_key
from grafts.errors import StateError
from grafts.weights import own_modules, read, written


class Part(nn.Module, abc.ABC):
    """What one adapter holds and computes at one module site.

    A method writes a subclass: its tensors as parameters, its math as ``forward``, whose arguments depend on `when`:

    - ``"before"``: ``forward(x)`` returns the module's new input;
    - ``"after"``: ``forward(x, y)`` returns the module's new output, ``y`` being the output so far;
    - ``"instead"``: ``forward(*args, **kwargs)`` takes the module's own arguments and returns its new output;
    - ``"weights"``: no ``forward``; the module computes with the tensors that `merged` gives. For a module that uses
      several weights inside, where nothing can stand beside one of them.

    The policy on number formats, which every part keeps: tensors are stored in float32 (float64 beside a float64 base),
    computed with in the format of the activations, and the output keeps the format that the base gave it.

    Attributes:
        reads_base: ``forward`` takes the base module as one argument more, to read its weights.
        routable: it can act on some rows of a batch only.
    """

    when: Literal["before", "after", "instead", "weights"] = "after"
    reads_base: bool = False
    routable: bool = True

    def forward_(self, x: Tensor, y: Tensor, *base: nn.Module) -> Tensor:
        """``forward`` of a part that acts after the module, free to write into ``y``, which nobody else holds."""
        return cast(Tensor, self(x, y, *base))

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint holds, by their name after the module's path.

        Those of a part that was just made share memory with it: writing into them loads it.
        """
        return dict(self.named_parameters())

    @abc.abstractmethod
    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The module's tensors with this part folded in; differentiable with respect to the part.

        Args:
            tensors: the module's parameters by name, as other parts have left them, at least float32, the weight of a
                linear as ``(out_features, in_features)``.
            base: the same as they are in the base.

        Returns:
            The changed ones, as new tensors; the given ones are not written to.

        Raises:
            MergeError: this part has no exact merge.
        """

    def pieces(self) -> Mapping[str, Part]:
        """The parts that this one is made of, by the prefix of their file names; most are of one piece, themselves."""
        return {"": self}

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Take what the part needs from the base's weights; called once, when it has got its place and its tensors.

        Args:
            host: the base module.
            fresh: the adapter is new, and not read from a file: tensors that start from the base's are to be set as well.

        Raises:
            MergeError: the weights cannot be read.
        """

    def tied(self, host: nn.Module) -> Part:
        """A part with the same parameters, beside a module whose weight is the same tensor as this one's module's.

        Args:
            host: the other module.

        Raises:
            ConfigError: the two modules use the weight in ways that one adapter cannot serve.
        """
        raise NotImplementedError(f"a {type(self).__name__} cannot follow a tied weight")


class ModuleSite(nn.Module):
    """All adapters at one module; their parts are its children.

    A part is called by its adapter's key (see `child_key`), further parts of the same adapter by key and number.

    Attributes:
        setup: the model's shared setup.
        children_of: adapter key -> the names of the adapter's parts here, in the order in which they act.
    """

    _handles: tuple[RemovableHandle, ...] = ()
    _swapped: Mapping[str, nn.Parameter] = MappingProxyType({})
    _swaps: bool = False

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.children_of: dict[str, tuple[str, ...]] = {}

    def parts(self, name: str) -> list[Part]:
        """The parts of adapter ``name`` at this site; empty where it has none."""
        return self._parts((child_key(name),))

    def running(self) -> list[Part]:
        """The parts that act now, in order."""
        return self._parts(self.setup.running)

    def _parts(self, keys: Iterable[str]) -> list[Part]:
        modules, children = self._modules, self.children_of
        return [cast(Part, modules[name]) for key in keys if key in children for name in children[key]]

    def append(self, name: str, part: Part, host: nn.Module) -> None:
        """Add a part to those of adapter ``name``; parts act in the order of adding."""
        key = child_key(name)
        others = self.children_of.get(key, ())
        child = f"{key}+{len(others)}" if others else key
        self._modules[child] = part
        self.children_of[key] = (*others, child)
        if part.when == "weights" and not self._swaps:
            self._swaps = True
            self._handles = (*self._handles, host.register_forward_hook(self._restore, always_call=True))

    def remove(self, name: str) -> None:
        """Forget the parts of adapter ``name``."""
        for child in self.children_of.pop(child_key(name)):
            del self._modules[child]

    def attach(self, host: nn.Module) -> None:
        """Become a child of ``host`` and hook its calls."""
        host.add_module(CHILD, self)
        self._handles = (
            host.register_forward_pre_hook(self._before, with_kwargs=True),
            host.register_forward_hook(self._after, with_kwargs=True),
        )

    def detach(self, host: nn.Module) -> None:
        """The exact inverse of `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        delattr(host, CHILD)

    def _before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.setup.rows is not None:
            return self._before_rows(self.setup.rows, args, kwargs)
        if self.setup.routed:
            self.setup.require_forward()
        changed = False
        weights = []
        for part in self.running():
            if part.when == "before":
                args, kwargs = _with_first_input(args, kwargs, part(_first_input(args, kwargs)))
                changed = True
            elif part.when == "weights":
                weights.append(part)
        if weights:
            tensors = written(host, fold(read(host), weights))
            self._swapped = {name: _swap(host, name, tensor) for name, tensor in tensors.items()}
        return (args, kwargs) if changed else None

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.setup.rows is not None:
            return self._after_rows(self.setup.rows, host, args, kwargs, output)
        parts = self.running()
        owned = bool(parts) and _is_fresh(host, output)
        for part in parts:
            if part.when == "after":
                x = _first_input(args, kwargs)
                base = (host,) if part.reads_base else ()
                output = part.forward_(x, output, *base) if owned else part(x, output, *base)
            elif part.when == "instead":
                output = part(*args, **kwargs)
        return output

    def _restore(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Give a host its own weights back, also when its forward has failed."""
        for name, parameter in self._swapped.items():
            _swap(host, name, parameter)
        self._swapped = {}

    def _routed(self, rows: Rows) -> list[tuple[str, Part]]:
        """The parts that the rows of this call have asked for, with the key of their adapter."""
        routed = [(key, part) for key in rows.keys for part in self._parts((key,))]
        for _, part in routed:
            if not part.routable:
                raise StateError(f"adapter_names: a {type(part).__name__} acts on all rows of a batch at once")
        return routed

    def _before_rows(
        self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        routed = [(key, part) for key, part in self._routed(rows) if part.when == "before"]
        for key, part in routed:
            x = _spread(_first_input(args, kwargs), rows)
            where = rows.of(key, x.shape[0], x.device)
            args, kwargs = _with_first_input(args, kwargs, x.index_copy(0, where, part(x.index_select(0, where))))
        return (args, kwargs) if routed else None

    def _after_rows(self, rows: Rows, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        for key, part in self._routed(rows):
            if part.when == "before":
                continue
            if not isinstance(output, Tensor):
                raise StateError(f"adapter_names: the output of a {type(host).__name__} is no tensor, so it has no rows")
            output = _spread(output, rows)
            where = rows.of(key, output.shape[0], output.device)
            if part.when == "instead":
                given = [_rows_of(value, where, rows) for value in (*args, *kwargs.values())]
                new = part(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
            else:
                x = _rows_of(_first_input(args, kwargs), where, rows)
                new = part(x, output.index_select(0, where), *((host,) if part.reads_base else ()))
            output = output.index_copy(0, where, new)
        return output


def fold(base: Mapping[str, Tensor], parts: list[Part]) -> dict[str, Tensor]:
    """The tensors of one module that ``parts`` change, with all of them folded in.

    What acts on the module's input acts on its columns, and so comes after everything that adds to its weight.

    Args:
        base: the module's tensors, as `grafts.weights.read` gives them.
        parts: in the order in which they act.
    """
    changed: dict[str, Tensor] = {}
    for part in sorted(parts, key=lambda part: part.when == "before"):
        changed.update(part.merged({**base, **changed}, base))
    return changed


def _swap(host: nn.Module, name: str, tensor: Tensor) -> nn.Parameter:
    """Let a module compute with ``tensor`` in place of a parameter; returns the parameter."""
    path, _, leaf = name.rpartition(".")
    owner = host.get_submodule(path)
    before = owner._parameters[leaf]
    assert before is not None
    owner._parameters[leaf] = cast(nn.Parameter, tensor)
    return before


def _spread(x: Tensor, rows: Rows) -> Tensor:
    """``x`` with one row for each of the batch where it has one for all (positions)."""
    return x.expand(len(rows.names), *x.shape[1:]) if x.shape[0] == 1 else x


def _rows_of(value: Any, where: Tensor, rows: Rows) -> Any:
    """The chosen rows of a module's argument, if it is a tensor that has them."""
    return _spread(value, rows).index_select(0, where.to(value.device)) if isinstance(value, Tensor) and value.dim() else value


def _is_fresh(host: nn.Module, output: Any) -> bool:
    """Whether the host's output is memory that nobody else can hold: not a hook, not the graph of the backward pass.

    That is so where the host is known to do one product or one look-up with a plain weight and nothing stands between it
    and the site. There a part may add into the output, which saves a pass over it and its memory once more.
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


def _with_first_input(args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}


def site_of(host: nn.Module) -> ModuleSite | None:
    """The site at ``host``, or None."""
    site = host._modules.get(CHILD)
    return site if isinstance(site, ModuleSite) else None


def sites_in(root: nn.Module) -> Iterator[tuple[nn.Module, ModuleSite]]:
    """Every module below and including ``root`` that has a site, with its site."""
    for _, host in own_modules(root):
        if (site := site_of(host)) is not None:
            yield host, site
