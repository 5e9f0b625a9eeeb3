"""(IA)3 in AdapterHub's layout: what LoRA is there in the mode that multiplies."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.methods._files import Parts
from grafts.methods.adapterhub._layout import (
    ATTENTION_MATRICES,
    OURS,
    HubModel,
    Layout,
    Tensors,
    Values,
    layout,
    lora_values,
    require_off,
    take,
)
from grafts.methods.ia3 import IA3Config, IA3Part
from grafts.structure.roles import FFN_IN, FFN_OUT


@layout
class IA3Layout(Layout[IA3Config]):
    """(IA)3."""

    architecture: ClassVar[str | None] = "lora"
    config_class: ClassVar[type[AdapterConfig]] = IA3Config

    def reads(self, values: Mapping[str, Any]) -> bool:
        """In the mode that multiplies."""
        return super().reads(values) and values.get("composition_mode") == "scale"

    def config(self, values: Mapping[str, Any]) -> IA3Config:
        """The config; which modules are adapted the tensors say."""
        require_off(values, use_gating=(False, None), alpha=(1, None), r=(1, None))
        return IA3Config.from_dict({"target_modules": [], "feedforward_modules": []})

    def read(
        self, config: IA3Config, left: MutableMapping[str, Tensor], model: HubModel
    ) -> tuple[IA3Config, Tensors]:
        """The vector of each module."""
        tensors: Tensors = {}
        paths = []
        for match, tensor in take(left, r"(.+)\.loras\.[^.]+\.lora_B"):
            path = model.path_of(match[1])
            if path is None:
                raise CheckpointError(f"{match[1]!r} is no linear of this {model.view.name}")
            paths.append(path)
            tensors[f"{OURS}{path}.ia3_l"] = tensor
        return replace(config, target_modules=tuple(paths)), tensors

    def write(self, config: IA3Config, parts: Parts, model: HubModel, name: str) -> tuple[Values, Tensors]:
        """The vector of each module."""
        scalings = {path: part for path, part in parts.items() if isinstance(part, IA3Part)}
        roles = {model.view.roles[path] for path in scalings}
        scales_inputs = any(part.when == "before" for part in scalings.values())
        if scales_inputs or roles - {*ATTENTION_MATRICES, FFN_IN, FFN_OUT}:
            raise ConfigError(
                "AdapterHub's (IA)3 scales outputs, of queries, keys, values and the feed-forward's linears "
                "only"
            )
        tensors: Tensors = {f"{path}.loras.{name}.lora_B": part.ia3_l for path, part in scalings.items()}
        values = lora_values(
            roles,
            r=1,
            alpha=1,
            composition_mode="scale",
            init_weights="ia3",
            intermediate_lora=FFN_IN in roles,
            output_lora=FFN_OUT in roles,
        )
        return values, tensors
