"""Putting adapters on a model and taking them off again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from grafts.config import AdapterConfig
from grafts.errors import StateError
from grafts.lifecycle.activate import _train
from grafts.lifecycle.build import build_parts, prepare_plan
from grafts.lifecycle.plan import Plan
from grafts.lifecycle.registry import M, Registry, _known, find_registry, registry_of, unwrapped
from grafts.lifecycle.sharding import require_shared
from grafts.methods._presets import config_from
from grafts.modules.tree import base_modules, base_parameters
from grafts.sites.site import Part, site_of, sites_at, sites_in
from grafts.structure.interface import AdapterModelInterface


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
    made = prepare_plan(inner, config_from(config), name=name, interface=interface)
    return attach_parts(model, name, made, build_parts(inner, made, name), activate=activate, train=train)


def attach_parts(
    model: M, name: str, made: Plan, parts: Sequence[tuple[str, Part]], *, activate: bool, train: bool
) -> M:
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
        registry.root_hooks.attach(model_)
        for parameter in base_parameters(model_).values():
            parameter.requires_grad_(False)
    modules = dict(base_modules(model_))
    for path, part in parts:
        host = modules[path]
        site = site_of(host, part.site)
        if site is None:
            site = part.site(registry.setup)
            site.attach(host)
        site.append(name, part, host)
    registry.root_hooks.stay_last(model_)
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
    shared = [
        *base_parameters(inner).values(),
        *(b for _, m in base_modules(inner) for b in m._buffers.values()),
    ]
    twin = copy.deepcopy(inner, {id(tensor): tensor for tensor in shared if tensor is not None})
    registry = registry_of(twin)
    for host, site in list(sites_in(twin)):
        site.detach(host)
    registry.root_hooks.detach(twin)
    _known.pop(twin, None)
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
    _known.pop(model, None)
