"""grafts: small trainable adapters on frozen PyTorch models.

Verbs over any `nn.Module`, in place, each with its inverse: `add`/`delete`, `activate`/`deactivate`,
`train_only`, `save`/`load`, `merge`/`unmerge`, and `detach`, which undoes everything; `plan` shows what `add`
would do, `adapters` what is there. Configs of all methods are found here by their name, as in
``grafts.LoraConfig``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grafts.checkpoints.hotswap import hotswap, reserve
    from grafts.checkpoints.hub import fetch, push
    from grafts.checkpoints.load import LoadReport, load
    from grafts.checkpoints.model_card import About
    from grafts.checkpoints.save import save
    from grafts.config import AdapterConfig
    from grafts.errors import (
        AdapterNameError,
        CheckpointError,
        ConfigError,
        GraftsError,
        InterfaceError,
        MergeError,
        StateError,
        UnmatchedTargetError,
        UnsupportedTargetError,
    )
    from grafts.integrations.adapterhub_methods import AdapterMethod
    from grafts.integrations.from_pretrained import from_pretrained, integrate
    from grafts.integrations.peft_models import AdaptionPromptModel, IA3Model
    from grafts.integrations.transformers_init import deinit, init
    from grafts.integrations.transformers_mixin import PeftAdapterMixin
    from grafts.lifecycle.activate import activate, active, deactivate, train_only
    from grafts.lifecycle.attach import add, bare, delete, detach
    from grafts.lifecycle.combine import combine
    from grafts.lifecycle.merge import MergeReport, merge, unmerge, verify_merge
    from grafts.lifecycle.plan import Plan
    from grafts.lifecycle.resolve import plan
    from grafts.lifecycle.status import AdapterStatus, adapters
    from grafts.methods._presets import config_from
    from grafts.methods.adalora import AdaLoraConfig, RankAllocator, rank_allocator
    from grafts.methods.adaption_prompt import AdaptionPromptConfig
    from grafts.methods.bottleneck import BnConfig
    from grafts.methods.ia3 import IA3Config
    from grafts.methods.invertible import InvertibleConfig
    from grafts.methods.lora import LoraConfig
    from grafts.methods.p_tuning import PromptEncoderConfig
    from grafts.methods.prefix_tuning import PrefixTuningConfig
    from grafts.methods.prompt_tuning import PromptTuningConfig
    from grafts.methods.reft import ReftConfig
    from grafts.methods.union import UnionConfig
    from grafts.structure.infer import infer_interface
    from grafts.structure.interface import AdapterModelInterface

__version__ = "0.1.0"

_HOMES = {
    "grafts.checkpoints.hotswap": ("hotswap", "reserve"),
    "grafts.checkpoints.hub": ("fetch", "push"),
    "grafts.checkpoints.load": ("LoadReport", "load"),
    "grafts.checkpoints.model_card": ("About",),
    "grafts.checkpoints.save": ("save",),
    "grafts.config": ("AdapterConfig",),
    "grafts.errors": (
        "AdapterNameError",
        "CheckpointError",
        "ConfigError",
        "GraftsError",
        "InterfaceError",
        "MergeError",
        "StateError",
        "UnmatchedTargetError",
        "UnsupportedTargetError",
    ),
    "grafts.integrations.adapterhub_methods": ("AdapterMethod",),
    "grafts.integrations.from_pretrained": ("from_pretrained", "integrate"),
    "grafts.integrations.peft_models": ("AdaptionPromptModel", "IA3Model"),
    "grafts.integrations.transformers_init": ("deinit", "init"),
    "grafts.integrations.transformers_mixin": ("PeftAdapterMixin",),
    "grafts.lifecycle.activate": ("activate", "active", "deactivate", "train_only"),
    "grafts.lifecycle.attach": ("add", "bare", "delete", "detach"),
    "grafts.lifecycle.combine": ("combine",),
    "grafts.lifecycle.merge": ("MergeReport", "merge", "unmerge", "verify_merge"),
    "grafts.lifecycle.plan": ("Plan",),
    "grafts.lifecycle.resolve": ("plan",),
    "grafts.lifecycle.status": ("AdapterStatus", "adapters"),
    "grafts.methods._presets": ("config_from",),
    "grafts.methods.adalora": ("AdaLoraConfig", "RankAllocator", "rank_allocator"),
    "grafts.methods.adaption_prompt": ("AdaptionPromptConfig",),
    "grafts.methods.bottleneck": ("BnConfig",),
    "grafts.methods.ia3": ("IA3Config",),
    "grafts.methods.invertible": ("InvertibleConfig",),
    "grafts.methods.lora": ("LoraConfig",),
    "grafts.methods.p_tuning": ("PromptEncoderConfig",),
    "grafts.methods.prefix_tuning": ("PrefixTuningConfig",),
    "grafts.methods.prompt_tuning": ("PromptTuningConfig",),
    "grafts.methods.reft": ("ReftConfig",),
    "grafts.methods.union": ("UnionConfig",),
    "grafts.structure.infer": ("infer_interface",),
    "grafts.structure.interface": ("AdapterModelInterface",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "About",
    "AdaLoraConfig",
    "AdapterConfig",
    "AdapterMethod",
    "AdapterModelInterface",
    "AdapterNameError",
    "AdapterStatus",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "BnConfig",
    "CheckpointError",
    "ConfigError",
    "GraftsError",
    "IA3Config",
    "IA3Model",
    "InterfaceError",
    "InvertibleConfig",
    "LoadReport",
    "LoraConfig",
    "MergeError",
    "MergeReport",
    "PeftAdapterMixin",
    "Plan",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "RankAllocator",
    "ReftConfig",
    "StateError",
    "UnionConfig",
    "UnmatchedTargetError",
    "UnsupportedTargetError",
    "activate",
    "active",
    "adapters",
    "add",
    "bare",
    "combine",
    "config_from",
    "deactivate",
    "deinit",
    "delete",
    "detach",
    "fetch",
    "from_pretrained",
    "hotswap",
    "infer_interface",
    "init",
    "integrate",
    "load",
    "merge",
    "plan",
    "push",
    "rank_allocator",
    "reserve",
    "save",
    "train_only",
    "unmerge",
    "verify_merge",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name.endswith("Config"):
        for method in importlib.import_module("grafts.methods").methods():
            if method.config.__name__ == name:
                return method.config
    raise AttributeError(f"module 'grafts' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
