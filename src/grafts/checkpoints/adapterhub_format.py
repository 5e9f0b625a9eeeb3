"""The layout of AdapterHub.

``adapter_config.json`` holds the method's config under ``config``; the tensors lie in
``pytorch_adapter.bin``, a pickle, or ``adapter.safetensors``. How each method's config and tensors are named
there is in `grafts.methods.adapterhub`.
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
from torch import Tensor

from grafts.checkpoints.atomic_write import find
from grafts.checkpoints.interface_file import VERSION, interface_file
from grafts.checkpoints.peft_format import CONFIG_FILE, Checkpoint, read_json, read_pickle, read_tensors
from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.lifecycle.plan import Plan
from grafts.methods._files import Parts
from grafts.methods._registry import method_of
from grafts.structure.infer import inferred
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.view import ModelView

PICKLE_FILE, TENSOR_FILE = "pytorch_adapter.bin", "adapter.safetensors"


def _layouts() -> Any:
    """The layouts of all methods, which are imported only where a file of this layout is read or written."""
    return importlib.import_module("grafts.methods.adapterhub")


def recognises(directory: Path) -> bool:
    """Whether a directory's ``adapter_config.json`` is one of this layout; a file that cannot be read is
    none.

    Args:
        directory: an adapter's.
    """
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
        config: AdapterConfig = _layouts().config_from(data["config"], data.get("version"))
    except ConfigError as error:
        raise ConfigError(f"{str(directory)!r}: {error}") from error
    file = find(directory, TENSOR_FILE)
    if file is not None:
        return Checkpoint(directory, config, read_tensors(file), file.stat().st_size, "adapterhub")
    file = find(directory, PICKLE_FILE)
    if file is None:
        raise CheckpointError(f"{str(directory)!r} holds no {PICKLE_FILE} and no {TENSOR_FILE}")
    return Checkpoint(directory, config, read_pickle(file, allow_pickle), file.stat().st_size, "adapterhub")


def fitted(
    checkpoint: Checkpoint, view: ModelView, interface: AdapterModelInterface | None
) -> tuple[Checkpoint, AdapterModelInterface | None]:
    """The checkpoint with the tensors' names and the config of this library's own files, and the interface
    that it holds for.

    Where no interface is given, a model that library has written itself has its invertible adapter behind the
    whole module of embeddings.

    Args:
        checkpoint: what was read, with the names of the file.
        view: the model that it is read for.
        interface: what its modules are, where that is known.

    Raises:
        CheckpointError: a tensor is none of the adapter's method, or lies where this model has nothing.
        ConfigError: the adapter means something else on this model.
    """
    layouts = _layouts()
    if interface is None and layouts.wants_module_of_embeddings(checkpoint.tensors, layouts.HubModel(view)):
        interface = replace(inferred(view), model_embeddings="embeddings")
    model = layouts.HubModel(view, interface)
    members_of = method_of(checkpoint.config).members
    configs: Sequence[AdapterConfig] = [checkpoint.config]
    if members_of is not None:
        configs = members_of(checkpoint.config)

    source = str(checkpoint.path)
    left = dict(checkpoint.tensors)
    shown: list[AdapterConfig] = []
    tensors: dict[str, Tensor] = {}
    for number, config in enumerate(configs):
        try:
            shown_config, of_member = layouts.layout_of(config).read(config, left, model)
        except CheckpointError as error:
            raise CheckpointError(f"{source!r}: {error}") from error
        shown.append(shown_config)
        prefix = "" if members_of is None else f"{number}."
        for name, tensor in of_member.items():
            tensors[prefix + name] = tensor
    if left:
        raise CheckpointError(f"{source!r}: {next(iter(left))!r} is no tensor of its method")
    if members_of is None:
        joined = shown[0]
    else:
        joined = layouts.joined_config(shown)
    return replace(checkpoint, config=joined, tensors=tensors), interface


def files_of(
    view: ModelView, name: str, plan: Plan, parts: Sequence[Parts], others: Sequence[str]
) -> dict[str, bytes]:
    """The files of an adapter's checkpoint, by name.

    Args:
        view: the model that carries it.
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
    layouts = _layouts()
    model = layouts.HubModel(view, plan.interface)
    configs: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for single, own_parts in zip(plan.single_plans, parts, strict=True):
        try:
            with torch.no_grad():
                layout = layouts.layout_of(single.config)
                values, written = layout.write(single.config, own_parts, model, name)
        except ConfigError as error:
            raise ConfigError(f"adapter {name!r}: {error}") from error
        configs.append(values)
        tensors |= written
    if plan.members:
        joined = layouts.joined_values(configs)
    else:
        joined = configs[0]
    files = _files(view, name, joined, tensors)
    if plan.interface is not None:
        files |= interface_file(view.model, plan.interface, older=True)
    return files


def _files(
    view: ModelView, name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, bytes]:
    """The files that hold a config and tensors."""
    model_config = getattr(view.model, "config", None)
    about = {
        "config": values,
        "hidden_size": getattr(model_config, "hidden_size", None),
        "model_class": view.name,
        "model_name": getattr(model_config, "name_or_path", "") or "",
        "model_type": getattr(model_config, "model_type", None),
        "name": name,
        "version": VERSION,
    }
    buffer = io.BytesIO()
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, buffer)
    return {
        PICKLE_FILE: buffer.getvalue(),
        CONFIG_FILE: (json.dumps(about, indent=2, sort_keys=True) + "\n").encode(),
    }
