"""What all sites have in common: the parts of adapters at one module, as its children, and which of them run.

There are three kinds of site, one file each: beside a module, inside attention, and in front of a stack's
input. A site is registered as a child of the module that it serves, its host, under the name of its kind, and
driven by PyTorch's hooks. The host's class, its own parameters and its ``forward`` stay untouched.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.errors import ConfigError, MergeError, StateError
from grafts.modules.tree import SITE_NAMES, base_modules
from grafts.sites.setup import Rows, Setup, child_key

N = TypeVar("N", bound=nn.Module)


class Reference(Generic[N]):
    """A module that a part works with and does not own: another part of its adapter, or a module of the base.

    A module that is assigned to an attribute of another one becomes its child, and its tensors the other's.
    Behind a reference it does not; copies and pickles of the model follow it all the same.

    Attributes:
        module: what is referred to.
    """

    def __init__(self, module: N) -> None:
        self.module = module


class Part(nn.Module):
    """What one adapter holds at one site. Each kind of site has a subclass that says what it computes there.

    The policy on number formats, which every part keeps: tensors are stored in float32 (float64 beside a
    float64 base), computed with in the format of the activations, and the output keeps the format that the
    base gave it.

    Attributes:
        site: the kind of site that it stands at.
        routable: it can act on some rows of a batch only.
        frozen: the names of its parameters that are never trained (a projection that is made from a seed).
        own_dtypes: the names of its parameters and buffers that stay in the format in which the method made
            them.
    """

    site: ClassVar[type[Site]]
    routable: bool = True
    frozen: ClassVar[frozenset[str]] = frozenset()
    own_dtypes: ClassVar[frozenset[str]] = frozenset()

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The tensors that a checkpoint holds, by their name after the module's path.

        Those of a part that was just made share memory with it: writing into them loads it. A tensor that
        several parts of an adapter share belongs to one of them, and is here only there.
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
        """The parts that this one is made of, by the prefix of their file names; most are only themselves."""
        return {"": self}

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Take what the part needs from the base's weights; called once, when it has got its tensors.

        Args:
            host: the base module.
            fresh: the adapter is new, and not read from a file: tensors that start from the base's are to be
                set as well.

        Raises:
            MergeError: the weights cannot be read.
        """

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Find the other parts that this one works with; called once, when all are in their places.

        What several parts share belongs to one of them, and the others refer to it (`Reference`). It must not
        fail: what cannot be has to be refused when parts are made, or by the method's ``check``.

        Args:
            parts: those of the same adapter that its method has made, by path, in order; this one among them.
        """

    def set_trainable(self, trainable: bool) -> None:
        """Let the parameters get gradients, but for those that are frozen, or let none.

        Args:
            trainable: whether they are to get any.
        """
        # Most parts have nothing frozen, and PyTorch's own way is the fastest.
        if not self.frozen:
            self.requires_grad_(trainable)
            return
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trainable and name not in self.frozen)

    def store_in(self, dtype: torch.dtype) -> None:
        """Store the tensors in ``dtype``, but for those that keep their own.

        Args:
            dtype: float32, as methods make them, or float64 beside a base of that format.
        """
        if dtype == torch.float32:
            return
        if not self.own_dtypes:
            self.to(dtype=dtype)
            return
        # In place, so that a tensor that stands under two names stays one.
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if tensor.is_floating_point() and name not in self.own_dtypes:
                tensor.data = tensor.data.to(dtype)

    def check_capacity(self, other: Part) -> None:
        """Refuse a `copy_from` that cannot be.

        Args:
            other: the part whose values are to come here.

        Raises:
            ConfigError: its tensors are of other sizes, or there are others.
        """
        ours, theirs = _shapes(self), _shapes(other)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise ConfigError(f"its {name} is {ours.get(name)} here and {theirs.get(name)} there")

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
        host's.

        Args:
            host: the other module.

        Raises:
            ConfigError: the two modules use the weight in ways that one adapter cannot serve.
        """
        raise NotImplementedError(f"a {type(self).__name__} cannot follow a tied weight")


