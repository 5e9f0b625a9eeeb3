"""`grafts.save` and `grafts.load`: between the adapters of a model and a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from grafts.checkpoints import adapterhub, peft
from grafts.checkpoints.files import write_all
from grafts.checkpoints.interfaces import interface_file, saved_interface
from grafts.config import AdapterConfig
from grafts.errors import AdapterNameError, CheckpointError, ConfigError, did_you_mean
from grafts.interface import AdapterModelInterface
from grafts.matching import matches, within
from grafts.methods import Files, FileTarget, method_of
from grafts.planning import ALL_LINEAR, Key, Plan
from grafts.registry import Registry, attach_parts, build_parts, prepare_plan, registry_of, train_only, unwrapped
from grafts.registry import activate as activate_all
from grafts.roles import EMBEDDING, HEAD, Anatomy, anatomy
from grafts.sites.site import Part


@dataclass(frozen=True)
class LoadReport:
    """What `load` did.

    Attributes:
        name: what the adapter is called in the model.
        path: where it came from.
        plan: where its parts went.
        tensors: how many tensors were read into it.
        size: bytes of the file.
        same_as_base: tensors of the file that are the base's own, bit for bit, and so were not needed.
    """

    name: str
    path: Path
    plan: Plan
    tensors: int
    size: int
    same_as_base: tuple[str, ...]

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [
            f"loaded adapter {self.name!r} from {self.path}",
            f"  {self.plan.summary()}",
            f"  {self.tensors} tensors, {self.size:,} bytes; every key and shape fits",
        ]
        if self.same_as_base:
            lines.append(f"  not needed, being the base's own: {', '.join(self.same_as_base)}")
        return "\n".join(lines)


def save(
    model: nn.Module,
    name: str | Sequence[str],
    path: str | os.PathLike[str],
    *,
    layout: Literal["peft", "adapterhub"] = "peft",
) -> Path:
    """Write an adapter in the layout of `peft`: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``.

    Written whole or not at all: a process killed on the way leaves the old checkpoint or the new one.

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
        files = {f"{_folder(n)}/{file}": data for n in name for file, data in checkpoint_files(model, n, layout).items()}
    write_all(Path(path), files)
    return Path(path)


def _folder(name: str) -> str:
    if name != Path(name).name or "\\" in name or name.startswith("."):
        raise AdapterNameError(f"{name!r} cannot be the name of a folder: save this adapter by itself")
    return name


def checkpoint_files(model: nn.Module, name: str, layout: str = "peft") -> dict[str, bytes]:
    """The files of an adapter's checkpoint, by name.

    Raises:
        AdapterNameError: there is no such adapter.
        ConfigError: the adapter has no place in that layout, or there is no such layout.
    """
    inner = unwrapped(model)
    registry = registry_of(inner)
    made = registry.require(name)
    if layout == "adapterhub":
        own = [registry.own_parts(name, number) for number in range(len(made.each()))]
        methods = {(number, one.method.name) for number, one in enumerate(made.each())}
        others = [target.path for target in made.targets if (target.member, target.kind) not in methods]
        return adapterhub.files_of(inner, name, made, own, others)
    if layout != "peft":
        raise ConfigError(f"there is no layout {layout!r}; it is 'peft' or 'adapterhub'")
    each = [_tensors(registry, name, made, number) for number, made in enumerate(made.each())]
    values = [file_config(inner, registry, name, one, number) for number, one in enumerate(made.each())]
    if not made.members:
        files = peft.files_of(values[0], each[0])
    else:
        config = {**made.config.to_dict(), **{key: values[0][key] for key in _OF_BASE}, "peft_type": made.method.peft_type}
        tensors = {f"{number}.{key}": tensor for number, one in enumerate(each) for key, tensor in one.items()}
        files = peft.files_of({**config, "configs": values}, tensors)
    return files | ({} if made.interface is None else interface_file(inner, made.interface))


_OF_BASE = ("base_model_name_or_path", "auto_mapping", "inference_mode")


def _tensors(registry: Registry, name: str, made: Plan, member: int) -> dict[str, Tensor]:
    """The tensors of one method's parts, with what else it trains, by their names in a file."""
    files = made.method.files
    own = registry.own_parts(name, member)
    prefix = peft.PREFIX if files is None else files.prefix
    placed = zip(registry.plans[name].targets, registry.parts[name], strict=True)
    tensors = {
        prefix + f"{path}.{key}".lstrip("."): tensor
        for target, (path, part) in placed
        for key, tensor in part.file_tensors().items()
        if target.member == member and (files is None or own.get(path) is not part)
    }
    return tensors if files is None else tensors | dict(files.pack(made.config, own))


