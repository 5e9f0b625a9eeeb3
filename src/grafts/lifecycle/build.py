"""From a plan to parts with tensors: new ones, or those of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import AdapterNameError, ConfigError, GraftsError
from grafts.lifecycle.plan import Key, Plan, Target
from grafts.lifecycle.registry import find_registry
from grafts.lifecycle.resolve import resolve
from grafts.modules.tree import base_modules, device_and_dtype
from grafts.sites.site import Part
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.roles import ModelView


def prepare_plan(
    model: nn.Module,
    config: AdapterConfig,
    *,
    name: str,
    lenient: bool = False,
    replaced: Sequence[str] = (),
    view: ModelView | None = None,
    blanks: dict[Key, Part] | None = None,
    interface: AdapterModelInterface | None = None,
) -> Plan:
    """The plan of an adapter that could be added under this name now; the arguments are those of
    `resolve`.
    """
    registry = find_registry(model)
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"an adapter's name is a string that is not empty, not {name!r}")
    if registry is not None:
        registry.require_unmerged(f"add {name!r}")
        if name in registry.plans:
            raise AdapterNameError(
                f"an adapter is called {name!r} already: grafts.delete(model, {name!r}) removes it"
            )
    try:
        return resolve(
            model, config, lenient=lenient, replaced=replaced, view=view, blanks=blanks, interface=interface
        )
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
        tensors: values by path and file name, whose names and shapes are those of the plan, those of a
            union's members with their number before the path; without them the adapter is new.
        blanks: parts without memory that planning has made already, to be filled with these values.
    """
    built: dict[Key, Part] = {}
    own = [one.method.name for one in made.each()]
    modules = dict(base_modules(model))
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
    device = device_and_dtype(host)[0]
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
        # copied: a file's own memory is not aligned as PyTorch's, which changes roundings, and ends with the
        # file
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(values[name])
        parameter = module._parameters[key]
        assert parameter is not None
        module._parameters[key] = nn.Parameter(value.view(parameter.shape), requires_grad=False)
