"""Where a base model's weights are: spreading them over devices and disk with `accelerate`, adapters
following.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from grafts.errors import StateError
from grafts.integrations.transformers_private import unsplit_modules
from grafts.lifecycle.attach import set_apart
from grafts.lifecycle.registry import unwrapped
from grafts.modules.patterns import within
from grafts.modules.tree import device_and_dtype
from grafts.sites.site import sites_in

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def dispatch(
    model: nn.Module,
    device_map: Any,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_index: Any = None,
) -> None:
    """Spread a model over devices, main memory and disk; adapters come to where their modules compute, and
    stay there.

    Args:
        model: the model; where it is spread already, that is undone first, which needs main memory for what
            is on disk.
        device_map: module path -> device, "cpu" or "disk"; one device; or how to work that out: "auto",
            "balanced", "balanced_low_0", "sequential".
        max_memory: how much each device may hold, where it is to be worked out.
        offload_folder: where weights go that are to lie on disk.
        offload_index: of weights that lie there already.

    Raises:
        StateError: `accelerate` is not installed, or weights are to lie on disk and no folder is given.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map  # noqa: PLC0415 (an optional backend)
        from accelerate.utils import get_balanced_memory, offload_state_dict  # noqa: PLC0415
    except ImportError as error:
        raise StateError("to spread a model over devices: pip install accelerate") from error
    inner = unwrapped(model)
    # `accelerate` is to see the base alone: the sites have no place in a map of it.
    with set_apart(inner):
        if device_map in _STRATEGIES:
            unsplit = unsplit_modules(inner)
            memory = None if max_memory is None else dict(max_memory)
            if device_map != "sequential":
                leaves_first_free = device_map == "balanced_low_0"
                memory = get_balanced_memory(
                    inner, memory, no_split_module_classes=unsplit, low_zero=leaves_first_free
                )
            device_map = infer_auto_device_map(inner, memory, no_split_module_classes=unsplit)
        elif not isinstance(device_map, Mapping):
            device_map = {"": device_map}
        needs_disk = "disk" in device_map.values()
        if needs_disk and offload_folder is None and offload_index is None:
            raise StateError(
                "some weights do not fit into memory: name a folder for them with offload_folder="
            )
        gather(inner)
        if needs_disk and offload_index is None:
            # Not left to `dispatch_model`, which takes what it finds in the folder for these weights,
            # whatever it is.
            on_disk = {}
            for name, tensor in inner.state_dict(keep_vars=False).items():
                if _place_of(name, device_map) == "disk":
                    on_disk[name] = tensor
            offload_state_dict(offload_folder, on_disk)
        dispatch_model(inner, dict(device_map), offload_dir=offload_folder, offload_index=offload_index)
    # The sites are back, and go to where their modules compute now.
    for host, site in sites_in(inner):
        site.to(device_and_dtype(host)[0])


def _place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """Where a tensor goes: as the longest path in the map says that leads to it."""
    paths = []
    for path in device_map:
        if path == "" or within(name, [path]):
            paths.append(path)
    if not paths:
        return None
    return device_map[max(paths, key=len)]


def gather(model: nn.Module) -> None:
    """Undo the spreading of a model: every weight is a tensor of its module again, in main memory where it
    was elsewhere.
    """
    from accelerate.hooks import remove_hook_from_module  # noqa: PLC0415 (an optional backend)

    was_spread = False
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is None:
            continue
        was_spread = True
        weights = _weights_of(hook)
        if weights is not None:
            _fill_from(module, weights)
        hook.weights_map = None
        hook.original_devices = {}
        remove_hook_from_module(module)
    tie_weights = getattr(model, "tie_weights", None)
    if was_spread and callable(tie_weights):
        tie_weights()  # what shared one weight has got it one by one


def _weights_of(hook: Any) -> Mapping[str, Any] | None:
    """Where a hook of `accelerate`, or one of those that it holds, keeps the weights of its module."""
    for candidate in (hook, *getattr(hook, "hooks", ())):
        weights = getattr(candidate, "weights_map", None)
        if weights is not None:
            return weights  # type: ignore[no-any-return]
    return None


def _fill_from(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Give a module the tensors that it keeps elsewhere, in main memory."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            value = torch.as_tensor(weights[name]).to("cpu", parameter.dtype).clone()
            module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.as_tensor(weights[name]).to("cpu", buffer.dtype).clone()
