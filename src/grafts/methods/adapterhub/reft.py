"""ReFT in AdapterHub's layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.methods._files import Parts
from grafts.methods.adapterhub._layout import (
    OURS,
    HubModel,
    Layout,
    Tensors,
    Values,
    layout,
    own_fields,
    require_off,
    take,
)
from grafts.methods.reft import Intervention, ReftConfig, ReftPart


@layout
class ReftLayout(Layout[ReftConfig]):
    """ReFT."""

    architecture: ClassVar[str | None] = "reft"
    config_class: ClassVar[type[AdapterConfig]] = ReftConfig

    def config(self, values: Mapping[str, Any]) -> ReftConfig:
        """The config, whose fields are the same."""
        require_off(values, output_reft=(True, None))
        known = {}
        for name, value in values.items():
            if name not in ("architecture", "output_reft", "dtype"):
                known[name] = value
        return ReftConfig.from_dict(known)

    def read(
        self, config: ReftConfig, left: MutableMapping[str, Tensor], model: HubModel
    ) -> tuple[ReftConfig, Tensors]:
        """The interventions of each layer."""
        tensors: Tensors = {}
        rotations: dict[str, Tensors] = defaultdict(dict)
        if config.tied_weights:
            units = {"0": "both"}
        else:
            units = {"0": "prefix", "1": "suffix"}
        counts = {"prefix": config.prefix_positions, "suffix": config.suffix_positions, "both": 1}
        for match, tensor in take(left, r"(.+)\.reft_layer\.refts\.[^.]+\.units\.(\d)\.(.+)"):
            found = model.layer(match[1])
            if found is None:
                raise CheckpointError(f"{match[1]!r} is no layer of this {model.view.name}")
            unit = units.get(match[2])
            if unit is None or counts[unit] == 0:
                continue  # that library makes it, and never uses it
            owner = f"{OURS}{found[0].path}.units.{unit}"
            if match[3].startswith("projection."):
                rotations[owner][match[3].removeprefix("projection.")] = tensor
            else:
                tensors[f"{owner}.{match[3]}"] = tensor
        for owner, stored in rotations.items():
            if "weight" in stored:
                rotation = stored["weight"]
            else:
                rotation = _rotation(stored)
            if config.orthogonality and not _has_orthonormal_rows(rotation):
                raise CheckpointError(
                    f"the projection of {owner.removeprefix(OURS)!r} is not orthonormal (that library's is "
                    "rounded to zero when weight decay touches it), so the adapter does nothing there"
                )
            tensors[f"{owner}.projection"] = rotation
        return config, tensors

    def write(self, config: ReftConfig, parts: Parts, model: HubModel, name: str) -> tuple[Values, Tensors]:
        """The interventions of each layer."""
        if not config.subtract_projection:
            raise ConfigError(
                "AdapterHub's files do not say that R h is left out (DiReFT): it would read a NoReFT"
            )
        tensors: Tensors = {}
        for path, part in parts.items():
            if not isinstance(part, ReftPart):
                continue
            for number, unit in enumerate(_units(part, config)):
                owner = f"{path}.reft_layer.refts.{name}.units.{number}"
                tensors[f"{owner}.learned_source.weight"] = unit.learned_source.weight
                tensors[f"{owner}.learned_source.bias"] = unit.learned_source.bias
                stored = {"weight": unit.rotation()}
                if config.orthogonality:
                    stored = _parametrised(unit.rotation())
                for key, tensor in stored.items():
                    tensors[f"{owner}.projection.{key}"] = tensor
        values = own_fields(config)
        del values["subtract_projection"]
        return {**values, "architecture": self.architecture, "output_reft": True, "dtype": None}, tensors


def _units(part: ReftPart, config: ReftConfig) -> list[Intervention]:
    """The interventions in the order of the file: that of the first tokens and that of the last ones; where
    there is none of one kind that of the other stands in, since the file has to have both.
    """
    units = cast("dict[str, Intervention]", dict(part.units.items()))
    if config.tied_weights:
        return [units["both"]]
    single = next(iter(units.values()))
    return [units.get("prefix", single), units.get("suffix", single)]


def _has_orthonormal_rows(rotation: Tensor) -> bool:
    """Whether ``R R' = I``, up to rounding."""
    return torch.allclose(rotation @ rotation.T, torch.eye(len(rotation)), atol=1e-4)


def _orthogonal_linear(shape: torch.Size) -> nn.Module:
    """A linear with PyTorch's orthogonal parametrisation, as that library has it."""
    return nn.utils.parametrizations.orthogonal(nn.Linear(shape[1], shape[0], bias=False))


def _rotation(stored: Mapping[str, Tensor]) -> Tensor:
    """R of PyTorch's orthogonal parametrisation, which keeps a hidden x hidden matrix beside it."""
    linear: Any = _orthogonal_linear(stored["parametrizations.weight.original"].shape)
    linear.load_state_dict(dict(stored))
    rotation: Tensor = linear.weight.detach().clone()
    return rotation


def _parametrised(rotation: Tensor) -> Tensors:
    """The inverse of `_rotation`."""
    linear: Any = _orthogonal_linear(rotation.shape)
    linear.weight = rotation.detach().cpu().float()
    return {key: tensor.detach().clone() for key, tensor in linear.state_dict().items()}
