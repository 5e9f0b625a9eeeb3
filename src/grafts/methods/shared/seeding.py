"""Random numbers from a seed of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int | None, number: int = 0) -> Iterator[None]:
    """Draw from a seed, each number from another stream of it, and leave PyTorch's own generator alone.

    Args:
        seed: where the random numbers come from; None draws from PyTorch's own generator.
        number: which stream of the seed; the same seed and number give the same values.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 100003 + number)
        yield
