"""The layout of AdapterHub.

``adapter_config.json`` holds the method's config under ``config``; the tensors lie in
``pytorch_adapter.bin``, a pickle, or ``adapter.safetensors``. How each method's config and tensors are named
there is in `grafts.checkpoints.adapterhub_layouts`.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafts.checkpoints.atomic_write import find
from grafts.checkpoints.interface_file import VERSION, interface_file
from grafts.checkpoints.peft_format import CONFIG_FILE, Checkpoint, read_json, read_pickle, read_tensors
from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.lifecycle.plan import Plan
from grafts.methods._registry import Parts
from grafts.methods.union import UnionConfig
from grafts.structure.infer import inferred
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.roles import ModelView, look_at

PICKLE_FILE, TENSOR_FILE = "pytorch_adapter.bin", "adapter.safetensors"


def _methods() -> Any:
    """How each method is written; it knows all of them, and so comes only where a file of this layout
    does.
    """
    return importlib.import_module("grafts.checkpoints.adapterhub_layouts")


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
    """Read an adapter's directory; its tensors are still named as in the file (see `fitted`).

    Raises:
        CheckpointError: a file is missing, broken, or pickled without ``allow_pickle``.
        ConfigError: the method or an option is not known.
    """
    data = read_json(directory)
    try:
        config = _config(_of_version(data["config"], data.get("version")))
    except ConfigError as error:
        raise ConfigError(f"{str(directory)!r}: {error}") from error
    file = find(directory, TENSOR_FILE)
    if file is not None:
        return Checkpoint(directory, config, read_tensors(file), file.stat().st_size, "adapterhub")
    file = find(directory, PICKLE_FILE)
    if file is None:
        raise CheckpointError(f"{str(directory)!r} holds no {PICKLE_FILE} and no {TENSOR_FILE}")
    return Checkpoint(directory, config, read_pickle(file, allow_pickle), file.stat().st_size, "adapterhub")


def _of_version(values: Mapping[str, Any], version: Any) -> dict[str, Any]:
    """A config as the newest version writes it: before any said its number, ``gelu`` was another function."""
    values = dict(values)
    if version is None:
        renamed = {"gelu": "gelu_new", "gelu_orig": "gelu"}
        values["non_linearity"] = renamed.get(values.get("non_linearity", ""), values.get("non_linearity"))
    number = str(version or "").removeprefix("adapters.").split(".")
    if values.get("architecture") == "lora" and number[:1] in (["0"], ["1"]) and number < ["1", "1"]:
        values["alpha"] = values.get("r")  # what those versions computed with
    return {name: value for name, value in values.items() if name != "non_linearity" or value is not None}


def _config(values: Mapping[str, Any]) -> AdapterConfig:
    if values.get("architecture") == "union":
        return UnionConfig.from_configs([_config(one) for one in values["configs"]])
    config: AdapterConfig = _methods().layout_for(values).config(values)
    return config


def fitted(
    checkpoint: Checkpoint, view: ModelView, interface: AdapterModelInterface | None
) -> tuple[Checkpoint, AdapterModelInterface | None]:
    """The checkpoint with the tensors' names and the config of this library's own files, and the interface
    that it holds for.

    Where no interface is given, a model that library has written itself has its invertible adapter behind the
    whole module of embeddings.

    Raises:
        CheckpointError: a tensor is none of the adapter's method, or lies where this model has nothing.
        ConfigError: the adapter means something else on this model.
    """

    coupled = any(".invertible_adapters." in f".{name}" for name in checkpoint.tensors)
    if (
        interface is None
        and coupled
        and isinstance(getattr(view.modules[view.base], "embeddings", None), nn.Module)
    ):
        interface = replace(inferred(view), model_embeddings="embeddings")
    there = _methods().Model(view, interface)
    union = isinstance(checkpoint.config, UnionConfig)
    configs = (
        checkpoint.config.configs if isinstance(checkpoint.config, UnionConfig) else (checkpoint.config,)
    )
    left = dict(checkpoint.tensors)
    made: list[AdapterConfig] = []
    tensors: dict[str, Tensor] = {}
    for number, config in enumerate(configs):
        try:
            shown, own = _methods().layout_of(config).read(config, left, there)
        except CheckpointError as error:
            raise CheckpointError(f"{str(checkpoint.path)!r}: {error}") from error
        made.append(shown)
        tensors |= {(f"{number}." if union else "") + name: tensor for name, tensor in own.items()}
    if left:
        raise CheckpointError(f"{str(checkpoint.path)!r}: {next(iter(left))!r} is no tensor of its method")
    return replace(
        checkpoint, config=UnionConfig.from_configs(made) if union else made[0], tensors=tensors
    ), interface


def files_of(
    model: nn.Module, name: str, plan: Plan, parts: Sequence[Parts], others: Sequence[str]
) -> dict[str, bytes]:
    """The files of an adapter's checkpoint, by name.

    Args:
        model: the model that carries it.
        name: the adapter's.
        plan: its plan.
        parts: the parts of each of its methods, by path.
        others: the paths of parts that no method made (copies of modules).

    Raises:
        ConfigError: its method, or what it asks for, has no place in this layout.
    """
    if others:
        raise ConfigError(
            f"adapter {name!r} has parts of its own elsewhere ({others[0]!r}), which have no place in that "
            f"layout"
        )
    interface = plan.interface
    there = _methods().Model(look_at(model), interface)
    values: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for one, own in zip(plan.each(), parts, strict=True):
        layout = _methods().layout_of(one.config)
        try:
            with torch.no_grad():
                said, named = layout.write(one.config, own, there, name)
        except ConfigError as error:
            raise ConfigError(f"adapter {name!r}: {error}") from error
        values.append(said)
        tensors |= named
    config = {"architecture": "union", "configs": values} if plan.members else values[0]
    more = {} if interface is None else interface_file(model, interface, older=True)
    return {**_files(model, name, config, tensors), **more}


def _files(
    model: nn.Module, name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, bytes]:
    """The files that hold a config and tensors."""
    own_config = getattr(model, "config", None)
    about = {
        "config": values,
        "hidden_size": getattr(own_config, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": getattr(own_config, "name_or_path", "") or "",
        "model_type": getattr(own_config, "model_type", None),
        "name": name,
        "version": VERSION,
    }
    buffer = io.BytesIO()
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, buffer)
    return {
        PICKLE_FILE: buffer.getvalue(),
        CONFIG_FILE: (json.dumps(about, indent=2, sort_keys=True) + "\n").encode(),
    }
