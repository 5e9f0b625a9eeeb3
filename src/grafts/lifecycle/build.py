"""From a plan to parts with tensors: new ones, or those of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import AdapterNameError, ConfigError, GraftsError
from grafts.lifecycle.plan import Key, Plan, Target
from grafts.lifecycle.registry import find_registry
from grafts.lifecycle.resolve import Draft, resolve
from grafts.lifecycle.selection import FileFacts
from grafts.modules.patterns import join
from grafts.modules.tree import device_and_dtype
from grafts.sites.site import Part
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.view import ModelView


def require_new_name(model: nn.Module, name: str) -> None:
    """Refuse a name under which no adapter can be put on a model now.

    Raises:
        AdapterNameError: the name is taken, or is none.
        StateError: adapters are merged.
    """
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"an adapter's name is a string that is not empty, not {name!r}")
    registry = find_registry(model)
    if registry is None:
        return
    registry.require_unmerged(f"add {name!r}")
    if name in registry.plans:
        raise AdapterNameError(
            f"an adapter is called {name!r} already: grafts.delete(model, {name!r}) removes it"
        )


def draft_adapter(
    view: ModelView,
    config: AdapterConfig,
    name: str,
    *,
    interface: AdapterModelInterface | None = None,
    file: FileFacts | None = None,
) -> Draft:
    """`resolve`, whose errors name the adapter.

    Args:
        view: the model.
        config: what to add.
        name: the adapter's.
        interface: what the model's modules are, where that is known.
        file: what a file says besides, where the config is one of a file.

    Raises:
        ConfigError: the config, or the interface, does not fit the model.
    """
    try:
        if interface is not None:
            view = view.through(interface)
        return resolve(view, config, file)
    except ConfigError as error:
        raise type(error)(f"adapter {name!r}: {error}") from error


def build_parts(
    view: ModelView,
    plan: Plan,
    name: str,
    tensors: Mapping[str, Tensor] | None = None,
    blanks: Mapping[Key, Part] | None = None,
) -> list[tuple[str, Part]]:
    """The parts of a plan by path, in its order.

    Args:
        view: the base model.
        plan: the plan.
        name: the adapter's name, for messages.
        tensors: values by path and file name, whose names and shapes are those of the plan, those of a
            union's members with their number before the path; without them the adapter is new.
        blanks: parts without memory that planning has made already, to be filled with these values.
    """
    built: dict[Key, Part] = {}
    # Those that follow another one come after it.
    for target in sorted(plan.targets, key=lambda target: target.tied_to is not None):
        host = view.modules[target.path]
        try:
            if target.tied_to is not None:
                part = built[target.tied_to, target.kind, target.member].tied(host)
            elif tensors is None:
                part = build_fresh(target, host)
            else:
                values = values_of(plan, target, tensors)
                part = _build_filled(target, host, values, (blanks or {}).get(target.key))
            part.from_base(host, fresh=tensors is None)
        except GraftsError as error:
            raise type(error)(f"adapter {name!r}: {target.path!r}: {error}") from error
        if not host.training:
            part.eval()
        part.requires_grad_(False)
        built[target.key] = part
    return [(target.path, built[target.key]) for target in plan.targets]


def tensor_name(plan: Plan, target: Target, name: str) -> str:
    """The name of one of a target's tensors among those of the whole plan: path and name, behind the member's
    number.
    """
    member = str(target.member) if plan.members else ""
    return join(member, target.path, name)


def values_of(plan: Plan, target: Target, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one target, by their own names, picked from those of the whole plan.

    Args:
        plan: the plan.
        target: one of its targets.
        tensors: by their names in the whole plan (`tensor_name`).
    """
    return {name: tensors[tensor_name(plan, target, name)] for name in target.tensors}


def build_fresh(target: Target, host: nn.Module) -> Part:
    """A new part for one target, with the values that its method starts with, on its module's device.

    Args:
        target: what to build.
        host: the module.
    """
    with torch.device(device_and_dtype(host)[0]):
        return target.build(host)


def _build_filled(target: Target, host: nn.Module, values: Mapping[str, Tensor], blank: Part | None) -> Part:
    """The part for one target with the tensors of a file, on its module's device.

    Args:
        target: the target.
        host: its module.
        values: the tensors, by the names that the file gives them.
        blank: the part without memory, where planning has made it already.
    """
    part = blank
    if part is None:
        with torch.device("meta"):
            part = target.build(host)
    _give_memory(part, device_and_dtype(host)[0])
    with torch.no_grad():
        for name, tensor in part.file_tensors().items():
            # Copied: a file's own memory is not aligned as PyTorch's, which changes roundings, and ends with
            # the file.
            tensor.copy_(values[name])
    return part


def _give_memory(part: Part, device: torch.device) -> None:
    """Give those parameters of a part memory that have none yet; one that stands twice stays one."""
    with_memory: dict[nn.Parameter, nn.Parameter] = {}
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in with_memory:
                empty = torch.empty_like(parameter, device=device)
                with_memory[parameter] = nn.Parameter(empty, requires_grad=False)
            module._parameters[name] = with_memory[parameter]


def fresh_values(view: ModelView, plan: Plan, targets: Sequence[Target]) -> dict[str, Tensor]:
    """The tensors that a fresh adapter has at these targets, by their names in the whole plan.

    Args:
        view: the base model.
        plan: the plan.
        targets: some of its targets.
    """
    values = {}
    for target in targets:
        host = view.modules[target.path]
        part = build_fresh(target, host)
        part.from_base(host, fresh=True)
        for name, tensor in part.file_tensors().items():
            values[tensor_name(plan, target, name)] = tensor
    return values
