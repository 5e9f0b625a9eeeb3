"""Several adapters of one build made into one whose tensors are their weighted sums (Wortsman et al. 2022,
model soups).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from grafts.config import AdapterConfig
from grafts.errors import ConfigError
from grafts.methods._registry import Parts
from grafts.methods._tensor_merging import TensorMerging
from grafts.modules.patterns import join

# fields that change nothing of what a trained adapter computes
_FREE = {field.name for field in dataclasses.fields(AdapterConfig)} | {"dropout", "stochastic_depth"}


def averaged(
    sources: Sequence[tuple[AdapterConfig, Parts, float]], blend: TensorMerging
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """``"linear"``: the weighted sum of each tensor; weights that add up to 1 make it a mean.

    Args:
        sources: config, parts by path, and weight of each adapter.
        blend: how tensors are made into one.

    Raises:
        ConfigError: the adapters are built differently.
    """
    first, places, _ = sources[0]
    for config, parts, _ in sources[1:]:
        for field in dataclasses.fields(config):
            ours, theirs = getattr(first, field.name), getattr(config, field.name)
            if (
                field.name not in _FREE
                and not field.name.startswith(("init_", "phm_init"))
                and ours != theirs
            ):
                raise ConfigError(f"adapters with {field.name}={ours!r} and {theirs!r} cannot be averaged")
        if parts.keys() != places.keys():
            raise ConfigError(
                f"one of the adapters has no part at {sorted(parts.keys() ^ places.keys())[0]!r}"
            )
    weights = [weight for _, _, weight in sources]
    tensors: dict[str, Tensor] = {}
    for path, part in places.items():
        for key in part.file_tensors():
            each = [parts[path].file_tensors()[key].detach() for _, parts, _ in sources]
            tensors[join(path, key)] = blend(each, weights)
    return first, tensors
