"""`grafts.load`: a checkpoint becomes an adapter of a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

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
from grafts.lifecycle.build import build_parts, prepare_plan
from grafts.lifecycle.plan import Key, Plan, Target
from grafts.lifecycle.registry import unwrapped
from grafts.lifecycle.resolve import resolve
from grafts.methods._registry import Files, FileTarget, method_of
from grafts.modules.patterns import join, matches, within
from grafts.sites.site import Part
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.roles import EMBEDDING, HEAD, ModelView, look_at

V = TypeVar("V")


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
        """None."""
        return set()

    @property
    def unexpected_keys(self) -> set[str]:
        """None."""
        return set()

    @property
    def mismatched_keys(self) -> set[str]:
        """None."""
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
        path: a directory that `save` or `peft` wrote.
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
    sources = (
        {name: Path(path)} if isinstance(name, str) else {one: Path(path) / folder_name(one) for one in name}
    )
    ready = [
        prepare(inner, one, read_checkpoint(source, allow_pickle=allow_pickle), interface)
        for one, source in sources.items()
    ]
    for report, parts in ready:
        attach_parts(inner, report.name, report.plan, parts, activate=activate, train=train)
    if len(ready) > 1 and activate:
        activate_all(inner, tuple(sources))
    if len(ready) > 1 and train:
        train_only(inner, tuple(sources))
    return ready[0][0] if isinstance(name, str) else [report for report, _ in ready]


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """An adapter's directory, of either layout, before any model is looked at.

    Raises:
        CheckpointError: a file is missing, broken, or pickled without ``allow_pickle``.
        ConfigError: the config asks for a method or an option that is not known.
    """
    if adapterhub.recognises(path):
        return adapterhub.read(path, allow_pickle=allow_pickle)
    return peft.read(path, allow_pickle=allow_pickle)


def prepare(
    model: nn.Module,
    name: str,
    checkpoint: Checkpoint,
    interface: AdapterModelInterface | None,
    *,
    instead: Callable[[AdapterConfig], AdapterConfig] | None = None,
    fill: bool = False,
) -> tuple[LoadReport, list[tuple[str, Part]]]:
    """An adapter of a checkpoint, checked and made, without touching the model.

    Args:
        model: the base model.
        name: what to call it.
        checkpoint: what was read.
        interface: what the model's modules are.
        instead: for an adapter that is to take the place of the one of this name: gives its config from the
            file's.
        fill: give a target that the file says nothing of what a fresh adapter has there.
    """
    view = look_at(model)
    if interface is None:
        interface = saved_interface(checkpoint.path, view)
    if checkpoint.layout == "adapterhub":
        checkpoint, interface = adapterhub.fitted(checkpoint, view, interface)
    blanks: dict[Key, Part] = {}
    union = method_of(checkpoint.config).members
    config: AdapterConfig = checkpoint.config
    replaced: Sequence[str] = ()
    if union is None:
        each = [_given(config, checkpoint.tensors, checkpoint, view)]
        config, replaced = each[0].config, each[0].replaced
    else:
        numbered = _by_number(checkpoint)
        each = [_given(one, numbered.get(at, {}), checkpoint, view) for at, one in enumerate(union(config))]
        made_of: dict[str, Any] = {"configs": tuple(given.config for given in each)}
        config = dataclasses.replace(config, **made_of)
    if instead is None:
        made = prepare_plan(
            model,
            config,
            name=name,
            lenient=True,
            replaced=replaced,
            view=view,
            blanks=blanks,
            interface=interface,
        )
    else:
        config = instead(config)
        made = resolve(
            model, config, lenient=True, replaced=replaced, view=view, blanks=blanks, interface=interface
        )
    given: dict[str, Tensor] = {}
    for number, (one, of) in enumerate(zip(each, made.each(), strict=True)):
        own = [
            (t.path, t.tensors, t.role)
            for t in made.targets
            if t.kind == of.method.name and t.member == number
        ]
        prefix = f"{number}." if made.members else ""
        given |= {prefix + key: tensor for key, tensor in one.by_path(of.method.files, own).items()}
    if fill:
        given = _fresh_where_missing(view, made, given) | given
    wanted = {
        key: shape for target in made.targets for key, shape in _named(made, target, target.tensors).items()
    }
    source = str(checkpoint.path)
    _check(given, wanted, f"adapter {name!r} from {source!r} does not fit this {type(model).__name__}")
    parts = build_parts(model, made, name, given, blanks)
    _check_tied(made, parts, given, source)
    same = each[0].same
    read = len(checkpoint.tensors) - len(same)
    return LoadReport(name, checkpoint.path, made, read, checkpoint.size, tuple(sorted(same))), parts


def _named(made: Plan, target: Target, values: Mapping[str, V]) -> dict[str, V]:
    """What belongs to the tensors of one target, by their names among those of the whole plan."""
    member = f"{target.member}." if made.members else ""
    return {member + join(target.path, key): value for key, value in values.items()}


def _fresh_where_missing(view: ModelView, made: Plan, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a fresh adapter at targets of which a file holds nothing."""
    result: dict[str, Tensor] = {}
    for target in made.targets:
        if target.tied_to is None and not given.keys() & _named(made, target, target.tensors).keys():
            host = view.modules[target.path]
            part = target.build(host)
            part.from_base(host, fresh=True)
            result |= _named(made, target, part.file_tensors())
    return result


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


