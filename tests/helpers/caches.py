"""What the installed `transformers` calls a cache: ``cache`` from 5.24 on, ``past_key_values`` before."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return output[CACHE]


def going_on(cache: Any) -> dict[str, Any]:
    """The argument with which a call goes on from a cache."""
    return {CACHE: cache}
