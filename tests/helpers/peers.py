"""Libraries that tests compare with; a test that touches one that is not installed is skipped."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


class Peer:
    """A module that is imported when a test first asks it for something."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(pytest.importorskip(self._name), name)


peft: Any = Peer("peft")


def peft_of_the_mixin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`peft` for tests beside the mixin of `transformers`; skips without it.

    `transformers` 5.24 asks for `peft` 0.22, which was not released when it was, and gets along with 0.21.
    """
    module = pytest.importorskip("peft")
    mixin = importlib.import_module("transformers.integrations.peft")
    if mixin.MIN_PEFT_VERSION == "0.22.0":
        monkeypatch.setattr(mixin, "MIN_PEFT_VERSION", "0.21.0")
    return module
