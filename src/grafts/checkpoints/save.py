"""`grafts.save`: the adapters of a model become a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
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
from grafts.config import AdapterConfig
from grafts.errors import AdapterNameError, ConfigError
from grafts.lifecycle.plan import Plan
from grafts.lifecycle.registry import Registry, parts_of, registry_of, unwrapped
from grafts.lifecycle.selection import ALL_LINEAR
from grafts.lifecycle.sharding import gathered, is_main_process, is_sharded
from grafts.methods._files import PackedFiles
from grafts.modules.patterns import join, matches, within
from grafts.structure.view import ModelView, look_at

# The file with what training goes on from besides the checkpoint.
STATE_FILE = "adapter_training_state.safetensors"
# Fields of a union's file that are those of its members.
_OF_BASE = ("base_model_name_or_path", "auto_mapping", "inference_mode")


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
        folders = {name: ""}
    else:
        folders = {adapter_name: f"{folder_name(adapter_name)}/" for adapter_name in name}
    files = {}
    for adapter_name, folder in folders.items():
        for file, data in checkpoint_files(model, adapter_name, layout).items():
            files[folder + file] = data
    # Every process has gathered the pieces; one writes, and the others wait until the files are there.
    inner = unwrapped(model)
    sharded = any(is_sharded(part for _, part in parts_of(inner, adapter_name)) for adapter_name in folders)
    if not sharded or is_main_process():
        write_all(Path(path), files)
    if sharded:
        torch.distributed.barrier()
    return Path(path)


def folder_name(name: str) -> str:
    """The name of an adapter that is to be the name of its folder.

    Args:
        name: the adapter's.

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
    plan = registry.require(name)
    if layout not in ("peft", "adapterhub"):
        raise ConfigError(f"there is no layout {layout!r}; it is 'peft' or 'adapterhub'")
    view = look_at(inner)
    with gathered(inner, [part for _, part in registry.parts[name]], state):
        if layout == "adapterhub":
            return _adapterhub_files(view, registry, name, plan)
        return _peft_files(view, registry, name, plan, about)


def _adapterhub_files(view: ModelView, registry: Registry, name: str, plan: Plan) -> dict[str, bytes]:
    """The files in AdapterHub's layout."""
    parts = [registry.own_parts(name, member) for member in range(len(plan.single_plans))]
    methods = [single.method.name for single in plan.single_plans]
    # What it trains beside its methods' parts, for which that layout has no place.
    others = [target.path for target in plan.targets if target.kind != methods[target.member]]
    return adapterhub.files_of(view, name, plan, parts, others)


def _peft_files(
    view: ModelView, registry: Registry, name: str, plan: Plan, about: About | None
) -> dict[str, bytes]:
    """The files in the layout of `peft`."""
    configs: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for member, single in enumerate(plan.single_plans):
        configs.append(file_config(view, registry, name, single, member))
        prefix = f"{member}." if plan.members else ""
        for key, tensor in adapter_tensors(registry, name, single, member).items():
            tensors[prefix + key] = tensor
    # A union has the configs of its members in one, and says once what they say of the base.
    config = configs[0]
    if plan.members:
        config = plan.config.to_dict()
        config |= {field: configs[0][field] for field in _OF_BASE}
        config |= {"peft_type": plan.method.peft_type, "configs": configs}
    text = card(plan, configs[0]["base_model_name_or_path"], about)
    files = peft.files_of(config, tensors, text)
    if plan.interface is not None:
        files |= interface_file(view.model, plan.interface)
    return files


def training_files(model: nn.Module, name: str) -> dict[str, bytes]:
    """The file that training an adapter goes on from besides its checkpoint, by its name; most methods need
    none.
    """
    registry = registry_of(unwrapped(model))
    tensors = {}
    for member, single in enumerate(registry.require(name).single_plans):
        if not single.method.files.has_training_state:
            continue
        state = single.method.files.training_state(registry.own_parts(name, member))
        for key, tensor in state.items():
            tensors[f"{member}.{key}"] = tensor.detach().cpu().contiguous()
    if tensors:
        return {STATE_FILE: safetensors_bytes(tensors)}
    return {}


