"""Which module names a pattern selects; pure functions over names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from grafts.errors import ConfigError, nearest

V = TypeVar("V")


def matches(path: str, patterns: str | Sequence[str]) -> bool:
    """Whether ``path`` is selected: by a regular expression for all of it, or by a list of names or ends of
    names.

    >>> path = "layers.0.q_proj"
    >>> matches(path, ["q_proj"]), matches(path, "q_proj"), matches(path, r".*\\.q_proj")
    (True, False, True)
    """
    if isinstance(patterns, str):
        return compiled(patterns).fullmatch(path) is not None
    return any(path == name or path.endswith(f".{name}") for name in patterns)


def owner_and_name(path: str) -> tuple[str, str]:
    """The path of the module that a linear belongs to, and its name there; one that only wraps it is passed
    over.

    >>> owner_and_name("layers.0.self_attn.q_proj.linear")
    ('layers.0.self_attn', 'q_proj')
    """
    owner, _, name = path.removesuffix(".linear").rpartition(".")
    return owner, name


def join(*steps: str) -> str:
    """The path of a module or tensor below others; the root, whose path is empty, adds nothing.

    >>> join("model", "layers.0"), join("", "lm_head")
    ('model.layers.0', 'lm_head')
    """
    return ".".join(step for step in steps if step)


def within(path: str, owners: Iterable[str]) -> bool:
    """Whether ``path`` is one of the modules ``owners`` or lies below one.

    >>> within("classifier.dense", ["classifier"]), within("classifier2", ["classifier"])
    (True, False)
    """
    return any(path == owner or path.startswith(f"{owner}.") for owner in owners)


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression, or the error that names it.

    Raises:
        ConfigError: it is not a regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error


def unmatched(paths: Iterable[str], patterns: str | Sequence[str]) -> list[str]:
    """The patterns that select none of ``paths``: the regular expression, or the names of the list."""
    paths = list(paths)
    if isinstance(patterns, str):
        is_matched = any(matches(path, patterns) for path in paths)
        return [] if is_matched else [patterns]
    # Each name of a list has to select something by itself.
    return [name for name in patterns if not any(matches(path, [name]) for path in paths)]


def pattern_value(path: str, by_pattern: Mapping[str, V], default: V) -> V:
    """The value of the first pattern that matches the end of ``path`` (from a dot or the start), else
    ``default``.

    >>> pattern_value("model.layers.1.v_proj", {"^model.layers.1.v_proj": 6, "q_proj": 2}, 4)
    6
    """
    for pattern, value in by_pattern.items():
        if compiled(rf"(.*\.)?({pattern})$").match(path):
            return value
    return default


def layer_index(path: str, layers_pattern: Sequence[str]) -> int | None:
    """The index of the repeated layer that ``path`` lies in; None where it lies in none.

    Args:
        path: a module's.
        layers_pattern: names of lists of layers, of which the first that is in the path counts; where none is
            given it is the first number in the path.

    >>> layer_index("model.layers.3.mlp.experts.0.w1", []), layer_index("model.layers.3.q_proj", ["h"])
    (3, None)
    """
    if layers_pattern:
        expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in layers_pattern]
    else:
        # A list of any name, else a model that is a list itself.
        expressions = [r"(?:^|.*?\.)[^.]+\.(\d+)\.", r"(\d+)\."]
    for expression in expressions:
        match = compiled(expression).match(path)
        if match is not None:
            return int(match.group(1))
    return None


def collapsed(path: str) -> str:
    """The name with every index as ``*``: equal for the same module of each layer.

    >>> collapsed("model.layers.3.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    """
    return ".".join("*" if step.isdigit() else step for step in path.split("."))


def nearest_modules(pattern: str, paths: Iterable[str]) -> str:
    """The last names in ``paths`` that are most like a pattern's, with how often each stands in the model."""
    counts = Counter(path.rsplit(".", 1)[-1] for path in paths if path)
    wanted = re.sub(r"[^\w.]", "", pattern).rsplit(".", 1)[-1]
    names = nearest(wanted, counts)
    if not names:
        names = [name for name, _ in counts.most_common(6)]
    described = []
    for name in names:
        plural = "" if counts[name] == 1 else "s"
        described.append(f"{name!r} ({counts[name]} module{plural})")
    return ", ".join(described) or "none"
