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
    """Whether some parameter of these lies in pieces on several processes, as `fully_shard` leaves them.

    Args:
        parts: any modules.
    """
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
    """Whether this is the process that writes files: the first of those that train together, or the only
    one.
    """
    is_one_of_several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not is_one_of_several or torch.distributed.get_rank() == 0


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
    source = None if state is None else _StateDict(model, state)
    replaced = _with_whole_tensors(parts, source)
    # Whole dictionaries change places and hooks are left out, since others may watch what is read and called
    # (DeepSpeed).
    kept = []
    for module, _ in replaced:
        kept.append((module, {name: module.__dict__[name] for name in ("_parameters", *_HOOKS)}))
    try:
        for module, parameters in replaced:
            module.__dict__["_parameters"] = parameters
            for name in _HOOKS:
                module.__dict__[name] = OrderedDict()
        yield
    finally:
        for module, attributes in kept:
            module.__dict__.update(attributes)


def _with_whole_tensors(
    parts: Sequence[Part], source: _StateDict | None
) -> list[tuple[nn.Module, dict[str, nn.Parameter | None]]]:
    """The parameters of parts, module by module, with whole tensors in place of those that lie in pieces.

    Args:
        parts: of adapters.
        source: where all of the tensors come from; None to gather those that lie in pieces.

    Raises:
        StateError: the state dict does not hold one of them.
    """
    whole: dict[nn.Parameter, nn.Parameter] = {}  # a parameter that stands twice is gathered once
    replaced: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    for part in parts:
        for module in part.modules():
            parameters = dict(module._parameters)
            for key, parameter in parameters.items():
                if parameter is None or (source is None and not is_dtensor(parameter)):
                    continue
                if parameter not in whole:
                    tensor = parameter if source is None else source.tensor_of(parameter)
                    whole[parameter] = nn.Parameter(_full_tensor(tensor), requires_grad=False)
                parameters[key] = whole[parameter]
            replaced.append((module, parameters))
    return replaced


class _StateDict:
    """A model's state dict, in which the tensors of adapters are found whatever wraps the model."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        self._state = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
        self._names: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[parameter] = _WRAPPERS.sub("", name)

    def tensor_of(self, parameter: nn.Parameter) -> Tensor:
        """What the state dict holds for a parameter.

        Args:
            parameter: one of the model's own.

        Raises:
            StateError: it holds nothing.
        """
        name = self._names[parameter]
        if name not in self._state:
            raise StateError(f"the state dict does not hold {name!r}, which is the adapter's")
        return self._state[name]


def _full_tensor(tensor: Tensor) -> Tensor:
    """A tensor without its gradient; one of which each process has a piece is gathered from all of them."""
    if is_dtensor(tensor):
        return cast("Any", tensor).full_tensor()  # type: ignore[no-any-return]
    return tensor.detach()