def file_config(model: nn.Module, registry: Registry, name: str, made: Plan, member: int) -> dict[str, Any]:
    """What ``adapter_config.json`` says: the config with its targets resolved, so that every reader finds the same ones.

    Args:
        model: the base model.
        registry: what it carries.
        name: the adapter's name.
        made: the plan of the adapter, or of the member of a union.
        member: its number in the union.
    """
    body = anatomy(model)
    untied = [target for target in made.targets if target.tied_to is None]
    own = [target.path for target in untied if target.kind == made.method.name]
    copies = [target.path for target in untied if target.kind == "copy" and not any("base_layer" in t for t in target.tensors)]
    values = made.config.to_dict() | {"peft_type": made.method.peft_type, "inference_mode": True}
    defaults = {field.name: field.default for field in dataclasses.fields(made.config)}
    unsaid = [field for field in made.config.own_fields if getattr(made.config, field) == defaults[field]]
    values = {field: value for field, value in values.items() if field not in unsaid}
    resolved = made.config.target_modules in (None, ALL_LINEAR) and made.method.files is None and made.method.places is None
    if resolved:
        values.pop("target_roles", None)
        own = [path for path in own if body.layers[path].kind != "input"]
    if resolved or values.get("layers_to_transform") is not None:
        values["target_modules"] = _shortest_names(own, body.modules)
        values |= {name: None for name in ("layers_to_transform", "layers_pattern") if name in values}
    if made.method.file_values is not None and own:
        values |= made.method.file_values(values, registry.own_parts(name, member))
    named = list(made.config.modules_to_save or ())
    if unnamed := [path for path in copies if not within(path, (owner for owner in body.modules if matches(owner, named)))]:
        values["modules_to_save"] = named + _shortest_names(unnamed, body.modules)
    if "fan_in_fan_out" in values:
        values["fan_in_fan_out"] = any(body.layers[path].kind == "transposed-linear" for path in own if path in body.layers)
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if values["task_type"] is None and values["auto_mapping"] is None:
        cls = type(model)
        values["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return values


def _shortest_names(paths: list[str], modules: Iterable[str]) -> list[str]:
    """The last names of ``paths`` where they select exactly these modules, else the paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    return names if {path for path in modules if matches(path, names)} == set(paths) else paths


@overload
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    activate: bool = True,
    train: bool = False,
    allow_pickle: bool = False,
    interface: AdapterModelInterface | None = None,
) -> LoadReport: ...


@overload
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: list[str] | tuple[str, ...],
    activate: bool = True,
    train: bool = False,
    allow_pickle: bool = False,
    interface: AdapterModelInterface | None = None,
) -> list[LoadReport]: ...


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | Sequence[str] = "default",
    activate: bool = True,
    train: bool = False,
    allow_pickle: bool = False,
    interface: AdapterModelInterface | None = None,
) -> LoadReport | list[LoadReport]:
    """Put an adapter from a checkpoint on ``model``. Every key and shape is checked before the model is touched.

    Args:
        model: the base model that the adapter was trained for.
        path: a directory that `save` or `peft` wrote.
        name: what to call it here; a list of names loads the adapters in the folders of these names, all or none.
        activate: make it the active adapter, several in the order of their names; False leaves the setup as it is.
        train: make it the only trainable thing, to go on training it; else it stays frozen.
        allow_pickle: accept an ``adapter_model.bin``, read with ``torch.load(weights_only=True)``.
        interface: what the model's modules are; by default what an ``adapter_interface.json`` in the directory says, where
            it fits this model, else what is worked out.

    Returns:
        What was loaded, for several names a list; ``print`` it.

    Raises:
        CheckpointError: a file is missing or broken, or a tensor is missing, unexpected or misshapen.
        ConfigError: the config asks for what this library or this model does not have.
        AdapterNameError: the name is taken.
        StateError: adapters are merged.
    """
    inner = unwrapped(model)
    sources = {name: Path(path)} if isinstance(name, str) else {one: Path(path) / _folder(one) for one in name}
    ready = [_prepare(inner, one, source, allow_pickle, interface) for one, source in sources.items()]
    for report, parts in ready:
        attach_parts(inner, report.name, report.plan, parts, activate=activate, train=train)
    if len(ready) > 1 and activate:
        activate_all(inner, tuple(sources))
    if len(ready) > 1 and train:
        train_only(inner, tuple(sources))
    return ready[0][0] if isinstance(name, str) else [report for report, _ in ready]


def _prepare(
    model: nn.Module, name: str, path: Path, allow_pickle: bool, interface: AdapterModelInterface | None
) -> tuple[LoadReport, list[tuple[str, Part]]]:
    """An adapter of a checkpoint, checked and made, without touching the model."""
    layout = adapterhub if adapterhub.recognises(path) else peft
    checkpoint = layout.read(path, allow_pickle=allow_pickle)
    body = anatomy(model)
    if interface is None:
        interface = saved_interface(path, body)
    if layout is adapterhub:
        checkpoint, interface = adapterhub.fitted(checkpoint, body, interface)
    blanks: dict[Key, Part] = {}
    union = method_of(checkpoint.config).members
    if union is None:
        each = [_given(checkpoint.config, checkpoint.tensors, checkpoint, body)]
    else:
        numbered = _by_number(checkpoint)
        each = [_given(one, numbered.get(at, {}), checkpoint, body) for at, one in enumerate(union(checkpoint.config))]
    configs = [given.config for given in each]
    config = configs[0] if union is None else dataclasses.replace(checkpoint.config, configs=tuple(configs))
    replaced = each[0].replaced if union is None else ()
    made = prepare_plan(
        model, config, name=name, lenient=True, replaced=replaced, body=body, blanks=blanks, interface=interface
    )
    given: dict[str, Tensor] = {}
    for number, (one, of) in enumerate(zip(each, made.each(), strict=True)):
        own = [(t.path, t.tensors, t.role) for t in made.targets if t.kind == of.method.name and t.member == number]
        prefix = f"{number}." if made.members else ""
        given |= {prefix + key: tensor for key, tensor in one.by_path(of.method.files, own).items()}
    wanted = {
        (f"{target.member}." if made.members else "") + f"{target.path}.{key}".lstrip("."): shape
        for target in made.targets
        for key, shape in target.tensors.items()
    }
    _check(given, wanted, f"adapter {name!r} from {str(path)!r} does not fit this {type(model).__name__}")
    parts = build_parts(model, made, name, given, blanks)
    _check_tied(made, parts, given, str(path))
    same = each[0].same
    return LoadReport(name, path, made, len(checkpoint.tensors) - len(same), checkpoint.size, tuple(sorted(same))), parts


@dataclass(frozen=True)
class _Given:
    """What a file gives to one method.

    Attributes:
        config: its config, as the tensors show it.
        tensors: by their names in the file.
        replaced: paths of modules whose base weights the file brings along.
        same: names of tensors that are the base's own.
    """

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    replaced: Sequence[str]
    same: set[str]

    def by_path(self, files: Files | None, targets: Sequence[FileTarget]) -> dict[str, Tensor]:
        """The tensors by their module's path and their own name."""
        if files is not None:
            return dict(files.unpack(self.config, self.tensors, targets))
        return {key: tensor for key, tensor in self.tensors.items() if key not in self.same}


def _given(config: AdapterConfig, tensors: Mapping[str, Tensor], checkpoint: peft.Checkpoint, body: Anatomy) -> _Given:
    files = method_of(config).files
    if files is not None:
        return _Given(files.config(config, tensors), tensors, (), set())
    named = dataclasses.replace(checkpoint, tensors=tensors).by_module()
    replaced, same = _base_weights_in(body, config, named)
    return _Given(config, named, replaced, same)


def _by_number(checkpoint: peft.Checkpoint) -> dict[int, dict[str, Tensor]]:
    """The tensors of each member of a union.

    Raises:
        CheckpointError: a name does not begin with a number.
    """
    result: dict[int, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        number, _, rest = key.partition(".")
        if not number.isdigit():
            raise CheckpointError(f"the file of a union holds {key!r}; names in it begin with a member's number")
        result.setdefault(int(number), {})[rest] = tensor
    return result


def _base_weights_in(body: Anatomy, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> tuple[list[str], set[str]]:
    """Base weights that `peft` saves beside an adapter: modules whose own differ here, and keys of those that do not.

    `peft` adds an embedding's and a head's own weight when one of them is a target or the vocabulary was resized.
    """
    saved = [path for path in body.modules if matches(path, config.modules_to_save or ())]
    replaced, same = [], set()
    for key, tensor in tensors.items():
        path, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
        if leaf != "weight" or body.roles.get(path) not in (EMBEDDING, HEAD) or within(path, saved):
            continue
        here = body.modules[path].get_parameter("weight")
        if here.shape == tensor.shape and torch.equal(here.detach().cpu(), tensor.to(here.dtype)):
            same.add(key)
        else:
            replaced.append(path)
    return replaced, same


def _check_tied(made: Plan, parts: Sequence[tuple[str, Part]], tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse a file in which what shares a weight here has two values.

    Raises:
        CheckpointError: naming the tensor.
    """
    for target, (path, part) in zip(made.targets, parts, strict=True):
        for name, tensor in part.file_tensors().items() if target.tied_to is not None else ():
            key = (f"{target.member}." if made.members else "") + f"{path}.{name}"
            if not torch.equal(tensor.detach().cpu(), tensors[key].to(tensor.dtype)):
                raise CheckpointError(
                    f"{source!r}: {path}.{name} is not what {target.tied_to!r} has, though both share one weight here"
                )


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], context: str) -> None:
    """Refuse a file whose tensors are not exactly those that the adapter has.

    Raises:
        CheckpointError: naming the first few of each kind.
    """
    problems = [f"unexpected {key!r} in the file; {did_you_mean(key, wanted)}" for key in tensors if key not in wanted]
    problems += [f"missing {key!r} in the file" for key in wanted if key not in tensors]
    problems += [
        f"{key!r} is {tuple(tensor.shape)} in the file and {tuple(wanted[key])} here"
        for key, tensor in tensors.items()
        if key in wanted and tensor.shape != wanted[key]
    ]
    if problems:
        more = [f"... and {len(problems) - 6} more"] if len(problems) > 6 else []
        raise CheckpointError("\n  ".join([f"{context}:", *problems[:6], *more]))
