"""Adaption prompts: zero-init gated attention to learned prompts (LLaMA-Adapter, Zhang et al. 2023,
arXiv:2303.16199).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafts.config import AdapterConfig, config, option
from grafts.errors import ConfigError
from grafts.methods._files import MethodFiles, Parts
from grafts.methods._registry import Place, method
from grafts.modules.layers import Layer
from grafts.modules.patterns import collapsed
from grafts.sites.attention import AttendingPart, Attention
from grafts.structure.attention_modules import CROSS_ATTENTION, ENCODER_ATTENTION, SELF_ATTENTION

# What ``attention`` of the config may say -> the roles of the attention modules that are meant.
_ROLES = {
    "self": {SELF_ATTENTION},
    "cross": {CROSS_ATTENTION},
    "both": {SELF_ATTENTION, CROSS_ATTENTION},
    "encoder": {ENCODER_ATTENTION},
}


@config
class AdaptionPromptConfig(AdapterConfig):
    """What an adaption prompt is: learned prompts that the top attention modules attend to, through a gate
    that starts at 0.

    >>> AdaptionPromptConfig(adapter_len=10, adapter_layers=30).adapter_layers
    30
    """

    adapter_len: int = option(10, "How many prompt tokens each adapted attention module gets.")
    adapter_layers: int | None = option(
        None, "How many attention modules are adapted, from the top; nothing takes all."
    )
    attention: str = option(
        "self",
        "Which attention of an encoder-decoder: the decoder's self or cross, both, or that of the encoder.",
    )
    after_projection: bool = option(
        False,
        "Add to the module's output and not before its output projection, as files of other libraries mean "
        "it on GPT-2.",
    )

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    own_fields: ClassVar[frozenset[str]] = AdapterConfig.own_fields | {
        "attention",
        "after_projection",
        "modules_to_save",
        "exclude_modules",
    }

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if isinstance(self.target_modules, str) and re.fullmatch(r"[\w.]+", self.target_modules):
            object.__setattr__(self, "target_modules", (self.target_modules,))  # a name, as files have it
        super().__post_init__()
        self.require(
            "adapter_len", isinstance(self.adapter_len, int) and self.adapter_len > 0, "a positive number"
        )
        layers = self.adapter_layers
        self.require(
            "adapter_layers", layers is None or (isinstance(layers, int) and layers > 0), "a positive number"
        )
        self.require("attention", self.attention in _ROLES, f"one of {', '.join(_ROLES)}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A config from plain data; on GPT-2, whose modules `peft` calls attn, it adds after the output
        projection.
        """
        is_gpt2 = data.get("target_modules") in ("attn", ["attn"])
        if is_gpt2 and "after_projection" not in data:
            data = {**data, "after_projection": True}
        return super().from_dict(data)


class AdaptionPromptPart(AttendingPart):
    """An adaption prompt inside one attention module.

    Attributes:
        adaption_prompt: the prompt, ``(1, adapter_len, hidden)``.
        adaption_gate: how much of it is added, ``(1,)``.
    """

    takes_bias = True

    def __init__(self, config: AdaptionPromptConfig, place: Place) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(torch.randn(1, config.adapter_len, place.layer.in_features))
        self.adaption_gate = nn.Parameter(torch.zeros(1))
        self.after_projection = config.after_projection
        self.projections = place.layer.projections

    def beside(self, attention: Attention) -> Tensor:
        """What the heads read from the prompt, times the gate (Zhang et al. 2023, equations 5 to 9).

        The scores of the prompt have a softmax of their own, in float32. The prompt's keys are not rotated. A
        prompt bias of the call (image features, projected; section 3.3 of the paper) is added to the prompt
        of each row.

        Args:
            attention: the call of the kernel.

        Returns:
            ``gate * softmax(q K' * scaling) V``, ``(batch, heads, queries, head_dim)``.
        """
        query = attention.query
        prompt = self.adaption_prompt.to(attention.hidden.dtype)
        if attention.prompt_bias is not None:
            prompt = prompt + attention.prompt_bias.to(prompt.dtype)
        keys, values = attention.project(prompt, self.projections)
        keys = _for_heads(keys.to(query.dtype), query)
        values = _for_heads(values.to(query.dtype), query)
        output = F.scaled_dot_product_attention(query, keys, values, scale=attention.scaling)
        return output * self.adaption_gate.to(output.dtype)


def _for_heads(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values ``(batch or 1, key-value heads, length, head_dim)`` for every row and head of the
    query.
    """
    groups = query.shape[1] // x.shape[1]
    x = x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
    return x.expand(query.shape[0], -1, -1, -1)


def top_layers(
    config: AdaptionPromptConfig, places: Sequence[Place], candidates: Sequence[Place]
) -> list[Place]:
    """The attention modules from the top of each stack that the config asks for.

    Raises:
        ConfigError: a stack has fewer.
    """
    of_roles = [place for place in places if place.role in _ROLES[config.attention]]
    stacks = _stacks([place.path for place in of_roles or places])
    chosen: set[str] = set()
    for name, paths in stacks.items():
        wanted = len(paths) if config.adapter_layers is None else config.adapter_layers
        if wanted > len(paths):
            raise ConfigError(
                f"adapter_layers is {wanted}, and there are {len(paths)} attention modules {name!r}"
            )
        chosen.update(paths[-wanted:])
    return [place for place in places if place.path in chosen]


def _stacks(paths: Sequence[str]) -> dict[str, list[str]]:
    """The same module of each layer together, by its name without the layer's number."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        stacks[collapsed(path)].append(path)
    return stacks


class AdaptionPromptFiles(MethodFiles[AdaptionPromptConfig]):
    """The files of adaption prompts, which name their targets as `peft` does."""

    def config_values(
        self,
        config: AdaptionPromptConfig,
        values: Mapping[str, Any],
        parts: Parts,
        layers: Mapping[str, Layer],
    ) -> Mapping[str, Any]:
        """The targets by the one name that `peft` takes, where they have one; what is added where, if the
        name says otherwise.
        """
        if not parts:
            return {}
        names = {path.rpartition(".")[2] for path in parts}
        if len(names) > 1:
            return {"target_modules": list(parts)}
        (name,) = names
        longest = max(len(paths) for paths in _stacks(list(parts)).values())
        changed = {"target_modules": name, "adapter_layers": values["adapter_layers"] or longest}
        if name == "attn":  # a file that does not say so is read as one of `peft`
            changed["after_projection"] = values.get("after_projection", False)
        return changed


@method(
    "adaption_prompt",
    title="Adaption prompt",
    config=AdaptionPromptConfig,
    layers={"attending"},
    default_roles=lambda config: (_ROLES[config.attention],),
    inert=True,
    mergeable=False,
    source="Zhang et al. 2023, https://arxiv.org/abs/2303.16199",
    narrow=top_layers,
    files=AdaptionPromptFiles(),
)
def adaption_prompt_part(config: AdaptionPromptConfig, place: Place) -> AdaptionPromptPart:
    """The part for one attention module."""
    return AdaptionPromptPart(config, place)
