"""`grafts.load`: a checkpoint becomes an adapter of a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Size, Tensor, nn

from grafts.checkpoints import adapterhub_format as adapterhub
from grafts.checkpoints import peft_format as peft
from grafts.checkpoints.interface_file import saved_interface
from grafts.checkpoints.peft_format import Checkpoint
from grafts.checkpoints.save import folder_name
from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, did_you_mean
from grafts.lifecycle.activate import activate as activate_all
from grafts.lifecycle.activate import train_only
from grafts.lifecycle.attach import attach_parts
from grafts.lifecycle.build import (
    build_parts,
    draft_adapter,
    fresh_values,
    require_new_name,
    tensor_name,
)
from grafts.lifecycle.plan import Plan
from grafts.lifecycle.registry import unwrapped
from grafts.lifecycle.resolve import resolve
from grafts.lifecycle.selection import FileFacts
from grafts.methods._files import FileTarget, PackedFiles
from grafts.methods._registry import method_of
from grafts.modules.patterns import matches, within
from grafts.sites.site import Part
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.roles import EMBEDDING, HEAD
from grafts.structure.view import ModelView, look_at


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

    def to_dict(self) -> dict[str, Any]:
        """What `transformers` reports of loading: what did not fit, which is nothing, since that is an error
        here.
        """
        return {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}

    @property
    def missing_keys(self) -> set[str]:
        """What `transformers` calls keys that the file does not have: none, since a missing tensor is an
        error here.
        """
        return set()

    @property
    def unexpected_keys(self) -> set[str]:
        """What `transformers` calls keys that the model has no place for: none, since such a tensor is an
        error here.
        """
        return set()

    @property
    def mismatched_keys(self) -> set[str]:
        """What `transformers` calls keys of other shapes in file and model: none, since another shape is an
        error here.
        """
        return set()

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
    """Put an adapter from a checkpoint on ``model``. Every key and shape is checked before the model is
    touched.

    Args:
        model: the base model that the adapter was trained for.
        path: a directory that `save`, `peft` or AdapterHub's library wrote.
        name: what to call it here; a list of names loads the adapters in the folders of these names, all or
            none.
        activate: make it the active adapter, several in the order of their names; False leaves the setup as
            it is.
        train: make it the only trainable thing, to go on training it; else it stays frozen.
        allow_pickle: accept an ``adapter_model.bin``, read with ``torch.load(weights_only=True)``.
        interface: what the model's modules are; by default what an ``adapter_interface.json`` in the
            directory says, where it fits this model, else what is worked out.

    Returns:
        What was loaded, for several names a list; ``print`` it.

    Raises:
        CheckpointError: a file is missing or broken, or a tensor is missing, unexpected or misshapen.
        ConfigError: the config asks for what this library or this model does not have.
        AdapterNameError: the name is taken.
        StateError: adapters are merged.
    """
    inner = unwrapped(model)
    if isinstance(name, str):
        sources = {name: Path(path)}
    else:
        sources = {adapter_name: Path(path) / folder_name(adapter_name) for adapter_name in name}
    # All of them are checked and made before the first one touches the model.
    prepared = []
    for adapter_name, source in sources.items():
        checkpoint = read_checkpoint(source, allow_pickle=allow_pickle)
        prepared.append(prepare(inner, adapter_name, checkpoint, interface))
    for adapter in prepared:
        adapter.attach(activate=activate, train=train)
    # Each has taken the others' place as what is active and trained.
    if len(prepared) > 1 and activate:
        activate_all(inner, tuple(sources))
    if len(prepared) > 1 and train:
        train_only(inner, tuple(sources))
    reports = [adapter.report for adapter in prepared]
    if isinstance(name, str):
        return reports[0]
    return reports


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """An adapter's directory, of either layout, before any model is looked at.

    Raises:
        CheckpointError: a file is missing, broken, or pickled without ``allow_pickle``.
        ConfigError: the config asks for a method or an option that is not known.
    """
    if adapterhub.recognises(path):
        return adapterhub.read(path, allow_pickle=allow_pickle)
    return peft.read(path, allow_pickle=allow_pickle)


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter of a checkpoint, checked and made, that is not on its model yet.

    Attributes:
        view: the model.
        report: what was loaded.
        parts: the path and the part of each target of its plan, in order.
    """

    view: ModelView
    report: LoadReport
    parts: list[tuple[str, Part]]

    def attach(self, *, activate: bool, train: bool) -> None:
        """Put it on the model; nothing in here can fail halfway.

        Args:
            activate: make it the active adapter.
            train: make it the only trainable thing.
        """
        name, plan = self.report.name, self.report.plan
        attach_parts(self.view, name, plan, self.parts, activate=activate, train=train)


