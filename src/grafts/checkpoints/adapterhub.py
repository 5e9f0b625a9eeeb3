"""The layout of AdapterHub, for prefix tuning and prompt tuning.

``adapter_config.json`` holds the method's config under ``config``; the tensors lie in ``pytorch_adapter.bin``, a pickle, or
``adapter.safetensors``. Of the copies of a prefix at every layer that AdapterHub writes only that of the pool is needed.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from grafts.checkpoints.files import find
from grafts.checkpoints.peft import CONFIG_FILE, Checkpoint, read_json, read_pickle
from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.methods import FileTarget, Parts
from grafts.methods.prefix_tuning import LOCATIONS, PrefixPart, PrefixTuningConfig
from grafts.methods.prompt_tuning import PromptPart, PromptTuningConfig
from grafts.virtual import PREFIX, PROMPT

PICKLE_FILE, TENSOR_FILE = "pytorch_adapter.bin", "adapter.safetensors"
_POOL = re.compile(r"(?:.*\.)?prefix_tuning\.prefix_tunings\.[^.]+\.(\w+)_prefix\.(.+)")
_PROMPT = re.compile(r"(?:.*\.)?prompt_tuning\.prompt_tunings\.[^.]+\.prompt_embedding\.weight")
_GATE = re.compile(r"(.+)\.prefix_tuning\.prefix_gates\.[^.]+\.(weight|bias)")


def recognises(directory: Path) -> bool:
    """Whether a directory's ``adapter_config.json`` is one of this layout."""
    file = find(directory, CONFIG_FILE)
    if file is None:
        return False
    try:
        data = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(data, dict) and isinstance(data.get("config"), dict) and "peft_type" not in data


