"""The adapters of one model: what is attached, active and trainable. Every face and the command line delegate to here."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grafts.composition import Rows, Setup
from grafts.config import AdapterConfig
from grafts.config_strings import config_from
from grafts.errors import AdapterNameError, ConfigError, GraftsError, StateError, did_you_mean
from grafts.interface import AdapterModelInterface
from grafts.planning import Key, Plan, Target, resolve
from grafts.roles import Anatomy, loses_rows
from grafts.sharding import require_shared
from grafts.sites.calls import Calls
from grafts.sites.site import Part, site_of, sites_at, sites_in
from grafts.weights import home, own_modules, own_parameters

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
    """What one model carries. All its sites point to it through their setup, so copies of the model have their own.

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
        self.calls = Calls(self.setup, self.choose_rows, self.trains)
        self.requires_grad = {name: p.requires_grad for name, p in own_parameters(model).items()}
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
        return {path: part for target, (path, part) in placed if target.kind == own and target.tied_to is None}

    def trains(self, model: nn.Module) -> bool:
        """Whether something trainable acts in the present call: an adapter, or of the base what was thawed by hand."""
        rows = self.setup.rows
        acting = self.setup.active if rows is None else tuple(name for name in rows.names if name is not None)
        if any(name in acting for name in self.trained):
            return True
        parts = [part for name in acting for _, part in self.parts.get(name, ())]
        tensors = [*own_parameters(model).values(), *(p for part in parts for p in part.parameters())]
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
            raise StateError(f"cannot {verb} while {list(self.setup.merged)} is merged: call grafts.unmerge(model) first")


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
    """The registry of ``model``, or None where nothing is attached; after the first look one dictionary access."""
    if model in _known:
        return _known[model]
    found = next((site.setup for _, site in sites_in(model)), None)
    if not isinstance(found, RegisteredSetup):
        return None
    registry = found.registry
    paths = {target.path for applied in registry.plans.values() for target in applied.targets}
    if any(not _has_site(model, path) for path in paths):
        raise StateError(
            f"this {type(model).__name__} is not the module that adapters were added to, but a part or an owner of it: "
            "call the verbs on that module"
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
        raise StateError(f"this {type(model).__name__} has no adapters: grafts.add(model, config) attaches one")
    return registry


def parts_of(model: nn.Module, name: str) -> list[tuple[str, Part]]:
    """The path and the part of each target of adapter ``name``, in the order of its plan."""
    registry = registry_of(model)
    registry.require(name)
    return registry.parts[name]


def add(
    model: M,
    config: AdapterConfig | str,
    *,
    name: str = "default",
    activate: bool = True,
    train: bool = True,
    interface: AdapterModelInterface | None = None,
) -> M:
    """Put a new adapter on ``model``, in place.

    Args:
        model: any module; its class, its own parameter names and tensors stay what they are.
        config: what to add; or a text, as `grafts.config_from` takes it.
        interface: what the model's modules are; where a method needs to know and it is not given, it is worked out.
        name: what to call it.
        activate: make it the active adapter; False leaves the setup as it is.
        train: make it the only trainable thing in the model; False leaves it frozen.

    Returns:
        The same model. Base parameters are frozen until `detach`.

    Raises:
        ConfigError: the config does not fit the model; nothing was touched.
        AdapterNameError: the name is taken.
        StateError: adapters are merged.
    """
    inner = unwrapped(model)
    made = prepare_plan(inner, config_from(config), name=name, interface=interface)
    return attach_parts(model, name, made, build_parts(inner, made, name), activate=activate, train=train)


def prepare_plan(
    model: nn.Module,
    config: AdapterConfig,
    *,
    name: str,
    lenient: bool = False,
    replaced: Sequence[str] = (),
    body: Anatomy | None = None,
    blanks: dict[Key, Part] | None = None,
    interface: AdapterModelInterface | None = None,
) -> Plan:
    """The plan of an adapter that could be added under this name now; the arguments are those of `resolve`."""
    registry = find_registry(model)
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"an adapter's name is a string that is not empty, not {name!r}")
    if registry is not None:
        registry.require_unmerged(f"add {name!r}")
        if name in registry.plans:
            raise AdapterNameError(f"an adapter is called {name!r} already: grafts.delete(model, {name!r}) removes it")
    try:
        return resolve(model, config, lenient=lenient, replaced=replaced, body=body, blanks=blanks, interface=interface)
    except ConfigError as error:
        raise type(error)(f"adapter {name!r}: {error}") from error


