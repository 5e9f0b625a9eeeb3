"""Prefix tuning in AdapterHub's layout; of the copies of a prefix at every layer only that of the pool is
needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.methods._files import PackedFiles, Parts
from grafts.methods.adapterhub._layout import (
    HubModel,
    Layout,
    Tensors,
    Values,
    layout,
    require_off,
    take,
)
from grafts.methods.prefix_tuning import LOCATIONS, PrefixPart, PrefixTuningConfig
from grafts.methods.shared.virtual_tokens import PROMPT
from grafts.modules.patterns import join


@layout
class PrefixLayout(Layout[PrefixTuningConfig]):
    """Prefix tuning."""

    architecture: ClassVar[str | None] = "prefix_tuning"
    config_class: ClassVar[type[AdapterConfig]] = PrefixTuningConfig

    def config(self, values: Mapping[str, Any]) -> PrefixTuningConfig:
        """The config: a prefix without positions, in all attention for which the file has one."""
        require_off(values, leave_out=([], None), non_linearity=("tanh", None))
        return PrefixTuningConfig.from_dict(
            {
                "num_virtual_tokens": values.get("prefix_length"),
                "use_gating": bool(values.get("use_gating", False)),
                "count_positions": False,
                "attention": tuple(LOCATIONS),
            }
        )

    def read(
        self, config: PrefixTuningConfig, left: MutableMapping[str, Tensor], model: HubModel
    ) -> tuple[PrefixTuningConfig, Tensors]:
        """The keys and values of each location, and the gates."""
        refuse_relative(model.model)
        take(left, r".*\.pool\..*")
        pools: dict[str, Tensors] = defaultdict(dict)
        names = r"(?:.*\.)?prefix_tuning\.prefix_tunings\.[^.]+\.(\w+)_prefix\.(.+)"
        for match, tensor in take(left, names):
            pools[match[1]][match[2]] = tensor
        tensors: Tensors = {}
        for match, tensor in take(left, r"(.+)\.prefix_tuning\.prefix_gates\.[^.]+\.(weight|bias)"):
            path = model.path_of(match[1])
            if path is None:
                raise CheckpointError(f"{match[1]!r} is no attention of this {model.view.name}")
            # One gate there for keys and values.
            gate = tensor.expand(2, *tensor.shape[1:])
            tensors[f"{PackedFiles.prefix}{path}.gate.{match[2]}"] = gate
        for location, pool in pools.items():
            tensors[f"{PROMPT}.{location}"] = _numbers(pool, config.num_virtual_tokens)
        return config, tensors

    def write(
        self, config: PrefixTuningConfig, parts: Parts, model: HubModel, name: str
    ) -> tuple[Values, Tensors]:
        """The keys and values of each location, and the gates."""
        refuse_relative(model.model)
        prefixes = {path: part for path, part in parts.items() if isinstance(part, PrefixPart)}
        if len(prefixes) < len(parts):
            raise ConfigError(
                "it counts positions or has parts of its own elsewhere, which AdapterHub does not"
            )
        locations = {role: location for location, role in LOCATIONS.items()}
        numbers: dict[str, list[Tensor]] = defaultdict(list)
        tensors: Tensors = {}
        for path, part in prefixes.items():
            numbers[locations[model.view.roles[path]]].append(part.numbers())
            if part.gate is not None:
                for kind, gate in part.gate.named_parameters():
                    tensors[f"{path}.prefix_tuning.prefix_gates.{name}.{kind}"] = gate
        pool = join(model.root, f"prefix_tuning.prefix_tunings.{name}")
        for location, of_layers in numbers.items():
            tensors[f"{pool}.{location}_prefix.control_trans"] = torch.cat(of_layers, 1).flatten()
        values: Values = {
            "architecture": self.architecture,
            "bottleneck_size": config.encoder_hidden_size or 512,
            "cross_prefix": "cross" in numbers,
            "dropout": 0.0,
            "encoder_prefix": "encoder" in numbers,
            "flat": True,
            "init_weights_seed": None,
            "leave_out": [],
            "non_linearity": "tanh",
            "prefix_length": config.num_virtual_tokens,
            "shared_gating": False,
            "use_gating": config.use_gating,
        }
        return values, tensors


def _numbers(pool: Mapping[str, Tensor], length: int) -> Tensor:
    """Keys and values of all layers, ``(length, numbers)``; one that an MLP makes is read as the prefix that
    it has made.

    Args:
        pool: the tensors of one location.
        length: how many virtual tokens there are.

    Raises:
        CheckpointError: the numbers are not those of so many tokens.
    """
    if "control_trans" in pool:
        flat = pool["control_trans"]
        if flat.numel() % length:
            raise CheckpointError(f"a prefix of {flat.numel()} numbers is none of {length} tokens")
        return flat.view(length, -1)
    first, first_bias = pool["control_trans.0.weight"], pool["control_trans.0.bias"]
    last, last_bias = pool["control_trans.2.weight"], pool["control_trans.2.bias"]
    return torch.tanh(pool["wte.weight"] @ first.T + first_bias) @ last.T + last_bias


def refuse_relative(model: nn.Module) -> None:
    """Refuse a model whose attention counts distances (T5).

    Raises:
        ConfigError: saying why.
    """
    if getattr(getattr(model, "config", None), "relative_attention_num_buckets", None) is not None:
        raise ConfigError(
            f"AdapterHub moves the distances between the tokens of a {type(model).__name__} by the length of "
            "the prefix, so its prefixes mean something else there: this layout is not exchanged for such "
            "models"
        )
