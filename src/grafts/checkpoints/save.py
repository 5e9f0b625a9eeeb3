"""`grafts.save`: the adapters of a model become a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from grafts.checkpoints import adapterhub_format as adapterhub
from grafts.checkpoints import peft_format as peft
from grafts.checkpoints.atomic_write import write_all
from grafts.checkpoints.interface_file import interface_file
from grafts.checkpoints.model_card import About, card
from grafts.errors import AdapterNameError, ConfigError
from grafts.lifecycle.plan import Plan
from grafts.lifecycle.registry import Registry, parts_of, registry_of, unwrapped
from grafts.lifecycle.resolve import ALL_LINEAR
from grafts.lifecycle.sharding import gathered, is_main_process, is_sharded
from grafts.modules.patterns import join, matches, within
from grafts.structure.roles import look_at


def save(
    model: nn.Module,
    name: str | Sequence[str],
    path: str | os.PathLike[str],
    *,
    layout: Literal["peft", "adapterhub"] = "peft",
) -> Path:
    """Write an adapter in the layout of `peft`: ``adapter_config.json``, ``adapter_model.safetensors``,
    ``README.md``.

    Written whole or not at all: a process killed on the way leaves the old checkpoint or the new one. Of a
    sharded model (`fully_shard`) every process has to call this; the first one writes.

    Args:
        model: the model that carries the adapter.
        name: which adapter; several are written together, each into the folder of its name.
        path: the directory; made if needed, other files in it stay.
        layout: ``"adapterhub"`` writes a prefix as that library reads it.

    Returns:
        The directory.

    Raises:
        AdapterNameError: there is no such adapter, or its name cannot be that of a folder.
        ConfigError: the adapter has no place in that layout, or there is no such layout.
        CheckpointError: the directory cannot be written.
    """
    if isinstance(name, str):
        files = checkpoint_files(model, name, layout)
    else:
        files = {
            f"{folder_name(n)}/{file}": data
            for n in name
            for file, data in checkpoint_files(model, n, layout).items()
        }
    names = [name] if isinstance(name, str) else name
    sharded = is_sharded(part for one in names for _, part in parts_of(unwrapped(model), one))
    if not sharded or is_main_process():
        write_all(Path(path), files)
    if sharded:
        torch.distributed.barrier()
    return Path(path)


def folder_name(name: str) -> str:
    """The name of an adapter that is to be the name of its folder.

    Raises:
        AdapterNameError: it cannot be.
    """
    if name != Path(name).name or "\\" in name or name.startswith("."):
        raise AdapterNameError(f"{name!r} cannot be the name of a folder: save this adapter by itself")
    return name


def checkpoint_files(
    model: nn.Module,
    name: str,
    layout: str = "peft",
    state: Mapping[str, Tensor] | None = None,
    about: About | None = None,
) -> dict[str, bytes]:
    """The files of an adapter's checkpoint, by name.

    Args:
        model: the model that carries the adapter.
        name: the adapter's.
        layout: ``"peft"`` or ``"adapterhub"``.
        state: the model's state dict, to take the tensors from.
        about: what the model card says besides.

    Raises:
        AdapterNameError: there is no such adapter.
        ConfigError: the adapter has no place in that layout, or there is no such layout.
        StateError: the state dict does not hold the adapter.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    made = registry.require(name)
    with gathered(inner, [part for _, part in registry.parts[name]], state):
        return _files(inner, registry, name, made, layout, about)


def _files(
    inner: nn.Module, registry: Registry, name: str, made: Plan, layout: str, about: About | None
) -> dict[str, bytes]:
    if layout == "adapterhub":
        own = [registry.own_parts(name, number) for number in range(len(made.each()))]
        methods = {(number, one.method.name) for number, one in enumerate(made.each())}
        others = [target.path for target in made.targets if (target.member, target.kind) not in methods]
        return adapterhub.files_of(inner, name, made, own, others)
    if layout != "peft":
        raise ConfigError(f"there is no layout {layout!r}; it is 'peft' or 'adapterhub'")
    each = [adapter_tensors(registry, name, made, number) for number, made in enumerate(made.each())]
    values = [file_config(inner, registry, name, one, number) for number, one in enumerate(made.each())]
    text = card(made, values[0]["base_model_name_or_path"], about)
    if not made.members:
        files = peft.files_of(values[0], each[0], text)
    else:
        config = {
            **made.config.to_dict(),
            **{key: values[0][key] for key in _OF_BASE},
            "peft_type": made.method.peft_type,
        }
        tensors = {
            f"{number}.{key}": tensor for number, one in enumerate(each) for key, tensor in one.items()
        }
        files = peft.files_of({**config, "configs": values}, tensors, text)
    return files | ({} if made.interface is None else interface_file(inner, made.interface))