def read(directory: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read an adapter's directory; its tensors are named as this library's own files name them.

    A prefix that an MLP makes is read as the prefix that it has made.

    Raises:
        CheckpointError: a file is missing, broken, or pickled without ``allow_pickle``.
        ConfigError: the method or an option is not known.
    """
    data = read_json(directory)
    config = _config(data["config"], directory)
    file = find(directory, TENSOR_FILE)
    if file is not None:
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(file)!r} is not a whole safetensors file: {error}") from error
    else:
        file = find(directory, PICKLE_FILE)
        if file is None:
            raise CheckpointError(f"{str(directory)!r} holds no {PICKLE_FILE} and no {TENSOR_FILE}")
        tensors = read_pickle(file, allow_pickle)
    return Checkpoint(directory, config, _named(tensors, config, directory), file.stat().st_size)


def _config(values: Mapping[str, Any], directory: Path) -> PrefixTuningConfig | PromptTuningConfig:
    """The config of this library.

    Raises:
        ConfigError: it is that of another method, or asks for what cannot be honoured.
    """
    if values.get("architecture") == "prompt_tuning":
        combine = values.get("combine")
        if combine not in ("prefix", "prefix_after_bos"):
            raise ConfigError(f"{str(directory)!r}: combine={combine!r} cannot be honoured here")
        return PromptTuningConfig.from_dict(
            {
                "num_virtual_tokens": values.get("prompt_length"),
                "after_first": combine == "prefix_after_bos",
                "after_embeddings": True,
            }
        )
    if values.get("architecture") != "prefix_tuning":
        raise ConfigError(
            f"{str(directory)!r} holds an adapter of AdapterHub with architecture {values.get('architecture')!r}; "
            "of that layout this version reads prefix_tuning and prompt_tuning"
        )
    for option, may_be in (("leave_out", ([], None)), ("non_linearity", ("tanh", None))):
        if values.get(option) not in may_be:
            raise ConfigError(f"{str(directory)!r}: {option}={values[option]!r} cannot be honoured here")
    return PrefixTuningConfig.from_dict(
        {
            "num_virtual_tokens": values.get("prefix_length"),
            "use_gating": bool(values.get("use_gating", False)),
            "count_positions": False,
            "attention": tuple(LOCATIONS),
        }
    )


def _named(
    tensors: Mapping[str, Tensor], config: PrefixTuningConfig | PromptTuningConfig, directory: Path
) -> dict[str, Tensor]:
    """The prefix of each location, and the gates, by the names of this library's files."""
    pools: dict[str, dict[str, Tensor]] = defaultdict(dict)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".pool." in name:
            continue
        if match := _POOL.fullmatch(name):
            pools[match[1]][match[2]] = tensor
        elif _PROMPT.fullmatch(name):
            result[PROMPT] = tensor
        elif match := _GATE.fullmatch(name):
            result[f"{PREFIX}{match[1]}.gate.{match[2]}"] = tensor.expand(2, *tensor.shape[1:])  # one for both
        else:
            raise CheckpointError(f"{str(directory)!r}: {name!r} is no tensor of a prefix or a prompt")
    for location, pool in pools.items():
        if "control_trans" in pool:
            flat, length = pool["control_trans"], config.num_virtual_tokens
            if flat.numel() % length:
                raise CheckpointError(f"{str(directory)!r}: a prefix of {flat.numel()} numbers is none of {length} tokens")
            numbers = flat.view(length, -1)
        else:
            weights = (pool[f"control_trans.{layer}.{kind}"] for layer in (0, 2) for kind in ("weight", "bias"))
            first, first_bias, last, last_bias = weights
            numbers = torch.tanh(pool["wte.weight"] @ first.T + first_bias) @ last.T + last_bias
        result[f"{PROMPT}.{location}"] = numbers
    return result


def refuse_relative(model: nn.Module) -> None:
    """Refuse a model whose attention counts distances (T5).

    Raises:
        ConfigError: saying why.
    """
    if getattr(getattr(model, "config", None), "relative_attention_num_buckets", None) is not None:
        raise ConfigError(
            f"AdapterHub moves the distances between the tokens of a {type(model).__name__} by the length of the prefix, "
            "so its prefixes mean something else there: this layout is not exchanged for such models"
        )


def fitted(tensors: Mapping[str, Tensor], targets: Sequence[FileTarget]) -> dict[str, Tensor]:
    """The tensors with the paths of this model, where they were saved from the model within it, or one around it."""
    paths = [path for path, _, _ in targets]

    def here(path: str) -> str:
        return next((p for p in paths if p == path or p.endswith(f".{path}") or path.endswith(f".{p}")), path)

    result = {}
    for name, tensor in tensors.items():
        path, separator, rest = name.removeprefix(PREFIX).partition(".gate.")
        result[f"{PREFIX}{here(path)}{separator}{rest}" if separator else name] = tensor
    return result


def files_of(model: nn.Module, name: str, config: AdapterConfig, parts: Parts, roles: Mapping[str, str]) -> dict[str, bytes]:
    """The files of an adapter's checkpoint, by name.

    Args:
        model: the model that carries it.
        name: the adapter's.
        config: its config.
        parts: its parts by path.
        roles: what the attention modules are there for, by path.

    Raises:
        ConfigError: its method, or what it asks for, has no place in this layout.
    """
    base = getattr(model, "base_model", model)
    root = next((path for path, module in model.named_modules() if module is base and path), "")
    if isinstance(config, PromptTuningConfig):
        return _files(model, name, _prompt_values(name, config), _prompt_tensors(f"{root}.prompt_tuning", name, parts))
    refuse_relative(model)
    own = {path: part for path, part in parts.items() if isinstance(part, PrefixPart)}
    if not isinstance(config, PrefixTuningConfig) or not own:
        raise ConfigError(
            f"adapter {name!r} is a {type(config).__name__}; the layout of AdapterHub is here for prefixes and prompts"
        )
    if len(own) < len(parts):
        raise ConfigError(f"adapter {name!r} counts positions or has parts of its own elsewhere, which AdapterHub does not")
    pool = f"{root}.prefix_tuning.prefix_tunings.{name}".lstrip(".")
    numbers: dict[str, list[Tensor]] = defaultdict(list)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, part in own.items():
            location = next(location for location, role in LOCATIONS.items() if role == roles[path])
            numbers[location].append(part.numbers())
            for kind, gate in part.gate.named_parameters() if part.gate is not None else ():
                tensors[f"{path}.prefix_tuning.prefix_gates.{name}.{kind}"] = gate.detach().cpu().clone()
    for location, some in numbers.items():
        tensors[f"{pool}.{location}_prefix.control_trans"] = torch.cat(some, 1).flatten().cpu()
    values = {
        "architecture": "prefix_tuning",
        "bottleneck_size": config.encoder_hidden_size or 512,
        "cross_prefix": "cross" in numbers,
        "dropout": 0.0,
        "encoder_prefix": "encoder" in numbers,
        "flat": True,
        "init_weights_seed": None,
        "leave_out": [],
        "non_linearity": "tanh",
        "prefix_length": config.num_virtual_tokens,
        "shared_gating": False,
        "use_gating": config.use_gating,
    }
    return _files(model, name, values, tensors)


def _prompt_values(name: str, config: PromptTuningConfig) -> dict[str, Any]:
    if not config.after_embeddings:
        raise ConfigError(f"adapter {name!r}: AdapterHub puts virtual tokens behind the embeddings: after_embeddings=True")
    return {
        "architecture": "prompt_tuning",
        "combine": "prefix_after_bos" if config.after_first else "prefix",
        "init_weights_seed": None,
        "prompt_init": "random_uniform",
        "prompt_init_text": None,
        "prompt_length": config.num_virtual_tokens,
    }


def _prompt_tensors(root: str, name: str, parts: Parts) -> dict[str, Tensor]:
    prompts = {path: part for path, part in parts.items() if isinstance(part, PromptPart) and part.prompt is not None}
    if len(prompts) != len(parts):
        raise ConfigError(f"adapter {name!r} has parts of its own elsewhere, which have no place in that layout")
    [part] = prompts.values()
    return {f"{root}.prompt_tunings.{name}.prompt_embedding.weight".lstrip("."): part.virtual().detach().cpu().clone()}


def _files(model: nn.Module, name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The files that hold a config and tensors."""
    own_config = getattr(model, "config", None)
    about = {
        "config": values,
        "hidden_size": getattr(own_config, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": getattr(own_config, "_name_or_path", "") or "",
        "model_type": getattr(own_config, "model_type", None),
        "name": name,
        "version": "adapters.1.3.0",
    }
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    return {PICKLE_FILE: buffer.getvalue(), CONFIG_FILE: (json.dumps(about, indent=2, sort_keys=True) + "\n").encode()}
