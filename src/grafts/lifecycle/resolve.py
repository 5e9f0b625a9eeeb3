"""Resolving a config against a model: which modules get which parts. Pure; the result is a `Plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, InterfaceError
from grafts.lifecycle.plan import Key, Plan, Target
from grafts.lifecycle.selection import FileFacts, Selection
from grafts.lifecycle.targets import (
    bias_targets,
    copy_target,
    method_targets,
    token_targets,
    with_tied_targets,
)
from grafts.methods._presets import config_from
from grafts.methods._registry import Method, method_of
from grafts.sites.site import Part, Site, site_of
from grafts.structure.infer import inferred, inferred_or_none
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.view import ModelView, look_at


def plan(
    model: nn.Module, config: AdapterConfig | str, *, interface: AdapterModelInterface | None = None
) -> Plan:
    """Resolve ``config`` against ``model`` without touching either.

    Modules inside those of ``modules_to_save`` are trained as a whole and so are no targets.

    Args:
        model: the base model, with or without adapters.
        config: what to add; or a text, as `grafts.config_from` takes it.
        interface: what the model's modules are, where that is not to be worked out.

    Returns:
        The plan; ``print`` it for a table.

    Raises:
        InterfaceError: the interface does not fit the model, or the method needs one and none can be worked
            out.
        UnmatchedTargetError: a pattern selects no module, or nothing is selected at all; names the nearest.
        UnsupportedTargetError: a selected module is of a kind that the method cannot serve.
    """
    return resolve(look_at(model, interface), config_from(config)).plan


@dataclass(frozen=True)
class Draft:
    """A plan, and the method's parts as they were planned.

    Attributes:
        plan: the plan.
        blanks: the parts, on the meta device and so without memory, by the key of their target.
    """

    plan: Plan
    blanks: dict[Key, Part]


def resolve(view: ModelView, config: AdapterConfig, file: FileFacts | None = None) -> Draft:
    """What `plan` gives, and the parts that were planned, over a view of the model.

    Pure but for one thing: where the method needs an interface and none is known, one forward of the model is
    watched to work it out, which leaves the model as it was.

    Args:
        view: the model, looked at once.
        config: what to add.
        file: what a file says besides, where the config is one of a file.

    Raises:
        ConfigError: it does not fit the model (the kinds are those of `plan`).
    """
    method = method_of(config)
    if method.members is None:
        return _resolve_single(view, config, method, 0, file)
    drafts = []
    of_member = None if file is None else FileFacts()
    for number, member in enumerate(method.members(config)):
        drafts.append(_resolve_single(view, member, method_of(member), number, of_member))
    return _joined(view, config, method, drafts)


def _joined(view: ModelView, config: AdapterConfig, method: Method[Any], drafts: Sequence[Draft]) -> Draft:
    """The draft of an adapter that is made of several."""
    targets: list[Target] = []
    blanks: dict[Key, Part] = {}
    interface: AdapterModelInterface | None = None
    for draft in drafts:
        targets += draft.plan.targets
        blanks |= draft.blanks
        interface = interface or draft.plan.interface
    joined = replace(
        drafts[0].plan,
        config=config,
        method=method,
        targets=_in_model_order(view, targets),
        interface=interface,
        members=tuple(draft.plan for draft in drafts),
    )
    return Draft(joined, blanks)


def _resolve_single(
    view: ModelView, config: AdapterConfig, method: Method[Any], number: int, file: FileFacts | None
) -> Draft:
    """The draft of one method; ``number`` is that of the config in a union."""
    view = _with_interface_for(view, config, method, file)
    selection = Selection(view, config, method, file)
    places = selection.places()
    if method.check is not None:
        method.check(config, places)
    chosen = [place.path for place in places]

    targets = [copy_target(view, path) for path in selection.copies]
    for path in file.replaced if file is not None else ():
        # Where the method has a part too, a file names the module as the base of that part.
        targets.append(copy_target(view, path, "base_layer." if path in chosen else ""))
    blanks: dict[Key, Part] = {}
    for target, part in method_targets(selection, places, number):
        targets.append(target)
        blanks[target.key] = part
    auxiliary = config.auxiliary()
    targets += token_targets(selection, chosen)
    targets += bias_targets(view, auxiliary.biases, chosen, selection.copies)
    targets = with_tied_targets(view, targets, everything=auxiliary.tie_weights)
    targets = [replace(target, member=number) for target in targets]
    for target in targets:
        _check_child_name(view.modules[target.path], target.path, target.site)
    single = Plan(
        model_name=view.name,
        base_parameters=view.parameter_count,
        config=config,
        method=method,
        targets=_in_model_order(view, targets),
        interface=view.interface,
    )
    return Draft(single, blanks)


def _with_interface_for(
    view: ModelView, config: AdapterConfig, method: Method[Any], file: FileFacts | None
) -> ModelView:
    """The view with an interface, where the method stands on the residual stream, or where names say too
    little.

    Raises:
        InterfaceError: none can be worked out where one is needed, or it does not offer the method.
    """
    if view.interface is None and method.places is not None:
        view = view.through(inferred(view))
    if view.interface is not None:
        _require_offered(view.interface, method)
        return view
    if Selection(view, config, method, file).names_say_enough():
        return view
    interface = inferred_or_none(view)
    if interface is None or not interface.offers(method.name):
        return view  # the selection says what is missing
    return view.through(interface)


def _require_offered(interface: AdapterModelInterface, method: Method[Any]) -> None:
    """Refuse a method that the interface does not list.

    Raises:
        InterfaceError: naming it.
    """
    if not interface.offers(method.name):
        raise InterfaceError(
            f"the interface does not offer {method.name!r}: its adapter_methods are "
            f"{list(interface.adapter_methods)}"
        )


def _in_model_order(view: ModelView, targets: Sequence[Target]) -> tuple[Target, ...]:
    """Targets in the order of their modules in the model."""
    return tuple(sorted(targets, key=lambda target: view.order[target.path]))


def _check_child_name(module: nn.Module, path: str, kind: type[Site]) -> None:
    """Refuse a module that has something else under the name that a site has there.

    Raises:
        ConfigError: naming it.
    """
    if site_of(module, kind) is not None:
        return
    places = (module._modules, module._parameters, module._buffers, module.__dict__)
    is_taken = any(kind.child in names for names in places)
    if is_taken or hasattr(type(module), kind.child):
        raise ConfigError(
            f"{path!r} has an attribute {kind.child!r} of its own, which is the name that adapters need there"
        )