def _given(
    config: AdapterConfig, tensors: Mapping[str, Tensor], checkpoint: Checkpoint, view: ModelView
) -> _Given:
    files = method_of(config).files
    if files is not None:
        return _Given(files.config(config, tensors), tensors, (), set())
    named = dataclasses.replace(checkpoint, tensors=tensors).by_module()
    replaced, same = _base_weights_in(view, config, named)
    return _Given(config, named, replaced, same)


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
    saved = [path for path in view.modules if matches(path, config.modules_to_save or ())]
    replaced, same = [], set()
    for key, tensor in tensors.items():
        path, _, leaf = key.replace(".base_layer.", ".").rpartition(".")
        if leaf != "weight" or view.roles.get(path) not in (EMBEDDING, HEAD) or within(path, saved):
            continue
        here = view.modules[path].get_parameter("weight")
        if here.shape == tensor.shape and torch.equal(here.detach().cpu(), tensor.to(here.dtype)):
            same.add(key)
        else:
            replaced.append(path)
    return replaced, same


def _check_tied(
    made: Plan, parts: Sequence[tuple[str, Part]], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Refuse a file in which what shares a weight here has two values.

    Raises:
        CheckpointError: naming the tensor.
    """
    for target, (path, part) in zip(made.targets, parts, strict=True):
        for name, tensor in part.file_tensors().items() if target.tied_to is not None else ():
            (key,) = _named(made, target, {name: tensor})
            if not torch.equal(tensor.detach().cpu(), tensors[key].to(tensor.dtype)):
                raise CheckpointError(
                    f"{source!r}: {path}.{name} is not what {target.tied_to!r} has, though both share one "
                    f"weight here"
                )


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], context: str) -> None:
    """Refuse a file whose tensors are not exactly those that the adapter has.

    Raises:
        CheckpointError: naming the first few of each kind.
    """
    problems = [
        f"unexpected {key!r} in the file; {did_you_mean(key, wanted)}" for key in tensors if key not in wanted
    ]
    problems += [f"missing {key!r} in the file" for key in wanted if key not in tensors]
    problems += [
        f"{key!r} is {tuple(tensor.shape)} in the file and {tuple(wanted[key])} here"
        for key, tensor in tensors.items()
        if key in wanted and tensor.shape != wanted[key]
    ]
    if problems:
        more = [f"... and {len(problems) - 6} more"] if len(problems) > 6 else []
        raise CheckpointError("\n  ".join([f"{context}:", *problems[:6], *more]))
