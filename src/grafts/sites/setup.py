"""Which adapters run: one small object that every site of a model reads, and the names that adapters have in
a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

import torch
from torch import Tensor, nn

from grafts.errors import StateError

# The public attributes of sites, under which no adapter can be kept: parts are children of their site, and a
# child of one of these names would stand in the attribute's place. They stand here and are not read off the
# classes, because a key must not depend on which kinds of site have been imported; a test compares them with
# the classes.
SITE_ATTRIBUTES = frozenset(
    (
        "acting acts append attach call child children_of detach eager embedded_signature functions hooks "
        "kernel offset parts prefix_scores project read remove route routed running setup signature"
    ).split()
)


def child_key(name: str) -> str:
    """The key under which a site keeps the adapter ``name``: the name itself where PyTorch allows it, else
    escaped.

    >>> child_key("en"), child_key("v1.0"), child_key("train")
    ('en', 'v1%2E0', '%train')
    """
    if name.isascii() and name.isidentifier():
        key = name
    else:
        key = quote(name, safe=" ").replace(".", "%2E")
    is_taken = hasattr(nn.ModuleDict, key) or key in SITE_ATTRIBUTES
    if is_taken:
        return f"%{key}"
    return key


class Rows:
    """Which adapter each row of a batch asked for.

    Attributes:
        names: one a row; None is the bare base.
        keys: the keys (see `child_key`) of the adapters asked for, in the order of their first row.
    """

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names: tuple[str | None, ...] = tuple(names)
        # The numbers of the rows that each adapter has, by its key.
        self._of_key: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                self._of_key.setdefault(child_key(name), []).append(row)
        self.keys: tuple[str, ...] = tuple(self._of_key)

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
        per_row, rest = divmod(length, len(self.names))
        if rest or not per_row:
            raise StateError(
                f"adapter_names is given for {len(self.names)} rows, and a module with an adapter was called "
                f"with {length}: here the first dimension of its input is not the batch, so its rows cannot "
                "choose"
            )
        indices: list[int] = []
        for row in self._of_key[key]:
            indices += range(row * per_row, (row + 1) * per_row)
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