def adapter_tensors(registry: Registry, name: str, plan: Plan, member: int) -> dict[str, Tensor]:
    """The tensors of one method's parts, with what else it trains, by their names in a file.

    Args:
        registry: what the model carries.
        name: the adapter's.
        plan: of the single method.
        member: its number in a union.
    """
    files = plan.method.files
    own_parts = registry.own_parts(name, member)
    packed: Mapping[str, Tensor] = {}
    prefix = peft.PREFIX
    if isinstance(files, PackedFiles):
        packed = files.pack(plan.config, own_parts)
        prefix = files.prefix
    tensors = {}
    for target, (path, part) in zip(registry.plans[name].targets, registry.parts[name], strict=True):
        is_packed = files.is_packed and own_parts.get(path) is part
        if target.member != member or is_packed:
            continue
        for key, tensor in part.file_tensors().items():
            tensors[prefix + join(path, key)] = tensor
    return {**tensors, **packed}


def file_config(view: ModelView, registry: Registry, name: str, plan: Plan, member: int) -> dict[str, Any]:
    """What ``adapter_config.json`` says: the config with its targets resolved, so that every reader finds the
    same ones.

    Args:
        view: the base model.
        registry: what it carries.
        name: the adapter's name.
        plan: of the adapter, or of the member of a union.
        member: its number in the union.
    """
    config = plan.config
    values = _said_fields(config) | {"peft_type": plan.method.peft_type, "inference_mode": True}
    own_paths = [target.path for target in plan.targets if target.is_own]
    # Readers that know nothing of structure find the same modules by name.
    chooses_by_structure = config.target_modules in (None, ALL_LINEAR)
    stands_by_module = not plan.method.files.is_packed and plan.method.places is None
    if chooses_by_structure and stands_by_module:
        values.pop("target_roles", None)
        own_paths = [path for path in own_paths if view.layers[path].kind != "input"]
        _name_targets(values, config, own_paths, view)
    elif config.layer_selection() is not None:
        _name_targets(values, config, own_paths, view)
    # What the method itself says otherwise comes last, since it may go by the names.
    layers = {path: view.layers[path] for path in own_paths if path in view.layers}
    values |= plan.method.files.config_values(config, values, registry.own_parts(name, member), layers)
    _name_copies(values, plan, view)
    _name_base(values, view.model)
    return values


def _said_fields(config: AdapterConfig) -> dict[str, Any]:
    """A config's fields as plain data; those that the file format does not have only where they say
    something.
    """
    values = config.to_dict()
    for field in dataclasses.fields(config):
        if field.name in config.own_fields and getattr(config, field.name) == field.default:
            del values[field.name]
    return values


def _name_targets(
    values: dict[str, Any], config: AdapterConfig, targets: Sequence[str], view: ModelView
) -> None:
    """Name the targets in place of what has chosen them."""
    values["target_modules"] = _shortest_names(targets, view)
    for field in config.selecting_fields:
        if field in values:
            values[field] = None


def _name_copies(values: dict[str, Any], plan: Plan, view: ModelView) -> None:
    """Name the modules of which the adapter has a copy, where the config does not do so itself (heads)."""
    names = list(plan.config.modules_to_save or ())
    named = [path for path in view.modules if matches(path, names)]
    copies = [target for target in plan.targets if target.kind == "copy" and target.tied_to is None]
    unnamed = []
    for target in copies:
        # A base weight that the file brings along is no copy that was asked for.
        is_brought_along = any("base_layer" in name for name in target.tensors)
        if not is_brought_along and not within(target.path, named):
            unnamed.append(target.path)
    if unnamed:
        values["modules_to_save"] = names + _shortest_names(unnamed, view)


def _name_base(values: dict[str, Any], model: nn.Module) -> None:
    """Say where the base came from; without a task, of which class it is."""
    # A text that is empty says nothing, and readers would look for a model of that name.
    if values["base_model_name_or_path"] is None:
        name = getattr(getattr(model, "config", None), "name_or_path", None)
        values["base_model_name_or_path"] = name or None
    if values["task_type"] is None and values["auto_mapping"] is None:
        for cls in type(model).__mro__:
            # `fully_shard` makes a class of its own of the model's.
            if not cls.__module__.startswith("torch.distributed"):
                values["auto_mapping"] = {
                    "base_model_class": cls.__name__,
                    "parent_library": cls.__module__,
                }
                break


def _shortest_names(paths: Sequence[str], view: ModelView) -> list[str]:
    """The last names of ``paths`` where they select exactly these modules, else the paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    selected = {path for path in view.modules if matches(path, names)}
    if selected == set(paths):
        return names
    return list(paths)
