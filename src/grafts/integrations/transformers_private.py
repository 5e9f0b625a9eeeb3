"""The names of `transformers` that are private to it, or not meant to be replaced, each where no public one
would do.

Nothing else of this package touches one, but for the last two below, which have to be read where they are
needed.

- `Trainer._load_from_checkpoint`, `Trainer._load_best_model`: what a Trainer calls to resume, and to end with
  the best model. They know models, and adapters inside a `peft.PeftModel`; for adapters on a model itself
  they find nothing to load.
- `is_peft_available` in the modules below: the question before a folder is looked at as an adapter.
  `transformers` asks whether `peft` is installed, where the model's own ``load_adapter`` is all that it calls
  then.
- `PreTrainedModel.load_adapter`: what ``from_pretrained`` calls once it has loaded the base that a folder
  names.
- `get_model_conversion_mapping` and, before 5, ``_checkpoint_conversion_mapping`` of a model: what the
  modules of older checkpoints are called today.
- ``_no_split_modules`` of a model: which of its modules have to stay on one device, which `accelerate` asks
  for.
- ``_attn_implementation`` of a config, in `grafts.sites.attention`: the name of the kernel that an attention
  module fetches. `transformers` says it in no other way, and modules read it under that name.
- ``_hf_hook`` of a module, in `grafts.modules.tree` and `grafts.integrations.device_map`: the hook with which
  `accelerate` spreads a model.

What the arguments of a call are called in which version is no private matter; `grafts.sites.arguments` knows
it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

TRAINER_LOADS = ("_load_from_checkpoint", "_load_best_model")
_ASKING = (
    "integrations.peft",
    "models.auto.auto_factory",
    "pipelines",
    "modeling_utils",
)  # the last before 5


def trainer_class() -> Any:
    """The class of the Trainer, or None where there is no `transformers`, or not what its Trainer needs
    (`accelerate`).
    """
    try:
        return importlib.import_module("transformers.trainer").Trainer
    except ImportError:
        return None


def model_class() -> Any:
    """The class that all models of `transformers` inherit from; it brings ``load_adapter`` and
    ``from_pretrained``.
    """
    return importlib.import_module("transformers.modeling_utils").PreTrainedModel


def asking_for_peft() -> Iterator[Any]:
    """The modules that ask ``is_peft_available()`` before they look at a folder as an adapter."""
    for name in _ASKING:
        module = importlib.import_module(f"transformers.{name}")
        if hasattr(module, "is_peft_available"):
            yield module


def unsplit_modules(model: nn.Module) -> list[str]:
    """The names of the module classes that have to stay on one device, as the model says; none where it says
    nothing.
    """
    return list(getattr(model, "_no_split_modules", None) or ())


def names_today(model: nn.Module, paths: Collection[str]) -> dict[str, str]:
    """The names that tensors of an older checkpoint have in ``model``; the same where `transformers` knows no
    other.
    """
    # Before version 5 a model itself says it.
    names = {path: path for path in paths}
    for pattern, by in getattr(model, "_checkpoint_conversion_mapping", {}).items():
        names = {path: re.sub(pattern, by, name) for path, name in names.items()}
    # Since then a module of its own does, whose steps may also split or join tensors; those are passed over.
    try:
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping
    except (ImportError, AttributeError):
        return names
    for step in mapping(model) if paths and hasattr(model, "config") else ():
        if len(step.target_patterns) == 1 and type(step).__name__ in ("WeightRenaming", "PrefixChange"):
            names = {path: step.rename_source_key(name)[0] for path, name in names.items()}
    return names
