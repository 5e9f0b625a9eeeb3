"""grafts: small trainable adapters on frozen PyTorch models.

Verbs over any `nn.Module`, in place, each with its inverse: `add`/`delete`, `activate`/`deactivate`, `train_only`,
`save`/`load`, `merge`/`unmerge`, and `detach`, which undoes everything; `plan` shows what `add` would do, `adapters` what
is there. Configs of all methods are found here by their name, as in ``grafts.LoraConfig``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grafts.checkpoints.adapters import LoadReport, load, save
    from grafts.config import AdapterConfig
    from grafts.errors import (
        AdapterNameError,
        CheckpointError,
        ConfigError,
        GraftsError,
        MergeError,
        StateError,
        UnmatchedTargetError,
        UnsupportedTargetError,
    )
    from grafts.merging import merge, unmerge
    from grafts.methods.lora import LoraConfig
    from grafts.planning import Plan, plan
    from grafts.registry import (
        AdapterStatus,
        activate,
        active,
        adapters,
        add,
        deactivate,
        delete,
        detach,
        train_only,
    )

__version__ = "0.1.0"

_HOMES = {
    "grafts.checkpoints.adapters": ("LoadReport", "load", "save"),
    "grafts.config": ("AdapterConfig",),
    "grafts.errors": (
        "AdapterNameError",
        "CheckpointError",
        "ConfigError",
        "GraftsError",
        "MergeError",
        "StateError",
        "UnmatchedTargetError",
        "UnsupportedTargetError",
    ),
    "grafts.merging": ("merge", "unmerge"),
    "grafts.methods.lora": ("LoraConfig",),
    "grafts.planning": ("Plan", "plan"),
    "grafts.registry": (
        "AdapterStatus",
        "activate",
        "active",
        "adapters",
        "add",
        "deactivate",
        "delete",
        "detach",
        "train_only",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterConfig",
    "AdapterNameError",
    "AdapterStatus",
    "CheckpointError",
    "ConfigError",
    "GraftsError",
    "LoadReport",
    "LoraConfig",
    "MergeError",
    "Plan",
    "StateError",
    "UnmatchedTargetError",
    "UnsupportedTargetError",
    "activate",
    "active",
    "adapters",
    "add",
    "deactivate",
    "delete",
    "detach",
    "load",
    "merge",
    "plan",
    "save",
    "train_only",
    "unmerge",
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
