"""The modules of a base model without the sites among them, and where a module lives."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# the names of sites among the children of the module that they serve: beside it, inside attention, in front
# of the input
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
    modules = [m for _, m in base_modules(module)] if module._modules else [module]
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta" and (execution := _execution_device(module)) is not None:
        device = execution
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return device, torch.float64 if wide else torch.float32


def _execution_device(module: nn.Module) -> torch.device | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = [hook, *getattr(hook, "hooks", ())]
    devices = [d for h in hooks if (d := getattr(h, "execution_device", None)) is not None]
    return torch.device(devices[0]) if devices else None


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
            left += [
                (prefix + n, m)
                for n, m in reversed(module._modules.items())
                if m is not None and n not in SITE_NAMES
            ]


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The base parameters of ``module`` and below, by every name that they have, without those of
    adapters.
    """
    names = {}
    left = [("", module)]
    while left:
        prefix, owner = left.pop()
        names.update({prefix + name: p for name, p in owner._parameters.items() if p is not None})
        left += [
            (f"{prefix}{n}.", m)
            for n, m in reversed(owner._modules.items())
            if m is not None and n not in SITE_NAMES
        ]
    return names
