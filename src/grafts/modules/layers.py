"""The kinds of layer, and what a module is of them."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Literal, cast

from torch import nn

LayerKind = Literal[
    "linear", "transposed-linear", "embedding", "convolution", "attention", "attending", "input", "stream"
]


@dataclass(frozen=True)
class Layer:
    """A module that adapters can stand beside, described by its sizes.

    Attributes:
        kind: ``"linear"``, ``"transposed-linear"`` (`Conv1D` of `transformers`, as in GPT-2),
            ``"embedding"``, ``"convolution"`` (`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`) or ``"attention"``
            (`nn.MultiheadAttention`); of a module that is no layer itself ``"attending"`` (it calls an
            attention kernel) or ``"input"`` (it takes the tokens' embeddings); of one that reads or writes
            the residual stream ``"stream"``.
        in_features: size of the last input dimension; for an embedding the number of rows, else of the
            channels.
        out_features: size of the last output dimension, or of the channels.
        bias: whether the module adds a bias.
        class_name: the module's class, for people.
        kernel_size: of a convolution.
        groups: of a convolution.
        heads: how many heads of keys an attending module has; 0 where that is not known.
        values: how wide the values of all heads of an attending module are, where that is not
            ``out_features``; else 0.
        projections: the names of an attending module's linears for keys and values, where nothing else is
            between them and the kernel and the module does more than attention; None where the module itself
            can be run over a prompt.
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
        """The sizes of its weight as a matrix ``(out, in)``: of an embedding transposed, of a convolution
        flattened.
        """
        return self.out_features, self.in_features // self.groups * math.prod(self.kernel_size)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def describe(module: nn.Module) -> Layer | None:
    """The layer that ``module`` is, or None where no adapter of the module site knows its kind.

    A linear is anything with ``in_features`` and ``out_features`` that derives from `nn.Linear` or is called
    a linear (quantizers bring their own classes). An embedding is an `nn.Embedding` that looks up its input
    as it
    is: subclasses that compute other indices in ``forward`` are not understood, those that scale the rows
        are.
    A module that its owner never calls is no layer: what stands beside it would silently do nothing.
    """
    name = type(module).__name__
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Embedding):
        scales_rows = hasattr(module, "embed_scale")
        if type(module).forward is not nn.Embedding.forward and not scales_rows:
            return None
        return Layer("embedding", module.num_embeddings, module.embedding_dim, has_bias, name)
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return (
            None  # the output projection of nn.MultiheadAttention, which reads its weight and never calls it
        )
    if isinstance(module, _CONVOLUTIONS):
        if type(module).forward not in [known.forward for known in _CONVOLUTIONS]:
            return None  # it may pad or standardise on its own
        return Layer(
            "convolution",
            module.in_channels,
            module.out_channels,
            has_bias,
            name,
            module.kernel_size,
            module.groups,
        )
    if isinstance(module, nn.MultiheadAttention):
        has_bias = module.in_proj_bias is not None
        return Layer("attention", module.embed_dim, module.embed_dim, has_bias, name)
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    has_sizes = isinstance(in_features, int) and isinstance(out_features, int)
    if has_sizes and (isinstance(module, nn.Linear) or "Linear" in name):
        return Layer("linear", cast("int", in_features), cast("int", out_features), has_bias, name)
    if is_conv1d(module):
        rows, columns = module.get_parameter("weight").shape
        return Layer("transposed-linear", rows, columns, has_bias, name)
    return None


def only_read(cls: type[nn.Module]) -> frozenset[str]:
    """The names of modules of which a class reads the weight or bias and which it never calls, as its code
    shows.

    >>> sorted(only_read(nn.Linear))
    []
    """
    return _only_read(cls)  # type: ignore[arg-type]  # a metaclass may have no hash; those of modules have


@functools.cache
def _only_read(cls: type[nn.Module]) -> frozenset[str]:
    if cls.__module__.startswith("torch."):
        return frozenset()
    weights_read: set[str] = set()
    used_otherwise: set[str] = set()
    for function in _methods_of(cls):
        instructions = list(dis.get_instructions(function))
        for instruction, following in itertools.zip_longest(instructions, instructions[1:]):
            is_attribute = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
            if not is_attribute or not isinstance(instruction.argval, str):
                continue
            # ``self.proj.weight`` loads proj, and then weight of that.
            reads_weight = (
                following is not None
                and following.opname == "LOAD_ATTR"
                and following.argval in ("weight", "bias")
            )
            if reads_weight:
                weights_read.add(instruction.argval)
            else:
                used_otherwise.add(instruction.argval)
    return frozenset(weights_read - used_otherwise)


def _methods_of(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """The methods of a class and of those parents that have a ``forward`` of their own, without
    constructors.
    """
    for parent in cls.__mro__:
        if "forward" not in vars(parent) or parent.__module__.startswith("torch."):
            continue
        for function in vars(parent).values():
            if not inspect.isfunction(function):
                continue
            written = inspect.unwrap(function)
            if written.__name__ != "__init__":
                yield written


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is `transformers.pytorch_utils.Conv1D`; where that was never imported, nothing is one."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)


def row_scale(embedding: nn.Module) -> float:
    """The factor that an embedding's ``forward`` puts on its rows (Gemma, BART); 1 for most."""
    # BART keeps the number beside a tensor of it.
    scale = getattr(embedding, "scalar_embed_scale", None)
    if scale is None:
        return float(getattr(embedding, "embed_scale", 1.0))
    return float(scale)
