"""Libraries that tests compare with, where they are installed: a test that touches a missing one is skipped."""

from __future__ import annotations

from typing import Any

import pytest


class Peer:
    """A module that is imported when a test first asks it for something."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(pytest.importorskip(self._name), name)


peft: Any = Peer("peft")
