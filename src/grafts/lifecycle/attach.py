"""Putting adapters on a model and taking them off again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from grafts.config import AdapterConfig
from grafts.errors import StateError
from grafts.lifecycle.activate import set_trained
from grafts.lifecycle.build import build_parts, draft_adapter, require_new_name
from grafts.lifecycle.plan import Plan
from grafts.lifecycle.registry import M, Registry, find_registry, registries, registry_of, unwrapped
from grafts.lifecycle.sharding import require_shared
from grafts.methods._presets import config_from
from grafts.modules.tree import base_modules, base_parameters
from grafts.sites.site import Part, site_of, sites_at, sites_in
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.view import ModelView, look_at


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
        interface: what the model's modules are; where a method needs to know and it is not given, it is
            worked out.
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
    resolved_config = config_from(config)
    require_new_name(inner, name)
    view = look_at(inner)
    plan = draft_adapter(view, resolved_config, name, interface=interface).plan
    attach_parts(view, name, plan, build_parts(view, plan, name), activate=activate, train=train)
    return model


def attach_parts(
    view: ModelView,
    name: str,
    plan: Plan,
    parts: Sequence[tuple[str, Part]],
    *,
    activate: bool,
    train: bool,
) -> None:
    """Hang prepared parts on the model; nothing in here can fail halfway.

    Args:
        view: the model.
        name: the adapter's.
        plan: what was planned.
        parts: the path and the part of each target, in the order of the plan.
        activate: make it the active adapter.
        train: make it the only trainable thing.

    Raises:
        StateError: they are to be trained, and the base lies in pieces on several processes.
    """
    model = view.model
    if train:
        require_shared(model, (part for _, part in parts))
    # The first adapter of a model freezes its base.
    registry = find_registry(model)
    if registry is None:
        registry = registries[model] = Registry(model)
        registry.root_hooks.attach(model)
        for parameter in base_parameters(model).values():
            parameter.requires_grad_(False)
    for path, part in parts:
        host = view.modules[path]
        site = site_of(host, part.site)
        if site is None:
            site = part.site(registry.setup)
            site.attach(host)
        site.append(name, part, host)
    # Hooks of the root have to run behind those of a site that stands there too.
    registry.root_hooks.stay_last(model)
    registry.plans[name] = plan
    registry.parts[name] = list(parts)
    # Only now can parts find each other.
    for member in range(len(plan.single_plans)):
        own_parts = registry.own_parts(name, member)
        for part in own_parts.values():
            part.connect(own_parts)
    if activate:
        registry.setup.set(active=(name,))
    if train and plan.parameters:
        set_trained(model, registry, (name,), frozen=registry.trained)


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
    parts = registry.forget(name)
    for path in dict.fromkeys(path for path, _ in parts):
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
            f"{list(registry.setup.merged)} is merged: call grafts.unmerge(model) first to get the base "
            "back, or grafts.detach(model, keep_merged=True) to keep the merged weights"
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
        StateError: nothing is attached, or adapters are merged, so that the weights are not those of the
            base.
    """
    inner = unwrapped(model)
    registry_of(inner).require_unmerged("look at the bare base")
    # What stands in the memo of a deep copy is taken as it is: the weights are shared.
    shared = list(base_parameters(inner).values())
    buffers = []
    for _, module in base_modules(inner):
        buffers += [buffer for buffer in module._buffers.values() if buffer is not None]
    twin = copy.deepcopy(inner, {id(tensor): tensor for tensor in (*shared, *buffers)})
    registry = registry_of(twin)
    for host, site in list(sites_in(twin)):
        site.detach(host)
    registry.root_hooks.detach(twin)
    registries.pop(twin, None)
    return cast("M", twin)


@contextlib.contextmanager
def set_apart(model: nn.Module) -> Iterator[None]:
    """Take all sites out of the tree of modules for the length of a ``with`` block, so that the model looks
    as its base.
    """
    apart = list(sites_in(unwrapped(model)))
    for host, site in apart:
        del host._modules[site.child]
    try:
        yield
    finally:
        for host, site in apart:
            host._modules[site.child] = site


def _restore(model: nn.Module, registry: Registry) -> None:
    registry.root_hooks.detach(model)
    for name, parameter in base_parameters(model).items():
        parameter.requires_grad_(registry.requires_grad.get(name, parameter.requires_grad))
    registries.pop(model, None)
