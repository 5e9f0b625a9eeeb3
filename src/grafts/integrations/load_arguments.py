"""What the arguments of `load_adapter` and `add_adapter` name: configs of any kind, and checkpoints from
anywhere.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grafts.checkpoints import hub
from grafts.checkpoints import peft_format as peft
from grafts.checkpoints.load import read_checkpoint
from grafts.checkpoints.peft_format import Checkpoint
from grafts.config import AdapterConfig
from grafts.errors import ConfigError, did_you_mean
from grafts.integrations.transformers_private import names_today
from grafts.methods._presets import config_from
from grafts.methods._registry import method_named, method_of

_HUB = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download")
_IGNORED = ("_adapter_model_path", "_commit_hash", "proxies")  # what `from_pretrained` passes on besides


def config_of(given: Any) -> AdapterConfig:
    """A config from what a user of `transformers` gives; one of `peft` by what it says of itself.

    Raises:
        TypeError: it is no config.
    """
    if isinstance(given, (AdapterConfig, str)):
        return config_from(given)
    values = given if isinstance(given, Mapping) else given.to_dict() if hasattr(given, "to_dict") else None
    if not isinstance(values, Mapping) or values.get("peft_type") is None:
        raise TypeError(f"adapter_config should be a config of a method. Got {type(given)} instead.")
    kind = values["peft_type"]
    others = {name: value for name, value in values.items() if name not in ("peft_type", "peft_version")}
    return method_named(str(getattr(kind, "value", kind))).config.from_dict(others)


def checkpoint_of(
    model: nn.Module,
    source: str | os.PathLike[str] | None,
    config: AdapterConfig | Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor] | None,
    options: Mapping[str, Any],
    more: Mapping[str, Any],
    load_config: Any,
) -> Checkpoint:
    """The checkpoint that the arguments of `load_adapter` of ``model`` name.

    Raises:
        ConfigError: they name none, or hold an option that is not known.
    """
    caller = dict(getattr(load_config, "download_kwargs", None) or {})
    its_own = getattr(load_config, "pretrained_model_name_or_path", None)
    if source is not None and source != its_own:
        caller.pop("revision", None)  # that of the base
    source = source or its_own
    if source is None and (config is None or tensors is None):
        raise ConfigError(
            "You should either pass a `peft_model_id` or a `peft_config` and `adapter_state_dict` to load an "
            "adapter."
        )
    known = (*_HUB, "allow_pickle", "key_mapping", *_IGNORED)
    if strange := [name for name in more if name not in known]:
        raise ConfigError(
            f"adapter_kwargs has no {strange[0]!r}; {did_you_mean(strange[0], known[: -len(_IGNORED)])}"
        )
    chosen = {name: caller[name] for name in _HUB if caller.get(name)}
    chosen |= {
        name: value for name, value in {**more, **options}.items() if value is not None and name in _HUB
    }
    if config is not None and tensors is not None:
        path = Path("state dict")
        made = config_of(config)
    else:
        assert source is not None
        path = hub.fetch(source, **chosen)
        pickled = bool(more.get("allow_pickle")) or getattr(load_config, "use_safetensors", None) is False
        checkpoint = read_checkpoint(path, allow_pickle=pickled)
        if tensors is None and config is None:
            return _renamed(model, checkpoint, more.get("key_mapping"))
        made = checkpoint.config if config is None else config_of(config)
        tensors = checkpoint.tensors if tensors is None else tensors
    method = method_of(made)
    by_module = method.files is None and method.members is None
    named = {
        peft.PREFIX + name.removeprefix(peft.PREFIX) if by_module else name: t for name, t in tensors.items()
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    return _renamed(model, Checkpoint(path, made, named, size), more.get("key_mapping"))


def _renamed(model: nn.Module, checkpoint: Checkpoint, mapping: Mapping[str, str] | None) -> Checkpoint:
    """A checkpoint whose tensors have the names that the model's modules have today.

    Args:
        model: the base model.
        checkpoint: as it was read.
        mapping: regular expression -> what takes its place in the path of a module; names that begin with no
            module of the model get those by which `transformers` loads older checkpoints of it.
    """
    if checkpoint.layout != "peft":
        return checkpoint
    children = {name for name, _ in model.named_children()}
    paths = {name: name.removeprefix(peft.PREFIX) for name in checkpoint.tensors}
    for pattern, by in (mapping or {}).items():
        paths = {name: re.sub(pattern, by, path) for name, path in paths.items()}
    of_modules = {name: path for name, path in paths.items() if name.startswith(peft.PREFIX)}
    today = names_today(model, [path for path in of_modules.values() if path.split(".")[0] not in children])
    paths |= {name: peft.PREFIX + today.get(path, path) for name, path in of_modules.items()}
    return dataclasses.replace(
        checkpoint, tensors={paths[name]: tensor for name, tensor in checkpoint.tensors.items()}
    )
