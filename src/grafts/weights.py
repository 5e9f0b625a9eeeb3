"""What kind of layer a module is, and how its weights are read and written, one entry per kind.

Sites never need this: they only use a module's input and output. Planning needs the kinds and sizes, merging the weights.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from grafts.composition import SITE_NAMES
from grafts.errors import MergeError

LayerKind = Literal["linear", "transposed-linear", "embedding", "convolution", "attention", "attending", "input", "stream"]


@dataclass(frozen=True)
class Layer:
    """A module that adapters can stand beside, described by its sizes.

    Attributes:
        kind: ``"linear"``, ``"transposed-linear"`` (`Conv1D` of `transformers`, as in GPT-2), ``"embedding"``,
            ``"convolution"`` (`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`) or ``"attention"`` (`nn.MultiheadAttention`); of a
            module that is no layer itself ``"attending"`` (it calls an attention kernel) or ``"input"`` (it takes the
            tokens' embeddings); of one that reads or writes the residual stream ``"stream"``.
        in_features: size of the last input dimension; for an embedding the number of rows, else of the channels.
        out_features: size of the last output dimension, or of the channels.
        bias: whether the module adds a bias.
        class_name: the module's class, for people.
        kernel_size: of a convolution.
        groups: of a convolution.
        heads: how many heads of keys an attending module has; 0 where that is not known.
        values: how wide the values of all heads of an attending module are, where that is not ``out_features``; else 0.
        projections: the names of an attending module's linears for keys and values, where nothing else is between them and
            the kernel and the module does more than attention; None where the module itself can be run over a prompt.
    """

    kind: LayerKind
    in_features: int
    out_features: int
    bias: bool
    class_name: str
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    heads: int = 0
    projections: tuple[str, str] | None = None
    values: int = 0

    @property
    def keys_and_values(self) -> int:
        """How many numbers the keys and the values of an attending module are at one position."""
        return self.out_features + (self.values or self.out_features)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, in either layout."""
        return self.kind in ("linear", "transposed-linear")

    @property
    def matrix(self) -> tuple[int, int]:
        """The sizes of its weight as a matrix ``(out, in)``: of an embedding transposed, of a convolution flattened."""
        return self.out_features, self.in_features // self.groups * math.prod(self.kernel_size)


def describe(module: nn.Module) -> Layer | None:
    """The layer that ``module`` is, or None where no adapter of the module site knows its kind.

    A linear is anything with ``in_features`` and ``out_features`` that derives from `nn.Linear` or is called a linear
    (quantizers bring their own classes). An embedding is an `nn.Embedding` that looks up its input as it is: subclasses
    that compute other indices in ``forward`` are not understood, those that scale the rows are. A module that its owner
    never calls is no layer: what stands beside it would silently do nothing.
    """
    name = type(module).__name__
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Embedding):
        if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return None
        return Layer("embedding", module.num_embeddings, module.embedding_dim, has_bias, name)
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return None  # the output projection of nn.MultiheadAttention, which reads its weight and never calls it
    if isinstance(module, _CONVOLUTIONS):
        if type(module).forward not in [known.forward for known in _CONVOLUTIONS]:
            return None  # it may pad or standardise on its own
        return Layer("convolution", module.in_channels, module.out_channels, has_bias, name, module.kernel_size, module.groups)
    if isinstance(module, nn.MultiheadAttention):
        return Layer("attention", module.embed_dim, module.embed_dim, module.in_proj_bias is not None, name)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and (isinstance(module, nn.Linear) or "Linear" in name):
        return Layer("linear", sizes[0], sizes[1], has_bias, name)
    if _is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return Layer("transposed-linear", rows, columns, has_bias, name)
    return None


@functools.cache
def only_read(cls: type[nn.Module]) -> frozenset[str]:
    """The names of modules of which a class reads the weight or bias and which it never calls, as its code shows.

    >>> sorted(only_read(nn.Linear))
    []
    """
    if cls.__module__.startswith("torch."):
        return frozenset()
    read: set[str] = set()
    used: set[str] = set()
    own = [c for c in cls.__mro__ if "forward" in vars(c) and not c.__module__.startswith("torch.")]
    for function in (f for c in own for f in vars(c).values()):
        written = inspect.unwrap(function) if inspect.isfunction(function) else None
        if written is None or written.__name__ == "__init__":
            continue
        steps = list(dis.get_instructions(written))
        for step, following in itertools.zip_longest(steps, steps[1:]):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(step.argval, str):
                reads = following is not None and following.opname == "LOAD_ATTR" and following.argval in ("weight", "bias")
                (read if reads else used).add(step.argval)
    return frozenset(read - used)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is `transformers.pytorch_utils.Conv1D`; where that was never imported, nothing is one."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def is_piece(tensor: Tensor) -> bool:
    """Whether this is a `DTensor`, of which each process has a piece; where that was never imported, nothing is one."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def row_scale(embedding: nn.Module) -> float:
    """The factor that an embedding's ``forward`` puts on its rows (Gemma, BART); 1 for most."""
    return float(getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0)))


def home(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where an adapter beside ``module`` lives, and the dtype in which it is stored.

    The device is that of the module's own tensors; for a module whose tensors `accelerate` keeps elsewhere between calls,
    the device on which it computes. The dtype is float32, or float64 beside a float64 module.
    """
    modules = [m for _, m in own_modules(module)] if module._modules else [module]
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


def own_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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
            left += [(prefix + n, m) for n, m in reversed(module._modules.items()) if m is not None and n not in SITE_NAMES]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The base parameters of ``module`` and below, by every name that they have, without those of adapters."""
    names = {}
    left = [("", module)]
    while left:
        prefix, owner = left.pop()
        names.update({prefix + name: p for name, p in owner._parameters.items() if p is not None})
        left += [(f"{prefix}{n}.", m) for n, m in reversed(owner._modules.items()) if m is not None and n not in SITE_NAMES]
    return names


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
