"""Which adapters run: one small object that every site of a model reads."""

from __future__ import annotations

from urllib.parse import quote

from torch import nn


def child_key(name: str) -> str:
    """The key under which a site keeps the adapter ``name``: the name itself where PyTorch allows it, else escaped.

    >>> child_key("en"), child_key("v1.0"), child_key("train")
    ('en', 'v1%2E0', '%train')
    """
    key = quote(name, safe=" ").replace(".", "%2E")
    return f"%{key}" if hasattr(nn.ModuleDict, key) else key


class Setup:
    """The setup of one model, shared by all its sites, so that switching is one assignment.

    Attributes:
        active: names of the active adapters, in the order in which they act at a site.
        merged: names of the adapters that are folded into the base weights now.
        running: what a site runs at a forward: the keys (see `child_key`) of the active adapters that are not merged.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.running: tuple[str, ...] = ()

    def set(self, *, active: tuple[str, ...], merged: tuple[str, ...] = ()) -> None:
        """Make ``active`` what the model computes, ``merged`` of them through its weights."""
        self.active = active
        self.merged = merged
        self.running = tuple(child_key(name) for name in active if name not in merged)
