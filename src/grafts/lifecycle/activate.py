"""Which adapters act, and which are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from grafts.errors import AdapterNameError, StateError
from grafts.lifecycle.registry import M, Registry, registry_of, unwrapped
from grafts.lifecycle.sharding import require_shared
from grafts.modules.tree import base_parameters


def activate(model: M, names: str | Sequence[str]) -> M:
    """Make these adapters, and no others, what the model computes with; the inverse is `deactivate`.

    Args:
        model: the model.
        names: one name, or several that act one after the other at each site (LoRA updates add up).

    Returns:
        The same model.

    Raises:
        AdapterNameError: a name is unknown or stands twice.
        StateError: adapters are merged.
    """
    registry = registry_of(unwrapped(model))
    wanted = as_names(names)
    # Everything is checked before the one assignment that switches.
    for name in wanted:
        registry.require(name)
    if len(set(wanted)) < len(wanted):
        raise AdapterNameError(f"a name stands twice in {list(wanted)}")
    registry.require_unmerged(f"activate {list(wanted)}")
    registry.setup.set(active=wanted)
    return model


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as the verbs take them, as a tuple; whether there are such adapters is not
    asked.
    """
    if isinstance(names, str):
        return (names,)
    return tuple(names)


def deactivate(model: M) -> M:
    """Let the model compute as the bare base; adapters stay attached, and trainable what was trainable.

    Raises:
        StateError: adapters are merged.
    """
    return activate(model, ())


@contextlib.contextmanager
def active(model: M, names: str | Sequence[str]) -> Iterator[M]:
    """`activate` for the length of a ``with`` block; what was active before is active again after it, come
    what may.

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
    """Make the parameters of these adapters the only ones of the model that get gradients; with no names,
    freeze all.

    Being active and being trainable are separate: an adapter that is trained but not active gets no gradient.

    Args:
        model: the model.
        names: one adapter, several, or none.

    Returns:
        The same model.

    Raises:
        AdapterNameError: a name is unknown.
        StateError: an adapter to train is merged, or has no parameters.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    wanted = as_names(names)
    for name in wanted:
        if not registry.require(name).parameters:
            raise StateError(f"adapter {name!r} has no parameters to train")
        if name in registry.setup.merged:
            registry.require_unmerged(f"train {name!r}")
        require_shared(inner, (part for _, part in registry.parts[name]))
    set_trained(inner, registry, wanted, frozen=tuple(registry.parts))
    return model


def set_trained(model: nn.Module, registry: Registry, wanted: tuple[str, ...], frozen: Iterable[str]) -> None:
    """Freeze the base and the adapters ``frozen``, thaw ``wanted``.

    Args:
        model: the model.
        registry: what it carries.
        wanted: names of the adapters that are trained from now on.
        frozen: names of those that are not.
    """
    for parameter in base_parameters(model).values():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    for name in frozen:
        for _, part in registry.parts.get(name, ()):
            part.set_trainable(False)
    for name in wanted:
        for _, part in registry.parts.get(name, ()):
            part.set_trainable(True)
    registry.trained = wanted
    registry.trainees.update(wanted)
