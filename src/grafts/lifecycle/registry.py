"""The account of one model: which adapters it carries, which act, which are trained, what was merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from grafts.errors import AdapterNameError, StateError, did_you_mean
from grafts.lifecycle.plan import Plan
from grafts.modules.tree import base_parameters
from grafts.sites.root_call import RootCallHooks
from grafts.sites.setup import Rows, Setup
from grafts.sites.site import Part, sites_at, sites_in
from grafts.structure.roles import loses_rows

M = TypeVar("M", bound=nn.Module)
Undo = Callable[[nn.Module], None]


@dataclass
class Merge:
    """What a merge has done, so that it can be undone.

    Attributes:
        undo: one step per changed tensor; each takes the model.
        active: the setup before the merge.
    """

    undo: list[Undo]
    active: tuple[str, ...]


class Registry:
    """What one model carries. All its sites point to it through their setup, so copies of the model have
    their own.

    Attributes:
        setup: which adapters run.
        plans: adapter name -> the plan that was applied, in the order of adding.
        parts: adapter name -> the path and the part of each of its targets, in the order of the plan.
        trained: names of the adapters that were thawed last.
        trainees: names of the adapters that were ever set to train, and not only loaded to be used.
        calls: what hooks the model's own calls.
        requires_grad: what each base parameter's ``requires_grad`` was before the first adapter came.
        merge: what was merged, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.setup = RegisteredSetup(self)
        self.plans: dict[str, Plan] = {}
        self.parts: dict[str, list[tuple[str, Part]]] = {}
        self.trained: tuple[str, ...] = ()
        self.trainees: set[str] = set()
        self._unroutable: dict[str, str | None] = {}
        self.root_hooks = RootCallHooks(self.setup, self.choose_rows, self.trains)
        self.requires_grad = {name: p.requires_grad for name, p in base_parameters(model).items()}
        self.merge: Merge | None = None

    def require(self, name: str) -> Plan:
        """The plan of an adapter.

        Raises:
            AdapterNameError: there is none of that name; names the nearest.
        """
        if name not in self.plans:
            raise AdapterNameError(f"no adapter is called {name!r}; {did_you_mean(str(name), self.plans)}")
        return self.plans[name]

    def own_parts(self, name: str, member: int = 0) -> dict[str, Part]:
        """The parts of adapter ``name`` that its method has made, by path; not copies, biases and tokens.

        Args:
            name: the adapter's.
            member: which of those that it is made of, where it is a union.
        """
        made = self.plans[name]
        own = made.each()[member].method.name
        placed = [x for x in zip(made.targets, self.parts[name], strict=True) if x[0].member == member]
        return {
            path: part for target, (path, part) in placed if target.kind == own and target.tied_to is None
        }

    def trains(self, model: nn.Module) -> bool:
        """Whether something trainable acts in the present call: an adapter, or of the base what was thawed by
        hand.
        """
        rows = self.setup.rows
        acting = self.setup.active if rows is None else tuple(name for name in rows.names if name is not None)
        if any(name in acting for name in self.trained):
            return True
        parts = [part for name in acting for _, part in self.parts.get(name, ())]
        tensors = [*base_parameters(model).values(), *(p for part in parts for p in part.parameters())]
        return any(tensor.requires_grad for tensor in tensors)

    def unroutable(self, name: str) -> str | None:
        """Why rows cannot choose adapter ``name``, or None."""
        made = self.require(name)
        if name not in self._unroutable:
            mixed = [t.path for t in made.targets if loses_rows(t.path, t.role)]
            whole = [one.method.title for one in made.each() if not one.method.routable]
            self._unroutable[name] = (
                f"is {whole[0]}, which acts on all rows of a batch at once"
                if whole
                else f"has a part at {mixed[0]!r}, whose input has no rows of the batch"
                if mixed
                else None
            )
        return self._unroutable[name]

    def choose_rows(self, names: Sequence[str | None]) -> Rows:
        """Which adapter each row of a batch wants, checked.

        Raises:
            AdapterNameError: a name is unknown.
            StateError: adapters are merged, or a method cannot act on some rows only.
        """
        if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
            raise AdapterNameError(f"adapter_names is a list with a name or None for each row, not {names!r}")
        for name in dict.fromkeys(names):
            if name is not None and (reason := self.unroutable(name)):
                raise StateError(f"adapter_names: {name!r} {reason}")
        self.require_unmerged("choose adapters by row")
        return Rows(names)

    def require_unmerged(self, verb: str) -> None:
        """Refuse ``verb`` while adapters are merged.

        Raises:
            StateError: naming them and the way out.
        """
        if self.merge is not None:
            raise StateError(
                f"cannot {verb} while {list(self.setup.merged)} is merged: call grafts.unmerge(model) first"
            )


class RegisteredSetup(Setup):
    """The setup of one model, with the way from a site to the model's registry."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.registry = registry


_known: WeakKeyDictionary[nn.Module, Registry] = WeakKeyDictionary()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside a `torch.compile` or `DistributedDataParallel` wrapper."""
    while True:
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        else:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def find_registry(model: nn.Module) -> Registry | None:
    """The registry of ``model``, or None where nothing is attached; after the first look one dictionary
    access.
    """
    if model in _known:
        return _known[model]
    found = next((site.setup for _, site in sites_in(model)), None)
    if not isinstance(found, RegisteredSetup):
        return None
    registry = found.registry
    paths = {target.path for applied in registry.plans.values() for target in applied.targets}
    if any(not _has_site(model, path) for path in paths):
        raise StateError(
            f"this {type(model).__name__} is not the module that adapters were added to, but a part or an "
            "owner of it: call the verbs on that module"
        )
    _known[model] = registry
    return registry


def _has_site(model: nn.Module, path: str) -> bool:
    try:
        return next(sites_at(model.get_submodule(path)), None) is not None
    except AttributeError:
        return False


def registry_of(model: nn.Module) -> Registry:
    """The registry of ``model``.

    Raises:
        StateError: nothing is attached.
    """
    registry = find_registry(model)
    if registry is None:
        raise StateError(
            f"this {type(model).__name__} has no adapters: grafts.add(model, config) attaches one"
        )
    return registry


def parts_of(model: nn.Module, name: str) -> list[tuple[str, Part]]:
    """The path and the part of each target of adapter ``name``, in the order of its plan."""
    registry = registry_of(model)
    registry.require(name)
    return registry.parts[name]
