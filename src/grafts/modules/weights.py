"""How the weights of a layer are read and written, one entry per kind of layer.

Sites never need this: they only use a module's input and output. Merging does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grafts.errors import MergeError
from grafts.modules.layers import _is_conv1d, describe
from grafts.modules.tree import is_piece, own_parameters


def read(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters for merging: at least float32, the weight of a Conv1D as ``(out_features, in_features)``.

    Raises:
        MergeError: a tensor is not here (offloaded), lies on several processes (sharded), or is stored in a form that
            cannot be written back (quantized).
    """
    tensors = {}
    for name, parameter in own_parameters(module).items():
        if parameter.device.type == "meta":
            raise MergeError(f"its {name!r} is on the meta device (offloaded): load the model without offloading first")
        if is_piece(parameter):
            raise MergeError(
                f"its {name!r} lies in pieces on several processes: save the adapter, and merge it into a base that is whole"
            )
        if type(parameter) is not nn.Parameter or parameter.dtype not in _DENSE:
            raise MergeError(
                f"its {name!r} is stored as {type(parameter).__name__} of {parameter.dtype}, which has no exact merge: "
                "dequantize the base first, or use the adapter unmerged"
            )
        wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        tensors[name] = wide.T if name == "weight" and _is_conv1d(module) else wide
    layer = describe(module)
    if layer is not None and layer.kind != "attention" and "weight" not in tensors:
        raise MergeError(f"a {layer.class_name} keeps no dense weight: dequantize the base first, or use the adapter unmerged")
    return tensors


_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def canonical_weight(module: nn.Module) -> Tensor:
    """A layer's weight as it is stored now, without its gradient; that of a Conv1D as ``(out_features, in_features)``."""
    weight = module.get_parameter("weight").detach()
    return weight.T if _is_conv1d(module) else weight


def written(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `read`: tensors in the dtype and layout of the module's own."""
    parameters = own_parameters(module)
    return {
        name: (tensor.T if name == "weight" and _is_conv1d(module) else tensor).to(parameters[name].dtype).contiguous()
        for name, tensor in tensors.items()
    }


def stored(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`written`, fit to be kept.

    Raises:
        MergeError: a value is not finite, or does not fit the storage dtype.
    """
    ready = written(module, tensors)
    for name, tensor in ready.items():
        if not bool(torch.isfinite(tensor).all()):
            raise MergeError(f"its merged {name!r} holds NaN or infinity in {tensor.dtype}")
    return ready
