"""The module site: adapters beside one module, driven by PyTorch's forward hooks.

A site is registered as a child of the module that it serves, under the name `CHILD`. It holds the parts of every adapter
that targets this module and runs those that the shared setup names. The module's class, its own parameters and its
``forward`` stay untouched, so quantized, sharded or offloaded modules are served like any other.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.composition import Setup, child_key

CHILD = "grafts"


class Part(nn.Module, abc.ABC):
    """What one adapter holds and computes at one module site.

    A method writes a subclass: its tensors as parameters, its math as ``forward``, whose arguments depend on `when`:

    - ``"before"``: ``forward(x)`` returns the module's new input;
    - ``"after"``: ``forward(x, y)`` returns the module's new output, ``y`` being the output so far;
    - ``"instead"``: ``forward(*args, **kwargs)`` takes the module's own arguments and returns its new output.

    The policy on number formats, which every part keeps: tensors are stored in float32 (float64 beside a float64 base),
    computed with in the format of the activations, and the output keeps the format that the base gave it.
    """

    when: Literal["before", "after", "instead"] = "after"

    def forward_(self, x: Tensor, y: Tensor) -> Tensor:
        """``forward`` of a part that acts after the module, free to write into ``y``, which nobody else holds."""
        return cast(Tensor, self(x, y))

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint holds, by their name after the module's path.

        The values share memory with the part: copying into them loads it.
        """
        return dict(self.named_parameters())

    @abc.abstractmethod
    def merged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The base module's tensors with this part folded in.

        Args:
            tensors: the module's parameters by name, at least float32, weights as ``(out_features, in_features)``.

        Returns:
            The changed ones, as new tensors; the given ones are not written to.

        Raises:
            MergeError: this part has no exact merge.
        """


class PartList(nn.ModuleList):
    """The parts of one adapter at one site, in the order in which they act."""

    def __iter__(self) -> Iterator[Part]:
        return cast(Iterator[Part], super().__iter__())


class ModuleSite(nn.Module):
    """All adapters at one module.

    Attributes:
        setup: the model's shared setup.
        adapters: adapter key (see `child_key`) -> the adapter's parts here.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.adapters = nn.ModuleDict()
        self._handles: list[RemovableHandle] = []

    def parts(self, name: str) -> PartList | tuple[()]:
        """The parts of adapter ``name`` at this site; empty where it has none."""
        key = child_key(name)
        return cast(PartList, self.adapters[key]) if key in self.adapters else ()

    def running(self) -> list[Part]:
        """The parts that act now, in order."""
        adapters = self.adapters
        return [part for key in self.setup.running if key in adapters for part in cast(PartList, adapters[key])]

    def append(self, name: str, part: Part) -> None:
        """Add a part to those of adapter ``name``; parts act in the order of adding."""
        key = child_key(name)
        if key not in self.adapters:
            self.adapters[key] = PartList()
        cast(PartList, self.adapters[key]).append(part)

    def remove(self, name: str) -> None:
        """Forget the parts of adapter ``name``."""
        del self.adapters[child_key(name)]

    def attach(self, host: nn.Module) -> None:
        """Become a child of ``host`` and hook its calls."""
        host.add_module(CHILD, self)
        self._handles = [
            host.register_forward_pre_hook(self._before, with_kwargs=True),
            host.register_forward_hook(self._after, with_kwargs=True),
        ]

    def detach(self, host: nn.Module) -> None:
        """The exact inverse of `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        delattr(host, CHILD)

    def _before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        changed = False
        for part in self.running():
            if part.when == "before":
                args, kwargs = _with_first_input(args, kwargs, part(_first_input(args, kwargs)))
                changed = True
        return (args, kwargs) if changed else None

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        parts = self.running()
        owned = bool(parts) and _is_fresh(host, output)
        for part in parts:
            if part.when == "after":
                x = _first_input(args, kwargs)
                output = part.forward_(x, output) if owned else part(x, output)
            elif part.when == "instead":
                output = part(*args, **kwargs)
        return output


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
    for host in list(root.modules()):
        if (site := site_of(host)) is not None:
            yield host, site