def training_files(model: nn.Module, name: str) -> dict[str, bytes]:
    """The file that training an adapter goes on from besides its checkpoint, by its name; most methods need
    none.
    """
    registry = registry_of(unwrapped(model))
    tensors = {
        f"{number}.{key}": tensor.detach().cpu().contiguous()
        for number, one in enumerate(registry.require(name).each())
        if one.method.training_state is not None
        for key, tensor in one.method.training_state(registry.own_parts(name, number)).items()
    }
    return {STATE_FILE: safetensors_bytes(tensors)} if tensors else {}


STATE_FILE = "adapter_training_state.safetensors"
_OF_BASE = ("base_model_name_or_path", "auto_mapping", "inference_mode")


def adapter_tensors(registry: Registry, name: str, made: Plan, member: int) -> dict[str, Tensor]:
    """The tensors of one method's parts, with what else it trains, by their names in a file."""
    files = made.method.files
    own = registry.own_parts(name, member)
    prefix = peft.PREFIX if files is None else files.prefix
    placed = zip(registry.plans[name].targets, registry.parts[name], strict=True)
    tensors = {
        prefix + join(path, key): tensor
        for target, (path, part) in placed
        for key, tensor in part.file_tensors().items()
        if target.member == member and (files is None or own.get(path) is not part)
    }
    return tensors if files is None else tensors | dict(files.pack(made.config, own))


def file_config(model: nn.Module, registry: Registry, name: str, made: Plan, member: int) -> dict[str, Any]:
    """What ``adapter_config.json`` says: the config with its targets resolved, so that every reader finds the
    same ones.

    Args:
        model: the base model.
        registry: what it carries.
        name: the adapter's name.
        made: the plan of the adapter, or of the member of a union.
        member: its number in the union.
    """
    view = look_at(model)
    untied = [target for target in made.targets if target.tied_to is None]
    own = [target.path for target in untied if target.kind == made.method.name]
    copies = [
        target.path
        for target in untied
        if target.kind == "copy" and not any("base_layer" in t for t in target.tensors)
    ]
    values = made.config.to_dict() | {"peft_type": made.method.peft_type, "inference_mode": True}
    defaults = {field.name: field.default for field in dataclasses.fields(made.config)}
    unsaid = [field for field in made.config.own_fields if getattr(made.config, field) == defaults[field]]
    values = {field: value for field, value in values.items() if field not in unsaid}
    resolved = (
        made.config.target_modules in (None, ALL_LINEAR)
        and made.method.files is None
        and made.method.places is None
    )
    if resolved:
        values.pop("target_roles", None)
        own = [path for path in own if view.layers[path].kind != "input"]
    if resolved or values.get("layers_to_transform") is not None:
        values["target_modules"] = _shortest_names(own, view.modules)
        values |= {name: None for name in ("layers_to_transform", "layers_pattern") if name in values}
    if made.method.file_values is not None and own:
        values |= made.method.file_values(values, registry.own_parts(name, member))
    named = list(made.config.modules_to_save or ())
    if unnamed := [
        path
        for path in copies
        if not within(path, (owner for owner in view.modules if matches(owner, named)))
    ]:
        values["modules_to_save"] = named + _shortest_names(unnamed, view.modules)
    if "fan_in_fan_out" in values:
        values["fan_in_fan_out"] = any(
            view.layers[path].kind == "transposed-linear" for path in own if path in view.layers
        )
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = (
            getattr(getattr(model, "config", None), "name_or_path", None) or None
        )
    if values["task_type"] is None and values["auto_mapping"] is None:
        cls = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed"))
        values["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return values


def _shortest_names(paths: list[str], modules: Iterable[str]) -> list[str]:
    """The last names of ``paths`` where they select exactly these modules, else the paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if {path for path in modules if matches(path, names)} == set(paths) else paths
