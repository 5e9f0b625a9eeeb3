"""The output of a stack with virtual tokens in it, and without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from grafts.errors import StateError
from grafts.sites.arguments import output_values
from grafts.sites.prompt_layout import at_positions


def require_positions(host: nn.Module, output: Any, length: int) -> None:
    """Refuse an output of which nobody knows where the tokens are in it: of a module that changes how many
    there are.

    Args:
        host: the module that was called.
        output: what it gave.
        length: how many positions went in.

    Raises:
        StateError: its hidden states have another number of positions than went in.
    """
    for states in output_values(output):
        if not isinstance(states, Tensor) or states.dim() != 3:
            continue
        if states.shape[1] == length:
            return
        raise StateError(
            f"a {type(host).__name__} gives {states.shape[1]} positions for {length} that went in, so those "
            "of the virtual tokens cannot be told from the others: choose a method without virtual tokens"
        )


def tokens_only(value: Any, tokens_at: Tensor | int, length: int) -> Any:
    """An output, or several, with the tokens' own positions only: hidden states ``(batch, positions, size)``
    and what attention has done from them, ``(batch, heads, positions, keys)``.

    Args:
        value: the output.
        tokens_at: the tokens' positions, ``(batch, tokens)``, or how many positions come before them.
        length: how many positions there are.
    """
    if isinstance(value, Mapping):
        for name in list(value):
            value[name] = tokens_only(value[name], tokens_at, length)  # type: ignore[index]
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(tokens_only(item, tokens_at, length) for item in value)
    if not isinstance(value, Tensor) or value.dim() not in _POSITIONS_IN:
        return value
    dim = _POSITIONS_IN[value.dim()]
    if value.shape[dim] != length:
        return value
    if isinstance(tokens_at, int):
        return value.narrow(dim, tokens_at, length - tokens_at)
    return at_positions(value, tokens_at, dim)


# In how many dimensions an output lies -> which of them its positions are: of hidden states, and of what
# attention did.
_POSITIONS_IN = {3: 1, 4: 2}