def build_parts(
    model: nn.Module,
    made: Plan,
    name: str,
    tensors: Mapping[str, Tensor] | None = None,
    blanks: Mapping[Key, Part] | None = None,
) -> list[tuple[str, Part]]:
    """The parts of a plan by path, in its order.

    Args:
        model: the base model.
        made: the plan.
        name: the adapter's name, for messages.
        tensors: values by path and file name, whose names and shapes are those of the plan, those of a union's members with
            their number before the path; without them the adapter is new.
        blanks: parts without memory that planning has made already, to be filled with these values.
    """
    built: dict[Key, Part] = {}
    own = [one.method.name for one in made.each()]
    modules = dict(own_modules(model))
    for target in sorted(made.targets, key=lambda target: target.tied_to is not None):
        host = modules[target.path]
        try:
            if target.tied_to is not None:
                part = built[target.tied_to, target.kind, target.member].tied(host)
            else:
                part = build_part(target, host, tensors, blanks, f"{target.member}." if made.members else "")
            part.from_base(host, fresh=tensors is None)
        except GraftsError as error:
            raise type(error)(f"adapter {name!r}: {target.path!r}: {error}") from error
        if not host.training:
            part.eval()
        if tensors is None or target.kind != own[target.member]:
            part.requires_grad_(False)  # those of a file are so already
        built[target.key] = part
    return [(target.path, built[target.key]) for target in made.targets]


def build_part(
    target: Target,
    host: nn.Module,
    tensors: Mapping[str, Tensor] | None,
    blanks: Mapping[Key, Part] | None = None,
    prefix: str = "",
) -> Part:
    """The part for one target, on its module's device; ``prefix`` stands before the paths of its tensors."""
    device = home(host)[0]
    if tensors is None:
        with torch.device(device):
            return target.build(host)
    part = (blanks or {}).get(target.key)
    if part is None:
        with torch.device("meta"):
            part = target.build(host)
    prefix += f"{target.path}." if target.path else ""
    with torch.no_grad():
        _fill(part, {name: tensors[prefix + name] for name in target.tensors}, device)
    return part


