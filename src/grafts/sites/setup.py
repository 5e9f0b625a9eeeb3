"""Which adapters run: one small object that every site of a model reads, and the names that adapters have in
a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

import torch
from torch import Tensor, nn

from grafts.errors import StateError

_OF_SITES = {
    "setup",
    "children_of",
    "parts",
    "running",
    "routed",
    "append",
    "remove",
    "attach",
    "detach",
    "hooks",
    "acts",
}
_OF_SITES |= {"child", "project", "kernel", "call", "route", "signature", "functions", "eager"}


def child_key(name: str) -> str:
    """The key under which a site keeps the adapter ``name``: the name itself where PyTorch allows it, else
    escaped.

    >>> child_key("en"), child_key("v1.0"), child_key("train")
    ('en', 'v1%2E0', '%train')
    """
    key = name if name.isascii() and name.isidentifier() else quote(name, safe=" ").replace(".", "%2E")
    return f"%{key}" if hasattr(nn.ModuleDict, key) or key in _OF_SITES else key


class Rows:
    """Which adapter each row of a batch asked for.

    Attributes:
        names: one a row; None is the bare base.
        keys: the keys (see `child_key`) of the adapters asked for, in the order of their first row.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.keys = tuple(child_key(name) for name in dict.fromkeys(self.names) if name is not None)
        self._of_key = {
            child_key(name): [row for row, other in enumerate(self.names) if other == name]
            for name in self.names
            if name is not None
        }

    def of(self, key: str, length: int, device: torch.device) -> Tensor:
        """Where the rows of one adapter lie in a tensor whose first dimension is the batch.

        The dimension may be a multiple of the batch: beams of one row, or its tokens, lie side by side.

        Args:
            key: the adapter's.
            length: the size of the first dimension.
            device: where the indices are needed.

        Returns:
            Indices, ``(rows of the adapter * length / rows of the batch,)``.

        Raises:
            StateError: the dimension is no multiple of the batch.
        """
        each, rest = divmod(length, len(self.names))
        if rest or not each:
            raise StateError(
                f"adapter_names is given for {len(self.names)} rows, and a module with an adapter was called "
                f"with {length}: here the first dimension of its input is not the batch, so its rows cannot "
                "choose"
            )
        indices = [row * each + i for row in self._of_key[key] for i in range(each)]
        return torch.tensor(indices, device=device)


class Setup:
    """The setup of one model, shared by all its sites, so that switching is one assignment.

    Attributes:
        active: names of the active adapters, in the order in which they act at a site.
        merged: names of the adapters that are folded into the base weights now.
        running: what a site runs at a forward: the keys (see `child_key`) of the active adapters that are not
            merged.
        rows: what the rows of the present call have asked for, instead of what is active; None outside such a
            call.
        routed: whether the last call of the model was one in which the rows chose.
        prompt_bias: what the present call gives for the prompts of its rows,
            ``(batch, 1 or length, hidden)``, or None.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.running: tuple[str, ...] = ()
        self.rows: Rows | None = None
        self.routed = False
        self.prompt_bias: Tensor | None = None

    def set(self, *, active: tuple[str, ...], merged: tuple[str, ...] = ()) -> None:
        """Make ``active`` what the model computes, ``merged`` of them through its weights."""
        self.active = active
        self.merged = merged
        self.running = tuple(child_key(name) for name in active if name not in merged)

    def require_forward(self) -> None:
        """Refuse to run during the backward pass of a call whose rows are gone.

        Activation checkpointing computes a forward again there, which would silently take the active
        adapters.

        Raises:
            StateError: saying so.
        """
        if self.routed and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise StateError(
                "adapter_names does not go together with activation checkpointing: the second forward, "
                "during the backward pass, does not know the rows; switch it off for this training"
            )
