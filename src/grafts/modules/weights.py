"""How the weights of a layer are read and written, whatever its kind and however they are stored.

Sites never need this: they only use a module's input and output. Merging does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grafts.errors import MergeError
from grafts.modules.layers import describe, is_conv1d
from grafts.modules.tree import base_parameters, is_dtensor

# The formats that a merged weight can be stored in again.
_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters for merging: at least float32, the weight of a Conv1D as
    ``(out_features, in_features)``.

    Raises:
        MergeError: a tensor is not here (offloaded), lies on several processes (sharded), or is stored in a
            form that cannot be written back (quantized).
    """
    weights = {}
    for name, parameter in base_parameters(module).items():
        _require_dense(name, parameter)
        weight = parameter.detach()
        weights[name] = _canonical(module, name, weight.to(torch.promote_types(weight.dtype, torch.float32)))
    layer = describe(module)
    if layer is not None and layer.kind != "attention" and "weight" not in weights:
        raise MergeError(
            f"a {layer.class_name} keeps no dense weight: dequantize the base first, "
            "or use the adapter unmerged"
        )
    return weights


def _require_dense(name: str, parameter: nn.Parameter) -> None:
    """Refuse a parameter that cannot be read and written back as it is.

    Raises:
        MergeError: saying why, and what to do.
    """
    if parameter.device.type == "meta":
        raise MergeError(
            f"its {name!r} is on the meta device (offloaded): load the model without offloading first"
        )
    if is_dtensor(parameter):
        raise MergeError(
            f"its {name!r} lies in pieces on several processes: save the adapter, "
            "and merge it into a base that is whole"
        )
    if type(parameter) is not nn.Parameter or parameter.dtype not in _DENSE:
        raise MergeError(
            f"its {name!r} is stored as {type(parameter).__name__} of {parameter.dtype}, "
            "which has no exact merge: dequantize the base first, or use the adapter unmerged"
        )


def _canonical(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a module with the outputs first; the same turns it back."""
    if name == "weight" and is_conv1d(module):
        return tensor.T
    return tensor


def canonical_weight(module: nn.Module) -> Tensor:
    """A layer's weight as it is stored now, without its gradient; that of a Conv1D as
    ``(out_features, in_features)``.
    """
    return _canonical(module, "weight", module.get_parameter("weight").detach())


def to_storage(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `read_weights`: tensors in the dtype and layout of the module's own.

    Args:
        module: the module that they belong to.
        tensors: some of its parameters by name, as `read_weights` gives them.
    """
    parameters = base_parameters(module)
    ready = {}
    for name, tensor in tensors.items():
        ready[name] = _canonical(module, name, tensor).to(parameters[name].dtype).contiguous()
    return ready


def to_finite_storage(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`to_storage` of values that are to be kept.

    Raises:
        MergeError: a value is not finite, or does not fit the storage dtype.
    """
    ready = to_storage(module, tensors)
    for name, tensor in ready.items():
        if not bool(torch.isfinite(tensor).all()):
            raise MergeError(f"its merged {name!r} holds NaN or infinity in {tensor.dtype}")
    return ready
