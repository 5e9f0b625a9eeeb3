"""Several adapters of one build made into one whose tensors are their weighted sums (Wortsman et al. 2022,
model soups).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from grafts.config import AdapterConfig
from grafts.errors import ConfigError
from grafts.methods._registry import Source
from grafts.methods._tensor_merging import TensorMerging
from grafts.modules.patterns import join

C = TypeVar("C", bound=AdapterConfig)

# Fields that change nothing of what a trained adapter computes; those that say how it starts do not either.
_FREE = {field.name for field in dataclasses.fields(AdapterConfig)} | {"dropout", "stochastic_depth"}
_OF_THE_START = ("init_", "phm_init")


def averaged(sources: Sequence[Source[C]], merging: TensorMerging) -> tuple[C, dict[str, Tensor]]:
    """``"linear"``: the weighted sum of each tensor; weights that add up to 1 make it a mean.

    Args:
        sources: the adapters.
        merging: how tensors are made into one.

    Returns:
        The config and the tensors of the new adapter, by path and file name.

    Raises:
        ConfigError: the adapters are built differently.
    """
    first = sources[0]
    for source in sources[1:]:
        _require_alike(first, source)
    weights = [source.weight for source in sources]
    tensors: dict[str, Tensor] = {}
    for path, part in first.parts.items():
        for name in part.file_tensors():
            values = [source.parts[path].file_tensors()[name].detach() for source in sources]
            tensors[join(path, name)] = merging(values, weights)
    return first.config, tensors


def _require_alike(first: Source[C], other: Source[C]) -> None:
    """Refuse adapters whose tensors do not mean the same.

    Raises:
        ConfigError: naming the option, or the place, in which they differ.
    """
    for field in dataclasses.fields(first.config):
        if field.name in _FREE or field.name.startswith(_OF_THE_START):
            continue
        ours, theirs = getattr(first.config, field.name), getattr(other.config, field.name)
        if ours != theirs:
            raise ConfigError(f"adapters with {field.name}={ours!r} and {theirs!r} cannot be averaged")
    if first.parts.keys() != other.parts.keys():
        path = min(first.parts.keys() ^ other.parts.keys())
        raise ConfigError(f"one of the adapters has no part at {path!r}")
