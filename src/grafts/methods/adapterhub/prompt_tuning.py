"""Prompt tuning in AdapterHub's layout: behind the embeddings' positions and norm."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

from torch import Tensor

from grafts.config import AdapterConfig
from grafts.errors import ConfigError
from grafts.methods._files import Parts
from grafts.methods.adapterhub._layout import (
    HubModel,
    Layout,
    Tensors,
    Values,
    layout,
    require_off,
    take,
)
from grafts.methods.prompt_tuning import PromptPart, PromptTuningConfig
from grafts.methods.shared.virtual_tokens import PROMPT
from grafts.modules.patterns import join


@layout
class PromptLayout(Layout[PromptTuningConfig]):
    """Prompt tuning."""

    architecture: ClassVar[str | None] = "prompt_tuning"
    config_class: ClassVar[type[AdapterConfig]] = PromptTuningConfig

    def config(self, values: Mapping[str, Any]) -> PromptTuningConfig:
        """The config: tokens behind the embeddings."""
        require_off(values, combine=("prefix", "prefix_after_bos"))
        return PromptTuningConfig.from_dict(
            {
                "num_virtual_tokens": values.get("prompt_length"),
                "after_first": values["combine"] == "prefix_after_bos",
                "after_embeddings": True,
            }
        )

    def read(
        self, config: PromptTuningConfig, left: MutableMapping[str, Tensor], model: HubModel
    ) -> tuple[PromptTuningConfig, Tensors]:
        """The virtual tokens."""
        tensors: Tensors = {}
        name = r"(?:.*\.)?prompt_tuning\.prompt_tunings\.[^.]+\.prompt_embedding\.weight"
        for _, tensor in take(left, name):
            tensors.setdefault(PROMPT, tensor)
        return config, tensors

    def write(
        self, config: PromptTuningConfig, parts: Parts, model: HubModel, name: str
    ) -> tuple[Values, Tensors]:
        """The virtual tokens."""
        if not config.after_embeddings:
            raise ConfigError("AdapterHub puts virtual tokens behind the embeddings: after_embeddings=True")
        tensors: Tensors = {}
        path = join(model.root, f"prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight")
        for part in parts.values():
            if isinstance(part, PromptPart) and part.prompt is not None:
                tensors[path] = part.virtual_tokens()
        values = {
            "architecture": self.architecture,
            "combine": "prefix_after_bos" if config.after_first else "prefix",
            "init_weights_seed": None,
            "prompt_init": "random_uniform",
            "prompt_init_text": None,
            "prompt_length": config.num_virtual_tokens,
        }
        return values, tensors
