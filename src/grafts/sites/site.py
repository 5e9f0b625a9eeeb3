"""What all sites have in common: the parts of adapters at one module, as its children, and which of them run.

There are three kinds of site, one file each: beside a module, inside attention, and in front of a model's
input. A site is registered as a child of the module that it serves, under the name of its kind, and driven by
PyTorch's hooks. The module's class, its own parameters and its ``forward`` stay untouched.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.errors import ConfigError, MergeError, StateError
from grafts.modules.tree import SITE_NAMES, base_modules
from grafts.sites.setup import Rows, Setup, child_key


class Part(nn.Module):
    """What one adapter holds at one site. Each kind of site has a subclass that says what it computes there.

    The policy on number formats, which every part keeps: tensors are stored in float32 (float64 beside a
    float64 base), computed with in the format of the activations, and the output keeps the format that the
    base gave it.

    Attributes:
        site: the kind of site that it stands at.
        routable: it can act on some rows of a batch only.
    """

    site: ClassVar[type[Site]]
    routable: bool = True

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint holds, by their name after the module's path.

        Those of a part that was just made share memory with it: writing into them loads it.
        """
        return dict(self.named_parameters())

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The module's tensors with this part folded in; differentiable with respect to the part.

        Args:
            tensors: the module's parameters by name, as other parts have left them, at least float32, the
                weight of a linear as ``(out_features, in_features)``.
            base: the same as they are in the base.

        Returns:
            The changed ones, as new tensors; the given ones are not written to.

        Raises:
            MergeError: this part has no exact merge.
        """
        raise MergeError(f"a {type(self).__name__} has no exact merge")

    def components(self) -> Mapping[str, Part]:
        """The parts that this one is made of, by the prefix of their file names; most are of one piece,
        themselves.
        """
        return {"": self}

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Take what the part needs from the base's weights; called once, when it has got its place and its
        tensors.

        Args:
            host: the base module.
            fresh: the adapter is new, and not read from a file: tensors that start from the base's are to be
                set as well.

        Raises:
            MergeError: the weights cannot be read.
        """

    def check_reservable(self, rank: int) -> None:
        """Refuse a `reserve` that cannot be; most parts have one size.

        Raises:
            ConfigError: the rank is not above 0, or below what is there.
        """

    def reserve(self, rank: int) -> None:
        """Make room for values of another rank, up to this one, in tensors that stay where they are."""

    def check_capacity(self, other: Part) -> None:
        """Refuse a `copy_from` that cannot be.

        Raises:
            ConfigError: the other part's tensors are of other sizes.
        """
        mine, theirs = _shapes(self), _shapes(other)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ConfigError(f"its {name} is {mine.get(name)} here and {theirs.get(name)} there")

    def copy_from(self, other: Part) -> None:
        """Take the values of a part that was made for the same place, into the tensors that are there.

        Args:
            other: a part for which `check_capacity` holds.
        """
        values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            tensor.copy_(values[name])

    def tied(self, host: nn.Module) -> Part:
        """A part with the same parameters, beside a module whose weight is the same tensor as this one's
        module's.

        Args:
            host: the other module.

        Raises:
            ConfigError: the two modules use the weight in ways that one adapter cannot serve.
        """
        raise NotImplementedError(f"a {type(self).__name__} cannot follow a tied weight")


P = TypeVar("P", bound=Part)


def _shapes(part: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in (*part.named_parameters(), *part.named_buffers())}


class Site(nn.Module, abc.ABC):
    """All adapters of one kind at one module; their parts are its children.

    A part is called by its adapter's key (see `child_key`), further parts of the same adapter by key and
    number.

    Attributes:
        child: the name of a site of this kind among the children of its module.
        setup: the model's shared setup.
        children_of: adapter key -> the names of the adapter's parts here, in the order in which they act.
    """

    child: ClassVar[str]
    _handles: tuple[RemovableHandle, ...] = ()

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.children_of: dict[str, tuple[str, ...]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Check that the name under which a site of this kind stands is known to those who walk over a base
        model.
        """
        super().__init_subclass__(**options)
        assert cls.child in SITE_NAMES, cls.child

    def parts(self, name: str) -> list[Part]:
        """The parts of adapter ``name`` at this site; empty where it has none."""
        return self._parts((child_key(name),))

    def acts(self) -> bool:
        """Whether some adapter may act here now."""
        keys = self.setup.running if self.setup.rows is None else self.setup.rows.keys
        return any(key in self.children_of for key in keys)

    def running(self) -> list[Part]:
        """The parts that act now, in order."""
        return self._parts(self.setup.running)

    def _parts(self, keys: Iterable[str]) -> list[Part]:
        modules, children = self._modules, self.children_of
        return [cast("Part", modules[name]) for key in keys if key in children for name in children[key]]

    def routed(self, rows: Rows) -> list[tuple[str, Part]]:
        """The parts that the rows of this call have asked for, with the key of their adapter.

        Raises:
            StateError: one of them acts on all rows of a batch at once.
        """
        routed = [(key, part) for key in rows.keys for part in self._parts((key,))]
        for _, part in routed:
            if not part.routable:
                raise StateError(
                    f"adapter_names: a {type(part).__name__} acts on all rows of a batch at once"
                )
        return routed

    def append(self, name: str, part: Part, host: nn.Module) -> None:
        """Add a part to those of adapter ``name``; parts act in the order of adding."""
        key = child_key(name)
        others = self.children_of.get(key, ())
        child = f"{key}+{len(others)}" if others else key
        self._modules[child] = part
        self.children_of[key] = (*others, child)

    def remove(self, name: str) -> None:
        """Forget the parts of adapter ``name``."""
        for child in self.children_of.pop(child_key(name), ()):
            del self._modules[child]

    def attach(self, host: nn.Module) -> None:
        """Become a child of ``host`` and hook its calls."""
        host.add_module(self.child, self)
        self._handles = self.hooks(host)

    @abc.abstractmethod
    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Hook the calls of ``host``."""

    def detach(self, host: nn.Module) -> None:
        """The exact inverse of `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        delattr(host, self.child)


def site_of(host: nn.Module, kind: type[Site]) -> Site | None:
    """The site of that kind at ``host``, or None."""
    site = host._modules.get(kind.child)
    return site if isinstance(site, kind) else None


def sites_at(host: nn.Module) -> Iterator[Site]:
    """The sites of all kinds at ``host``."""
    for child in SITE_NAMES:
        if isinstance(site := host._modules.get(child), Site):
            yield site


def sites_in(root: nn.Module) -> Iterator[tuple[nn.Module, Site]]:
    """Every site below and at ``root``, with its module."""
    for _, host in base_modules(root):
        for site in sites_at(host):
            yield host, site
