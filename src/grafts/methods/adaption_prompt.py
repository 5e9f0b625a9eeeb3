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
from grafts.methods._registry import Parts, Place, method
from grafts.modules.patterns import collapsed
from grafts.sites.attention import AttendingPart, Attention
from grafts.structure.attention_modules import CROSS_ATTENTION, ENCODER_ATTENTION, SELF_ATTENTION

_ROLES = {"self": {SELF_ATTENTION}, "cross": {CROSS_ATTENTION}, "both": {SELF_ATTENTION, CROSS_ATTENTION}}
_ROLES["encoder"] = {ENCODER_ATTENTION}


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
        legacy = "after_projection" not in data and data.get("target_modules") in ("attn", ["attn"])
        return super().from_dict({**data, "after_projection": True} if legacy else data)


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
        keys, values = (_for_heads(x.to(query.dtype), query) for x in (keys, values))
        read = F.scaled_dot_product_attention(query, keys, values, scale=attention.scaling)
        return read * self.adaption_gate.to(read.dtype)


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
    heard = [place for place in places if place.role in _ROLES[config.attention]] or places
    stacks: dict[str, list[Place]] = defaultdict(list)
    for place in heard:
        stacks[collapsed(place.path)].append(place)
    wanted = config.adapter_layers
    for name, stack in stacks.items():
        if wanted is not None and wanted > len(stack):
            raise ConfigError(
                f"adapter_layers is {wanted}, and there are {len(stack)} attention modules {name!r}"
            )
    chosen = {place.path for stack in stacks.values() for place in stack[-(wanted or len(stack)) :]}
    return [place for place in places if place.path in chosen]


def file_values(values: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The targets by the one name that `peft` takes, where they have one; what is added where, if the name
    says otherwise.
    """
    names = sorted({path.rpartition(".")[2] for path in parts})
    changed: dict[str, Any] = {"target_modules": names[0] if len(names) == 1 else list(parts)}
    if names == ["attn"]:  # a file that does not say so is read as one of `peft`
        changed["after_projection"] = values.get("after_projection", False)
    if len(names) == 1:
        stacks: dict[str, int] = defaultdict(int)
        for path in parts:
            stacks[collapsed(path)] += 1
        changed["adapter_layers"] = values["adapter_layers"] or max(stacks.values())
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
    file_values=file_values,
)
def adaption_prompt_part(config: AdaptionPromptConfig, place: Place) -> AdaptionPromptPart:
    """The part for one attention module."""
    return AdaptionPromptPart(config, place)