def prepare(
    model: nn.Module,
    name: str,
    checkpoint: Checkpoint,
    interface: AdapterModelInterface | None,
    *,
    instead: Callable[[AdapterConfig], AdapterConfig] | None = None,
    fill: bool = False,
) -> PreparedAdapter:
    """An adapter of a checkpoint, checked and made, without touching the model.

    Either a new one, or (`grafts.hotswap`) one whose values are to take the place of those of an adapter that
    is
    there: for that its config is the old one's where it says where the adapter stands (``instead``), and it
        has
    a part at every place of the old one (``fill``).

    Args:
        model: the base model.
        name: what to call it.
        checkpoint: what was read.
        interface: what the model's modules are.
        instead: for an adapter that is to take the place of the one of this name: gives its config from the
            file's.
        fill: give a target that the file says nothing of what a fresh adapter has there.

    Raises:
        CheckpointError: a tensor is missing, unexpected or misshapen.
        ConfigError: the config does not fit the model.
        AdapterNameError: the name is taken, where nothing is to be replaced.
    """
    # What the file means on this model.
    view = look_at(model)
    if interface is None:
        interface = saved_interface(checkpoint.path, view)
    if checkpoint.layout == "adapterhub":
        checkpoint, interface = adapterhub.fitted(checkpoint, view, interface)
    config, members = _members_of(checkpoint, view)
    file = FileFacts(replaced=members[0].replaced if len(members) == 1 else ())
    if instead is None:
        require_new_name(model, name)
        draft = draft_adapter(view, config, name, interface=interface, file=file)
    else:
        seen_through = view if interface is None else view.through(interface)
        draft = resolve(seen_through, instead(config), file)
    plan = draft.plan

    # Whether its tensors are exactly those of the plan, by name and shape, before any memory is taken.
    tensors = _tensors_by_path(plan, members)
    if fill:
        tensors = {**_fresh_where_missing(view, plan, tensors), **tensors}
    source = str(checkpoint.path)
    _check(
        tensors,
        _wanted_shapes(plan),
        f"adapter {name!r} from {source!r} does not fit this {type(model).__name__}",
    )

    parts = build_parts(view, plan, name, tensors, draft.blanks)
    _check_tied(plan, parts, tensors, source)
    # Only an adapter of a single method can have the base's own weights beside it.
    same = members[0].same
    report = LoadReport(
        name,
        checkpoint.path,
        plan,
        tensors=len(checkpoint.tensors) - len(same),
        size=checkpoint.size,
        same_as_base=tuple(sorted(same)),
    )
    return PreparedAdapter(view, report, parts)


def _members_of(checkpoint: Checkpoint, view: ModelView) -> tuple[AdapterConfig, list[_FileMember]]:
    """The config that a checkpoint shows, and what it holds for each single method of it."""
    config = checkpoint.config
    configs_of = method_of(config).members
    if configs_of is None:
        member = _member(config, checkpoint.tensors, checkpoint, view)
        return member.config, [member]
    numbered = _by_number(checkpoint)
    members = []
    for number, single in enumerate(configs_of(config)):
        members.append(_member(single, numbered.get(number, {}), checkpoint, view))
    configs: dict[str, Any] = {"configs": tuple(member.config for member in members)}
    return dataclasses.replace(config, **configs), members


def _tensors_by_path(plan: Plan, members: Sequence[_FileMember]) -> dict[str, Tensor]:
    """The tensors of a file by their names in a plan: by path and name, behind a member's number."""
    tensors = {}
    for number, (member, single) in enumerate(zip(members, plan.single_plans, strict=True)):
        # Those of the method alone: what is auxiliary lies under its module in every file.
        targets = []
        for target in plan.targets:
            if target.kind == single.method.name and target.member == number:
                targets.append(FileTarget(target.path, target.tensors, target.role))
        prefix = f"{number}." if plan.members else ""
        for name, tensor in member.by_path(targets).items():
            tensors[prefix + name] = tensor
    return tensors


def _wanted_shapes(plan: Plan) -> dict[str, Size]:
    """The shapes that an adapter's tensors have, by their names in its plan."""
    shapes = {}
    for target in plan.targets:
        for name, shape in target.tensors.items():
            shapes[tensor_name(plan, target, name)] = shape
    return shapes


