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

# The options of getting something from the hub.
_HUB = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download")
# What `from_pretrained` passes on besides.
_IGNORED = ("_adapter_model_path", "_commit_hash", "proxies")


def config_of(argument: Any) -> AdapterConfig:
    """A config from what a user of `transformers` gives; one of `peft` by what it says of itself.

    Args:
        argument: a config of this library or of `peft`, its plain data, or a text.

    Raises:
        TypeError: it is no config.
    """
    if isinstance(argument, (AdapterConfig, str)):
        return config_from(argument)
    # Not by its class: `peft` need not be installed.
    values = argument
    if not isinstance(argument, Mapping) and hasattr(argument, "to_dict"):
        values = argument.to_dict()
    if not isinstance(values, Mapping) or values.get("peft_type") is None:
        raise TypeError(f"adapter_config should be a config of a method. Got {type(argument)} instead.")
    peft_type = values["peft_type"]
    peft_type = getattr(peft_type, "value", peft_type)  # `peft` has an enumeration of them
    options = {}
    for name, value in values.items():
        if name not in ("peft_type", "peft_version"):
            options[name] = value
    config_class: type[AdapterConfig] = method_named(str(peft_type)).config
    return config_class.from_dict(options)


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

    Args:
        model: the base model.
        source: a folder or a repository; that of the model itself if neither it nor the rest is given.
        config: in place of the file's.
        tensors: in place of the file's.
        options: how to get the source, as arguments of `load_adapter`; None for not given.
        more: more of these, as ``adapter_kwargs``.
        load_config: how `from_pretrained` was called, where it calls this; else None.

    Raises:
        ConfigError: they name none, or hold an option that is not known.
    """
    _require_known(more)
    key_mapping = more.get("key_mapping")
    # From memory alone.
    if config is not None and tensors is not None:
        return _renamed(model, _in_memory(config_of(config), tensors), key_mapping)

    # From a folder or a repository, of which config or tensors may be replaced.
    own_source = getattr(load_config, "pretrained_model_name_or_path", None)
    wanted = source or own_source
    if wanted is None:
        raise ConfigError(
            "You should either pass a `peft_model_id` or a `peft_config` and `adapter_state_dict` to load an "
            "adapter."
        )
    is_another = source is not None and source != own_source
    where = _download_options(load_config, more, options, is_another=is_another)
    path = hub.fetch(wanted, **where)
    accepts_pickle = getattr(load_config, "use_safetensors", None) is False
    allow_pickle = bool(more.get("allow_pickle")) or accepts_pickle
    checkpoint = read_checkpoint(path, allow_pickle=allow_pickle)
    if tensors is not None:
        checkpoint = _in_memory(checkpoint.config, tensors, path)
    elif config is not None:
        checkpoint = _in_memory(config_of(config), checkpoint.tensors, path)
    return _renamed(model, checkpoint, key_mapping)


def _require_known(more: Mapping[str, Any]) -> None:
    """Refuse an option that nothing knows.

    Raises:
        ConfigError: naming it, and the nearest.
    """
    known = (*_HUB, "allow_pickle", "key_mapping")
    for name in more:
        if name not in known and name not in _IGNORED:
            raise ConfigError(f"adapter_kwargs has no {name!r}; {did_you_mean(name, known)}")


def _download_options(
    load_config: Any, more: Mapping[str, Any], options: Mapping[str, Any], *, is_another: bool
) -> dict[str, Any]:
    """How to get a source from the hub: what `from_pretrained` was told, and over it what `load_adapter` was.

    Args:
        load_config: how `from_pretrained` was called, or None.
        more: ``adapter_kwargs``.
        options: the arguments of `load_adapter`.
        is_another: the source is not the model's own, so that the revision of the model says nothing of it.
    """
    of_caller = dict(getattr(load_config, "download_kwargs", None) or {})
    if is_another:
        of_caller.pop("revision", None)
    chosen = {name: of_caller[name] for name in _HUB if of_caller.get(name)}
    # The later ones go before the earlier ones.
    for values in (more, options):
        for name in _HUB:
            if values.get(name) is not None:
                chosen[name] = values[name]
    return chosen


def _in_memory(
    config: AdapterConfig, tensors: Mapping[str, Tensor], path: Path = Path("state dict")
) -> Checkpoint:
    """A checkpoint of a config and tensors; names of modules may come without what a file puts before
    them.
    """
    method = method_of(config)
    lie_by_module = not method.files.is_packed and method.members is None
    named = dict(tensors)
    if lie_by_module:
        named = {peft.PREFIX + name.removeprefix(peft.PREFIX): tensor for name, tensor in tensors.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in named.values())
    return Checkpoint(path, config, named, size)


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
    # What the caller says first.
    paths = {}
    for name in checkpoint.tensors:
        path = name.removeprefix(peft.PREFIX)
        for pattern, replacement in (mapping or {}).items():
            path = re.sub(pattern, replacement, path)
        paths[name] = path
    # Then what `transformers` knows, for names that the model has nothing of.
    children = {name for name, _ in model.named_children()}
    by_module = {path for name, path in paths.items() if name.startswith(peft.PREFIX)}
    today = names_today(model, [path for path in by_module if path.split(".")[0] not in children])
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        path = paths[name]
        if name.startswith(peft.PREFIX):
            path = peft.PREFIX + today.get(path, path)
        tensors[path] = tensor
    return dataclasses.replace(checkpoint, tensors=tensors)
