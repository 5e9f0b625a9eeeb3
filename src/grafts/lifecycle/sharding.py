"""Adapters whose tensors lie in pieces on several processes (`fully_shard`), and state dicts that hold them
whole.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from grafts.errors import StateError
from grafts.modules.tree import is_dtensor
from grafts.sites.site import Part

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_sharded(parts: Iterable[nn.Module]) -> bool:
    """Whether some parameter of these lies in pieces on several processes."""
    return any(is_dtensor(parameter) for part in parts for parameter in part.parameters())


def require_shared(model: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Refuse to train whole parts on a base that lies in pieces: every process would train its own.

    Raises:
        StateError: saying in which order to go.
    """
    if "torch.distributed.tensor" not in sys.modules or not is_sharded([model]):
        return
    if not all(is_dtensor(parameter) for part in parts for parameter in part.parameters()):
        raise StateError(
            f"this {type(model).__name__} is sharded, and an adapter that comes later is not: each process "
            "would train its own. Add or load the adapter first, then call fully_shard; to use it as it is, "
            "load it with train=False"
        )


def is_main_process() -> bool:
    """Whether this is the process that writes files: the first, or the only one."""
    return (
        not (torch.distributed.is_available() and torch.distributed.is_initialized())
        or torch.distributed.get_rank() == 0
    )


@contextlib.contextmanager
def gathered(
    model: nn.Module, parts: Sequence[Part], state: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Let ``parts`` hold whole tensors for the length of a ``with`` block.

    Without a state dict, every process has to come here: the pieces are gathered from all of them.

    Args:
        model: the model that carries the parts.
        parts: of adapters.
        state: the model's state dict, to take the tensors from.

    Raises:
        StateError: the state dict does not hold one of them.
    """
    names: dict[int, str] = {}
    if state is not None:
        state = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
        names = {id(p): _WRAPPERS.sub("", name) for name, p in model.named_parameters(remove_duplicate=False)}
    before: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    made: dict[int, nn.Parameter] = {}
    for module in (module for part in parts for module in part.modules()):
        own = dict(module._parameters)
        for key, parameter in own.items():
            if parameter is not None and (state is not None or is_dtensor(parameter)):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_whole(parameter, names, state), requires_grad=False)
                own[key] = made[id(parameter)]
        before.append((module, own))
    # whole dictionaries change places and hooks are left out, since others may watch what is read and called
    # (DeepSpeed)
    kept = [
        (module, {name: module.__dict__[name] for name in ("_parameters", *_HOOKS)}) for module, _ in before
    ]
    try:
        for module, own in before:
            module.__dict__.update({"_parameters": own, **{name: OrderedDict() for name in _HOOKS}})
        yield
    finally:
        for module, all_own in kept:
            module.__dict__.update(all_own)


def _whole(parameter: Tensor, names: Mapping[int, str], state: Mapping[str, Tensor] | None) -> Tensor:
    if state is not None:
        name = names[id(parameter)]
        if name not in state:
            raise StateError(f"the state dict does not hold {name!r}, which is the adapter's")
        parameter = state[name]
    if is_dtensor(parameter):
        return cast("Any", parameter).full_tensor()  # type: ignore[no-any-return]
    return parameter.detach()
