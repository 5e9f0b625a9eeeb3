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
        active: the names of the adapters that were active before the merge.
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
        root_hooks: what hooks the model's own calls.
        requires_grad: what each base parameter's ``requires_grad`` was before the first adapter came.
        merge: what was merged, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.setup = RegisteredSetup(self)
        self.plans: dict[str, Plan] = {}
        self.parts: dict[str, list[tuple[str, Part]]] = {}
        self.trained: tuple[str, ...] = ()
        self.trainees: set[str] = set()
        self.root_hooks = RootCallHooks(self.setup, self.choose_rows, self.trains)
        self.requires_grad: dict[str, bool] = {}
        for name, parameter in base_parameters(model).items():
            self.requires_grad[name] = parameter.requires_grad
        self.merge: Merge | None = None
        # Why rows cannot choose an adapter, by its name; worked out once for each.
        self._unroutable: dict[str, str | None] = {}

    def require(self, name: str) -> Plan:
        """The plan of an adapter that is there.

        Args:
            name: the adapter's.

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
        parts = {}
        for target, (path, part) in zip(self.plans[name].targets, self.parts[name], strict=True):
            if target.is_own and target.member == member:
                parts[path] = part
        return parts

    def forget(self, name: str) -> list[tuple[str, Part]]:
        """Take an adapter out of the account; the model itself is not touched.

        Args:
            name: the adapter's.

        Returns:
            The path and the part of each of its targets.
        """
        self.setup.set(active=tuple(other for other in self.setup.active if other != name))
        del self.plans[name]
        self._unroutable.pop(name, None)
        self.trainees.discard(name)
        return self.parts.pop(name)

    def trains(self, model: nn.Module) -> bool:
        """Whether something trainable acts in the present call: an adapter, or of the base what was thawed by
        hand.

        Args:
            model: the model that is called.
        """
        acting: set[str | None] = set(self.setup.active)
        if self.setup.rows is not None:
            acting = set(self.setup.rows.names)
        # The cheapest question first: it is asked in every step of a training.
        if not acting.isdisjoint(self.trained):
            return True
        if is_trainable_base(model):
            return True
        for name in acting & self.parts.keys():
            if any(is_trainable(part) for _, part in self.parts[str(name)]):
                return True
        return False

    def unroutable(self, name: str) -> str | None:
        """Why rows cannot choose adapter ``name``, as the end of a sentence that begins with it; None where
        they can.

        Args:
            name: the adapter's.

        Raises:
            AdapterNameError: there is none of that name.
        """
        plan = self.require(name)
        if name not in self._unroutable:
            self._unroutable[name] = _why_unroutable(plan)
        return self._unroutable[name]

    def choose_rows(self, names: Sequence[str | None]) -> Rows:
        """Which adapter each row of a batch wants, checked.

        Args:
            names: one for each row; None for the bare base.

        Raises:
            AdapterNameError: a name is unknown.
            StateError: adapters are merged, or a method cannot act on some rows only.
        """
        are_names = all(name is None or isinstance(name, str) for name in names)
        if isinstance(names, str) or not are_names:
            raise AdapterNameError(f"adapter_names is a list with a name or None for each row, not {names!r}")
        for name in dict.fromkeys(names):
            reason = None if name is None else self.unroutable(name)
            if reason is not None:
                raise StateError(f"adapter_names: {name!r} {reason}")
        self.require_unmerged("choose adapters by row")
        return Rows(names)

    def require_unmerged(self, verb: str) -> None:
        """Refuse what cannot be done while adapters are merged.

        Args:
            verb: what was asked for, as it stands behind "cannot".

        Raises:
            StateError: naming them and the way out.
        """
        if self.merge is not None:
            raise StateError(
                f"cannot {verb} while {list(self.setup.merged)} is merged: call grafts.unmerge(model) first"
            )


def is_trainable(part: nn.Module) -> bool:
    """Whether some parameter of a part gets gradients; false for a part without parameters, which only serves
    others.
    """
    return any(parameter.requires_grad for parameter in part.parameters())


def is_trainable_base(model: nn.Module) -> bool:
    """Whether some parameter of the base gets gradients, which somebody has thawed by hand: attaching freezes
    all of them.
    """
    return any(parameter.requires_grad for parameter in base_parameters(model).values())


def _why_unroutable(plan: Plan) -> str | None:
    """Why rows cannot choose an adapter of this plan, or None."""
    for single in plan.single_plans:
        if not single.method.routable:
            return f"is {single.method.title}, which acts on all rows of a batch at once"
    for target in plan.targets:
        if loses_rows(target.path, target.role):
            return f"has a part at {target.path!r}, whose input has no rows of the batch"
    return None


class RegisteredSetup(Setup):
    """The setup of one model, with the way from a site to the model's registry."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.registry = registry


# The registries of the models that were asked for; that of a copy of a model is found through its sites.
registries: WeakKeyDictionary[nn.Module, Registry] = WeakKeyDictionary()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside the wrappers that `torch.compile` and `DistributedDataParallel` put around it,
    any number of them.
    """
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

    Raises:
        StateError: adapters were added to a part of the model, or to a model around it.
    """
    if model in registries:
        return registries[model]
    setup: Setup | None = None
    for _, site in sites_in(model):
        setup = site.setup
        break
    if not isinstance(setup, RegisteredSetup):
        return None
    registry = setup.registry
    for plan in registry.plans.values():
        if not all(_has_site(model, target.path) for target in plan.targets):
            raise StateError(
                f"this {type(model).__name__} is not the module that adapters were added to, but a part or "
                "an owner of it: call the verbs on that module"
            )
    registries[model] = registry
    return registry


def _has_site(model: nn.Module, path: str) -> bool:
    """Whether there is a module at that path, and a site at it."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return next(sites_at(module), None) is not None


def registry_of(model: nn.Module) -> Registry:
    """The registry of ``model``, for verbs that need one.

    Args:
        model: the model itself, without wrappers.

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
    """The path and the part of each target of adapter ``name``, in the order of its plan.

    Raises:
        AdapterNameError: there is none of that name.
        StateError: nothing is attached.
    """
    registry = registry_of(model)
    registry.require(name)
    return registry.parts[name]