class RankedPart(Part):
    """A part with a rank, for which tensors can be made larger than it needs, so that others may take its
    place.
    """

    def check_reservable(self, rank: int) -> None:
        """Refuse a `reserve_rank` that cannot be.

        Raises:
            ConfigError: the rank is not above 0, or below what is there.
        """
        raise NotImplementedError

    def reserve_rank(self, rank: int) -> None:
        """Make the tensors large enough for parts of another rank, up to this one; the values stay."""
        raise NotImplementedError


P = TypeVar("P", bound=Part)


def _shapes(part: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's parameters and buffers by name."""
    shapes = {}
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        shapes[name] = tuple(tensor.shape)
    return shapes


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
        """The parts of adapter ``name`` at this site, in the order of adding; empty where it has none."""
        return self._parts((child_key(name),))

    def acts(self) -> bool:
        """Whether some adapter acts here on some row of this call; costs nothing where none stands here."""
        return any(key in self.children_of for key in self._keys())

    def running(self) -> list[Part]:
        """The parts of the active adapters, in the order in which they act; where rows choose, see
        `routed`.
        """
        return self._parts(self.setup.running)

    def acting(self) -> list[Part]:
        """The parts that act on some row of this call: those of the adapters that rows have chosen, else of
        the active ones.
        """
        return self._parts(self._keys())

    def _keys(self) -> tuple[str, ...]:
        """The keys of the adapters that act on some row of this call."""
        if self.setup.rows is None:
            return self.setup.running
        return self.setup.rows.keys

    def _parts(self, keys: Iterable[str]) -> list[Part]:
        """The parts of the adapters with these keys, in order."""
        parts = []
        for key in keys:
            for child in self.children_of.get(key, ()):
                parts.append(cast("Part", self._modules[child]))
        return parts

    def routed(self, rows: Rows) -> list[tuple[str, Part]]:
        """The parts that the rows of this call have asked for, with the key of their adapter.

        Raises:
            StateError: one of them acts on all rows of a batch at once.
        """
        routed = []
        for key in rows.keys:
            for part in self._parts((key,)):
                if not part.routable:
                    raise StateError(
                        f"adapter_names: a {type(part).__name__} acts on all rows of a batch at once"
                    )
                routed.append((key, part))
        return routed

    def append(self, name: str, part: Part, host: nn.Module) -> None:
        """Add a part to those of adapter ``name``; parts act in the order of adding.

        Args:
            name: the adapter's; an adapter may have several parts at one site (a union).
            part: of this site's kind.
            host: the module that the site serves.
        """
        # Not by `add_module`, which would refuse a key that is an attribute of modules.
        key = child_key(name)
        others = self.children_of.get(key, ())
        child = f"{key}+{len(others)}" if others else key
        self._modules[child] = part
        self.children_of[key] = (*others, child)

    def remove(self, name: str) -> None:
        """Forget the parts of adapter ``name``; nothing where it has none."""
        for child in self.children_of.pop(child_key(name), ()):
            del self._modules[child]

    def attach(self, host: nn.Module) -> None:
        """Become a child of ``host`` and hook its calls; from then on its parts are among the model's modules
        and parameters.
        """
        host.add_module(self.child, self)
        self._handles = self.hooks(host)

    @abc.abstractmethod
    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Hook the calls of ``host``; what is returned is removed by `detach`."""

    def detach(self, host: nn.Module) -> None:
        """The exact inverse of `attach`: no child, no hook and no attribute stays at ``host``."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        delattr(host, self.child)


def site_of(host: nn.Module, kind: type[Site]) -> Site | None:
    """The site of that kind at ``host``, or None where no adapter has a part of that kind there."""
    site = host._modules.get(kind.child)
    if isinstance(site, kind):
        return site
    return None


def sites_at(host: nn.Module) -> Iterator[Site]:
    """The sites of all kinds at ``host``, at most one of each kind."""
    for child in SITE_NAMES:
        site = host._modules.get(child)
        if isinstance(site, Site):
            yield site


def sites_in(root: nn.Module) -> Iterator[tuple[nn.Module, Site]]:
    """Every site below and at ``root``, with the module that it serves; each once, in the order of the
    modules.
    """
    for _, host in base_modules(root):
        for site in sites_at(host):
            yield host, site
