"""grafts: small trainable adapters on frozen PyTorch models.

Verbs over any `nn.Module`, in place, each with its inverse: `add`/`delete`, `activate`/`deactivate`, `train_only`,
`save`/`load`, `merge`/`unmerge`, and `detach`, which undoes everything; `plan` shows what `add` would do, `adapters` what
is there. Configs of all methods are found here by their name, as in ``grafts.LoraConfig``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grafts.adapter_method import AdapterMethod
    from grafts.checkpoints.cards import About
    from grafts.checkpoints.hub import fetch, push
    from grafts.checkpoints.loading import LoadReport, load
    from grafts.checkpoints.saving import save
    from grafts.checkpoints.swapping import hotswap, reserve
    from grafts.combining import combine
    from grafts.config import AdapterConfig
    from grafts.config_strings import config_from
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
    from grafts.faces.mixin import PeftAdapterMixin
    from grafts.faces.peft import AdaptionPromptModel, IA3Model
    from grafts.faces.pretrained import from_pretrained, integrate
    from grafts.faces.transformers import deinit, init
    from grafts.inferring import infer_interface
    from grafts.interface import AdapterModelInterface
    from grafts.merging import MergeReport, merge, unmerge, verify_merge
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
    from grafts.planning import Plan, plan
    from grafts.registry import (
        activate,
        active,
        add,
        bare,
        deactivate,
        delete,
        detach,
        train_only,
    )
    from grafts.status import AdapterStatus, adapters

__version__ = "0.1.0"

_HOMES = {
    "grafts.checkpoints.cards": ("About",),
    "grafts.checkpoints.hub": ("fetch", "push"),
    "grafts.faces.pretrained": ("from_pretrained", "integrate"),
    "grafts.faces.mixin": ("PeftAdapterMixin",),
    "grafts.faces.transformers": ("deinit", "init"),
    "grafts.checkpoints.loading": ("LoadReport", "load"),
    "grafts.checkpoints.saving": ("save",),
    "grafts.checkpoints.swapping": ("hotswap", "reserve"),
    "grafts.combining": ("combine",),
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
    "grafts.faces.peft": ("AdaptionPromptModel", "IA3Model"),
    "grafts.merging": ("MergeReport", "merge", "unmerge", "verify_merge"),
    "grafts.config_strings": ("config_from",),
    "grafts.inferring": ("infer_interface",),
    "grafts.interface": ("AdapterModelInterface",),
    "grafts.adapter_method": ("AdapterMethod",),
    "grafts.methods.bottleneck": ("BnConfig",),
    "grafts.methods.invertible": ("InvertibleConfig",),
    "grafts.methods.reft": ("ReftConfig",),
    "grafts.methods.union": ("UnionConfig",),
    "grafts.methods.adalora": ("AdaLoraConfig", "RankAllocator", "rank_allocator"),
    "grafts.methods.adaption_prompt": ("AdaptionPromptConfig",),
    "grafts.methods.ia3": ("IA3Config",),
    "grafts.methods.lora": ("LoraConfig",),
    "grafts.methods.p_tuning": ("PromptEncoderConfig",),
    "grafts.methods.prefix_tuning": ("PrefixTuningConfig",),
    "grafts.methods.prompt_tuning": ("PromptTuningConfig",),
    "grafts.planning": ("Plan", "plan"),
    "grafts.registry": (
        "activate",
        "active",
        "add",
        "bare",
        "deactivate",
        "delete",
        "detach",
        "train_only",
    ),
    "grafts.status": ("AdapterStatus", "adapters"),
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
