"""The modules of a base model without the sites among them, and where a module lives."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# The names of sites among the children of the module that they serve: beside it, inside attention, in front
# of the input. They stand in the keys of a model's state dict, and so stay what they are ("model" is the
# input site's).
SITE_NAMES = ("grafts", "grafts_attention", "grafts_model")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a `DTensor`, of which each process has a piece; where that was never imported, nothing
    is one.
    """
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where an adapter beside ``module`` lives, and the dtype in which it is stored.

    The device is that of the module's own tensors; for a module whose tensors `accelerate` keeps elsewhere
    between calls, the device on which it computes. The dtype is float32, or float64 beside a float64 module.
    """
    tensors = _base_tensors(module)
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        device = _execution_device(module) or device
    is_wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return device, torch.float64 if is_wide else torch.float32


def _base_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module and those below, without those of adapters."""
    tensors = []
    for _, owner in base_modules(module):
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is not None:
                tensors.append(tensor)
    return tensors


def _execution_device(module: nn.Module) -> torch.device | None:
    """The device on which a module computes whose tensors `accelerate` keeps elsewhere; None for others."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in (hook, *getattr(hook, "hooks", ())):
        device = getattr(candidate, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base model by path, as `nn.Module.named_modules`, but without looking into sites.

    So the time this takes does not grow with the number of adapters.
    """
    seen = set()
    left = [("", root)]
    while left:
        path, module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if module._modules:
            prefix = f"{path}." if path else ""
            # The last child goes on the stack first, so that the first is taken next.
            for name, child in reversed(module._modules.items()):
                if child is not None and name not in SITE_NAMES:
                    left.append((prefix + name, child))


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The base parameters of ``module`` and below, by every name that they have, without those of
    adapters.
    """
    parameters = {}
    left = [("", module)]
    while left:
        prefix, owner = left.pop()
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                parameters[prefix + name] = parameter
        for name, child in reversed(owner._modules.items()):
            if child is not None and name not in SITE_NAMES:
                left.append((f"{prefix}{name}.", child))
    return parameters
