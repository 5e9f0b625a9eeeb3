"""What can go wrong, as a tree.

    GraftsError
    |-- ConfigError               a config that cannot be (also a ValueError)
    |   |-- UnmatchedTargetError  a pattern that selects nothing in this model
    |   |-- UnsupportedTargetError  a selected module that the method cannot serve
    |   `-- InterfaceError        an interface that does not fit the model, or cannot be inferred
    |-- AdapterNameError          a name that is unknown, taken or empty (also a ValueError)
    |-- StateError                a verb that does not fit the model's present state (also a RuntimeError)
    |-- MergeError                weights that cannot be merged (also a RuntimeError)
    |-- CheckpointError           files that cannot be read, or do not fit the model (also a ValueError)
    `-- RunError                  a command-line run that cannot go on (also a RuntimeError)

Every message says what, what was found instead, and what to do. An operation that raises one of these has
changed nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraftsError(Exception):
    """Base of all errors of this library."""


class ConfigError(GraftsError, ValueError):
    """A config holds a field or a value that cannot be."""


class UnmatchedTargetError(ConfigError):
    """A pattern of a config selects no module of the model."""


class UnsupportedTargetError(ConfigError):
    """A config selects a module of a kind that its method cannot serve."""


class InterfaceError(ConfigError):
    """An interface does not fit the model, or cannot be worked out from it."""


class AdapterNameError(GraftsError, ValueError):
    """An adapter name is unknown, already taken, or empty."""


class StateError(GraftsError, RuntimeError):
    """A verb does not fit what the model holds now (nothing attached, adapters merged ...)."""


class MergeError(GraftsError, RuntimeError):
    """Adapters cannot be merged into the base weights."""


class CheckpointError(GraftsError, ValueError):
    """Files cannot be read or written, or do not fit the model."""


class RunError(GraftsError, RuntimeError):
    """A run of the command line cannot go on; the message is all that its user sees."""


def nearest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known words that are most like ``word``, best first, compared without case; possibly none."""
    by_folded = {name.lower(): name for name in known}
    return [
        by_folded[name] for name in difflib.get_close_matches(word.lower(), by_folded, n=limit, cutoff=0.5)
    ]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause to append to a message about an unknown word: the nearest known words, or all of them."""
    known = list(known)
    near = nearest(word, known)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "known: " + (", ".join(repr(name) for name in sorted(known)) or "none")
