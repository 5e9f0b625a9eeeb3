"""How the weights of a layer are read and written, one entry per kind of layer.

Sites never need this: they only use a module's input and output. Merging does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grafts.errors import MergeError
from grafts.modules.layers import describe, is_conv1d
from grafts.modules.tree import base_parameters, is_dtensor


def read_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters for merging: at least float32, the weight of a Conv1D as
    ``(out_features, in_features)``.

    Raises:
        MergeError: a tensor is not here (offloaded), lies on several processes (sharded), or is stored in a
            form that cannot be written back (quantized).
    """
    tensors = {}
    for name, parameter in base_parameters(module).items():
        if parameter.device.type == "meta":
            raise MergeError(
                f"its {name!r} is on the meta device (offloaded): load the model without offloading first"
            )
        if is_dtensor(parameter):
            raise MergeError(
                f"its {name!r} lies in pieces on several processes: save the adapter, and merge it into a "
                f"base that is whole"
            )
        if type(parameter) is not nn.Parameter or parameter.dtype not in _DENSE:
            raise MergeError(
                f"its {name!r} is stored as {type(parameter).__name__} of {parameter.dtype}, which has no "
                "exact merge: dequantize the base first, or use the adapter unmerged"
            )
        wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        tensors[name] = wide.T if name == "weight" and is_conv1d(module) else wide
    layer = describe(module)
    if layer is not None and layer.kind != "attention" and "weight" not in tensors:
        raise MergeError(
            f"a {layer.class_name} keeps no dense weight: dequantize the base first, or use the adapter "
            f"unmerged"
        )
    return tensors


_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def canonical_weight(module: nn.Module) -> Tensor:
    """A layer's weight as it is stored now, without its gradient; that of a Conv1D as
    ``(out_features, in_features)``.
    """
    weight = module.get_parameter("weight").detach()
    return weight.T if is_conv1d(module) else weight


def to_storage(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `read_weights`: tensors in the dtype and layout of the module's own."""
    parameters = base_parameters(module)
    return {
        name: (tensor.T if name == "weight" and is_conv1d(module) else tensor)
        .to(parameters[name].dtype)
        .contiguous()
        for name, tensor in tensors.items()
    }


def to_finite_storage(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`to_storage`, fit to be kept.

    Raises:
        MergeError: a value is not finite, or does not fit the storage dtype.
    """
    ready = to_storage(module, tensors)
    for name, tensor in ready.items():
        if not bool(torch.isfinite(tensor).all()):
            raise MergeError(f"its merged {name!r} holds NaN or infinity in {tensor.dtype}")
    return ready