def _fresh_where_missing(view: ModelView, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a fresh adapter at targets of which a file holds nothing."""
    missing = []
    for target in plan.targets:
        names = {tensor_name(plan, target, name) for name in target.tensors}
        if target.tied_to is None and not names & tensors.keys():
            missing.append(target)
    return fresh_values(view, plan, missing)


@dataclass(frozen=True)
class _FileMember:
    """What a file gives to one method.

    Attributes:
        config: its config, as the tensors show it.
        tensors: by their names in the file; for methods whose tensors lie by module without what a file puts
            in front.
        replaced: paths of modules whose base weights the file brings along.
        same: names of tensors that are the base's own.
    """

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    replaced: Sequence[str] = ()
    same: frozenset[str] = frozenset()

    def by_path(self, targets: Sequence[FileTarget]) -> Mapping[str, Tensor]:
        """The tensors by their module's path and their own name.

        Args:
            targets: what the file has to hold.
        """
        files = method_of(self.config).files
        if isinstance(files, PackedFiles):
            return files.unpack(self.config, self.tensors, targets)
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.same}


def _member(
    config: AdapterConfig, tensors: Mapping[str, Tensor], checkpoint: Checkpoint, view: ModelView
) -> _FileMember:
    """What a file gives to the method of one config."""
    files = method_of(config).files
    if isinstance(files, PackedFiles):
        return _FileMember(files.config_of(config, tensors), tensors)
    by_module = dataclasses.replace(checkpoint, tensors=tensors).by_module()
    replaced, same = _base_weights_in(view, config, by_module)
    return _FileMember(config, by_module, replaced, frozenset(same))


def _by_number(checkpoint: Checkpoint) -> dict[int, dict[str, Tensor]]:
    """The tensors of each member of a union.

    Raises:
        CheckpointError: a name does not begin with a number.
    """
    result: dict[int, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        number, _, rest = key.partition(".")
        if not number.isdigit():
            raise CheckpointError(
                f"the file of a union holds {key!r}; names in it begin with a member's number"
            )
        result.setdefault(int(number), {})[rest] = tensor
    return result


def _base_weights_in(
    view: ModelView, config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> tuple[list[str], set[str]]:
    """Base weights that `peft` saves beside an adapter: modules whose own differ here, and keys of those that
    do not.

    `peft` adds an embedding's and a head's own weight when one of them is a target or the vocabulary was
    resized.
    """
    # A copy that the config asks for is no base weight, though it lies under the same name.
    saved = [path for path in view.modules if matches(path, config.modules_to_save or ())]
    replaced, same = [], set()
    for name, tensor in tensors.items():
        path, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        may_be_base = leaf == "weight" and view.roles.get(path) in (EMBEDDING, HEAD)
        if not may_be_base or within(path, saved):
            continue
        if _is_weight_of(view.modules[path], tensor):
            same.add(name)
        else:
            replaced.append(path)
    return replaced, same


def _is_weight_of(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a tensor of a file is the weight of a module, bit for bit in the module's format."""
    weight = module.get_parameter("weight").detach()
    return weight.shape == tensor.shape and torch.equal(weight.cpu(), tensor.to(weight.dtype))


def _check_tied(
    plan: Plan, parts: Sequence[tuple[str, Part]], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Refuse a file in which what shares a weight here has two values.

    Raises:
        CheckpointError: naming the tensor.
    """
    for target, (path, part) in zip(plan.targets, parts, strict=True):
        if target.tied_to is None:
            continue
        for name, tensor in part.file_tensors().items():
            value = tensors[tensor_name(plan, target, name)]
            if not torch.equal(tensor.detach().cpu(), value.to(tensor.dtype)):
                raise CheckpointError(
                    f"{source!r}: {path}.{name} is not what {target.tied_to!r} has, though both share one "
                    f"weight here"
                )


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Size], context: str) -> None:
    """Refuse a file whose tensors are not exactly those that the adapter has.

    Raises:
        CheckpointError: naming the first few of each kind.
    """
    unexpected, misshapen = [], []
    for name, tensor in tensors.items():
        if name not in wanted:
            unexpected.append(f"unexpected {name!r} in the file; {did_you_mean(name, wanted)}")
        elif tensor.shape != wanted[name]:
            misshapen.append(f"{name!r} is {tuple(tensor.shape)} in the file and {tuple(wanted[name])} here")
    missing = [f"missing {name!r} in the file" for name in wanted if name not in tensors]
    problems = [*unexpected, *missing, *misshapen]
    if problems:
        shown = problems[:6]
        if len(problems) > 6:
            shown.append(f"... and {len(problems) - 6} more")
        raise CheckpointError("\n  ".join([f"{context}:", *shown]))