def _fill(part: Part, values: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a part the tensors of a file; those that have no memory yet get it now."""
    modules = part.modules() if part._modules else (part,)
    owners = {id(p): (module, key) for module in modules for key, p in module._parameters.items()}
    for name, tensor in part.file_tensors().items():
        if not tensor.is_meta:
            tensor.copy_(values[name])
            continue
        module, key = owners[id(tensor if isinstance(tensor, nn.Parameter) else tensor._base)]
        # copied: a file's own memory is not aligned as PyTorch's, which changes roundings, and ends with the file
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(values[name])
        parameter = module._parameters[key]
        assert parameter is not None
        module._parameters[key] = nn.Parameter(value.view(parameter.shape), requires_grad=False)


def attach_parts(model: M, name: str, made: Plan, parts: Sequence[tuple[str, Part]], *, activate: bool, train: bool) -> M:
    """Hang prepared parts on the model; nothing in here can fail halfway.

    Raises:
        StateError: they are to be trained, and the base lies in pieces on several processes.
    """
    outer, model_ = model, unwrapped(model)
    if train:
        require_shared(model_, (part for _, part in parts))
    registry = find_registry(model_)
    if registry is None:
        registry = _known[model_] = Registry(model_)
        registry.calls.attach(model_)
        for parameter in own_parameters(model_).values():
            parameter.requires_grad_(False)
    modules = dict(own_modules(model_))
    for path, part in parts:
        host = modules[path]
        site = site_of(host, part.site)
        if site is None:
            site = part.site(registry.setup)
            site.attach(host)
        site.append(name, part, host)
    registry.calls.stay_last(model_)
    registry.plans[name] = made
    registry.parts[name] = list(parts)
    for number, one in enumerate(made.each()):
        if one.method.attached is not None:
            one.method.attached(one.config, registry.own_parts(name, number))
    if activate:
        registry.setup.set(active=(name,))
    if train and made.parameters:
        _train(model_, registry, (name,), frozen=registry.trained)
    return outer


def delete(model: M, name: str) -> M:
    """Remove an adapter; the inverse of `add`. When the last one goes, the model is as before the first came.

    Raises:
        AdapterNameError: there is none of that name.
        StateError: adapters are merged.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    registry.require(name)
    registry.require_unmerged(f"delete {name!r}")
    registry.setup.set(active=tuple(other for other in registry.setup.active if other != name))
    del registry.plans[name]
    registry._unroutable.pop(name, None)
    registry.trainees.discard(name)
    for path in dict.fromkeys(path for path, _ in registry.parts.pop(name)):
        host = inner.get_submodule(path)
        for site in list(sites_at(host)):
            site.remove(name)
            if not site.children_of:
                site.detach(host)
    if not registry.plans:
        _restore(inner, registry)
    return model


def detach(model: M, *, keep_merged: bool = False) -> M:
    """Remove everything: keys, tensors, hooks and ``requires_grad`` are as before the first `add`.

    Args:
        model: the model.
        keep_merged: keep the weights as they are now, with what is merged; the way to a plain merged model.

    Raises:
        StateError: adapters are merged and ``keep_merged`` does not say what to do with them.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    if registry.merge is not None and not keep_merged:
        raise StateError(
            f"{list(registry.setup.merged)} is merged: call grafts.unmerge(model) first to get the base back, "
            "or grafts.detach(model, keep_merged=True) to keep the merged weights"
        )
    for host, site in sites_in(inner):
        site.detach(host)
    registry.setup.set(active=())
    _restore(inner, registry)
    return model


def bare(model: M) -> M:
    """The base of ``model`` as a model of its own that shares its weights: what adapters are compared with.

    For trainers that take a reference model beside the one that is trained (DPO)::

        DPOTrainer(model, ref_model=grafts.bare(model), ...)

    Returns:
        A model of the same class without adapters; it takes no memory for weights, which stay frozen.

    Raises:
        StateError: nothing is attached, or adapters are merged, so that the weights are not those of the base.
    """
    inner = unwrapped(model)
    registry_of(inner).require_unmerged("look at the bare base")
    shared = [*own_parameters(inner).values(), *(b for _, m in own_modules(inner) for b in m._buffers.values())]
    twin = copy.deepcopy(inner, {id(tensor): tensor for tensor in shared if tensor is not None})
    registry = registry_of(twin)
    for host, site in list(sites_in(twin)):
        site.detach(host)
    registry.calls.detach(twin)
    _known.pop(twin, None)
    return cast("M", twin)


@contextlib.contextmanager
def set_apart(model: nn.Module) -> Iterator[None]:
    """Take all sites out of the tree of modules for the length of a ``with`` block, so that the model looks as its base."""
    apart = list(sites_in(unwrapped(model)))
    for host, site in apart:
        del host._modules[site.child]
    try:
        yield
    finally:
        for host, site in apart:
            host._modules[site.child] = site


def _restore(model: nn.Module, registry: Registry) -> None:
    registry.calls.detach(model)
    for name, parameter in own_parameters(model).items():
        parameter.requires_grad_(registry.requires_grad.get(name, parameter.requires_grad))
    _known.pop(model, None)


def activate(model: M, names: str | Sequence[str]) -> M:
    """Make these adapters, and no others, what the model computes with; the inverse is `deactivate`.

    Args:
        model: the model.
        names: one name, or several that act one after the other at each site (LoRA updates add up).

    Raises:
        AdapterNameError: a name is unknown or stands twice.
        StateError: adapters are merged.
    """
    registry = registry_of(unwrapped(model))
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        registry.require(name)
    if len(set(wanted)) < len(wanted):
        raise AdapterNameError(f"a name stands twice in {list(wanted)}")
    registry.require_unmerged(f"activate {list(wanted)}")
    registry.setup.set(active=wanted)
    return model


def deactivate(model: M) -> M:
    """Let the model compute as the bare base; adapters stay attached, and trainable what was trainable.

    Raises:
        StateError: adapters are merged.
    """
    return activate(model, ())


@contextlib.contextmanager
def active(model: M, names: str | Sequence[str]) -> Iterator[M]:
    """`activate` for the length of a ``with`` block; what was active before is active again after it, come what may.

    >>> with grafts.active(model, "en"):  # doctest: +SKIP
    ...     model(**batch)
    """
    before = registry_of(unwrapped(model)).setup.active
    activate(model, names)
    try:
        yield model
    finally:
        registry_of(unwrapped(model)).setup.set(active=before)


def train_only(model: M, names: str | Sequence[str] = ()) -> M:
    """Make the parameters of these adapters the only ones of the model that get gradients; with no names, freeze all.

    Being active and being trainable are separate: an adapter that is trained but not active gets no gradient.

    Raises:
        AdapterNameError: a name is unknown.
        StateError: an adapter to train is merged, or has no parameters.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if not registry.require(name).parameters:
            raise StateError(f"adapter {name!r} has no parameters to train")
        if name in registry.setup.merged:
            registry.require_unmerged(f"train {name!r}")
        require_shared(inner, (part for _, part in registry.parts[name]))
    _train(inner, registry, wanted, frozen=tuple(registry.parts))
    return model


def _train(model: nn.Module, registry: Registry, wanted: tuple[str, ...], frozen: Iterable[str]) -> None:
    """Freeze the base and the adapters ``frozen``, thaw ``wanted``."""
    for parameter in own_parameters(model).values():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    for names, value in ((frozen, False), (wanted, True)):
        for name in names:
            for _, part in registry.parts.get(name, ()):
                part.requires_grad_(value)
    registry.trained = wanted
    registry.trainees.update(wanted)
