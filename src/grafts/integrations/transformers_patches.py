"""What `transformers` learns about adapters: its Trainer always, its loading of models where that is asked
for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from grafts.checkpoints import peft_format as peft
from grafts.checkpoints.atomic_write import find
from grafts.checkpoints.hotswap import restore
from grafts.errors import CheckpointError, StateError
from grafts.integrations.transformers_private import (
    TRAINER_LOADS,
    asking_for_peft,
    model_class,
    trainer_class,
)
from grafts.lifecycle.registry import find_registry, unwrapped


def wrap_trainer() -> None:
    """Let every Trainer load adapters back into a model that carries them, when it resumes and when it ends
    with the best.

    Two methods of the class are wrapped, once. For a model without adapters, a folder that holds none, and
    under FSDP and DeepSpeed, which have files of their own, they do what they did.
    """
    trainer = trainer_class()
    for name in TRAINER_LOADS if trainer is not None else ():
        method = getattr(trainer, name)
        if not hasattr(method, "loads_adapters"):
            setattr(trainer, name, _loading(method))


def _loading(method: Callable[..., Any]) -> Callable[..., Any]:
    """A Trainer's method that loads, for models with adapters too."""

    @functools.wraps(method)
    def load(
        self: Any, folder: str | None = None, model: nn.Module | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        given = () if folder is None else (folder,) if model is None else (folder, model)
        source = Path(folder if folder is not None else self.state.best_model_checkpoint)
        inner = unwrapped(self.model if model is None else model)
        own_files = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if own_files or not carries_adapters(inner) or not (there := adapters_in(source)):
            return method(self, *given, *args, **kwargs)
        return load_back(inner, source, there)

    load.loads_adapters = True  # type: ignore[attr-defined]
    return load


def carries_adapters(model: nn.Module) -> bool:
    """Whether adapters were put on this very module, and not on a part of it that saves and loads them by
    itself.
    """
    try:
        return find_registry(model) is not None
    except StateError:
        return False


_undo: list[Callable[[], None]] = []  # what gives `transformers` back what it had
_on: set[Integration] = set()


class Integration:
    """What `integrate` has switched on. ``remove()`` switches it off again, as does the end of a ``with``
    block.

    It stays on as long as somebody has not switched off what they switched on.
    """

    def remove(self) -> None:
        """Give `transformers` back what it had, if nobody else wants it on."""
        _on.discard(self)
        while _undo and not _on:
            _undo.pop()()

    def __enter__(self) -> Self:
        """Nothing: it is on already."""
        return self

    def __exit__(self, *reason: object) -> None:
        """`remove`."""
        self.remove()


def integrate(initialise: Callable[[Any], Any]) -> Integration:
    """Let `transformers` open adapters by their folder or repository with this library; see
    `grafts.integrate`.

    Args:
        initialise: gives a model the methods of this library.
    """

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The method of this library, which the model gets with it."""
        return initialise(self).load_adapter(*args, **kwargs)

    def yes() -> bool:
        return True

    if not _on:
        replacements: list[tuple[Any, str, Callable[..., Any]]] = [
            (model_class(), "load_adapter", load_adapter)
        ]
        replacements += [(module, "is_peft_available", yes) for module in asking_for_peft()]
        for owner, name, value in replacements:
            before = vars(owner).get(name)
            give_back = functools.partial(setattr, owner, name, before)
            _undo.append(functools.partial(delattr, owner, name) if before is None else give_back)
            setattr(owner, name, value)
    handle = Integration()
    _on.add(handle)
    return handle


def adapters_in(folder: Path) -> dict[str, Path]:
    """The adapters that a folder holds: itself by the name "", those of its folders by theirs."""
    if not folder.is_dir():
        return {}
    folders = {"": folder} | {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    return {name: path for name, path in folders.items() if find(path, peft.CONFIG_FILE) is not None}


def load_back(model: nn.Module, folder: Path, there: Mapping[str, Path]) -> None:
    """Give the adapters of a model the tensors that a checkpoint of them holds, in place.

    Args:
        model: the model that carries them.
        folder: the checkpoint.
        there: what `adapters_in` finds in it.

    Raises:
        CheckpointError: an adapter that is trained is not there, or the files do not fit.
    """
    registry = find_registry(model)
    assert registry is not None
    trained = [name for name in registry.trained if name in registry.plans]
    chosen = list(dict.fromkeys([*trained, *registry.setup.active])) or list(registry.plans)
    sources = {name: there[name] for name in registry.plans if name in there}
    if "" in there and not sources:
        sources = {chosen[0]: there[""]} if len(chosen) == 1 else {}
    if missing := [name for name in trained or chosen if name not in sources]:
        found = [name or "one without a name" for name in there]
        raise CheckpointError(
            f"{str(folder)!r} does not hold adapter {missing[0]!r} of this model; it holds {found}"
        )
    for name, source in sources.items():
        restore(model, name, source)
