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
        source = Path(folder if folder is not None else self.state.best_model_checkpoint)
        inner = unwrapped(self.model if model is None else model)
        has_own_files = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not has_own_files and carries_adapters(inner):
            adapters = adapters_in(source)
            if adapters:
                return load_back(inner, source, adapters)
        # Passed on as they came: one of the two methods takes neither folder nor model.
        passed_on: list[Any] = []
        if folder is not None:
            passed_on.append(folder)
            if model is not None:
                passed_on.append(model)
        return method(self, *passed_on, *args, **kwargs)

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


# What gives `transformers` back what it had, in the order of taking.
_undo: list[Callable[[], None]] = []
# Those who have switched the integration on, and not off again.
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
        """The answer to whether `peft` is installed: what it is asked for, this library does."""
        return True

    # Once, however many have asked for it.
    if not _on:
        _replace(model_class(), "load_adapter", load_adapter)
        for module in asking_for_peft():
            _replace(module, "is_peft_available", yes)
    handle = Integration()
    _on.add(handle)
    return handle


def _replace(owner: Any, name: str, value: Callable[..., Any]) -> None:
    """Replace an attribute of a class or module of `transformers`, and note how to give it back."""
    before = vars(owner).get(name)
    if before is None:
        _undo.append(functools.partial(delattr, owner, name))
    else:
        _undo.append(functools.partial(setattr, owner, name, before))
    setattr(owner, name, value)


def adapters_in(folder: Path) -> dict[str, Path]:
    """The adapters that a folder holds: itself by the name "", those of its folders by theirs.

    Args:
        folder: a checkpoint of a Trainer; nothing is found in one that is not there.
    """
    if not folder.is_dir():
        return {}
    folders = {"": folder}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            folders[path.name] = path
    return {name: path for name, path in folders.items() if find(path, peft.CONFIG_FILE) is not None}


def load_back(model: nn.Module, folder: Path, found: Mapping[str, Path]) -> None:
    """Give the adapters of a model the tensors that a checkpoint of them holds, in place.

    Args:
        model: the model that carries them.
        folder: the checkpoint.
        found: what `adapters_in` finds in it.

    Raises:
        CheckpointError: an adapter that is trained is not there, or the files do not fit.
    """
    registry = find_registry(model)
    assert registry is not None
    trained = [name for name in registry.trained if name in registry.plans]
    # What the model is about: what is trained or active, else all that it carries.
    chosen = list(dict.fromkeys([*trained, *registry.setup.active])) or list(registry.plans)
    sources = {name: found[name] for name in registry.plans if name in found}
    # One adapter alone lies in the folder itself, without its name.
    if "" in found and not sources and len(chosen) == 1:
        sources = {chosen[0]: found[""]}
    for name in trained or chosen:
        if name not in sources:
            held = [other or "one without a name" for other in found]
            raise CheckpointError(
                f"{str(folder)!r} does not hold adapter {name!r} of this model; it holds {held}"
            )
    for name, source in sources.items():
        restore(model, name, source)
