"""The run with tensors at odd addresses puts them there, and changes nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from helpers import alignment


def test_copies_lie_at_other_odd_addresses_and_are_the_same() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.long):
        tensor = torch.arange(24).view(4, 6).to(dtype)
        copies = [alignment.at_odd_address(tensor) for _ in range(3)]
        assert all(torch.equal(copy, tensor) for copy in copies)
        assert all(copy.data_ptr() % alignment.LINE != 0 for copy in copies)
        assert len({copy.data_ptr() % alignment.LINE for copy in copies}) == 3


def test_models_that_are_made_copied_and_cast_lie_at_odd_addresses() -> None:
    code = f"""
import copy, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from helpers import alignment
from torch import nn
alignment.switch_on()
model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
cast = copy.deepcopy(model).to(torch.float64)
assert not any(alignment.lies_even(t) for m in (model, copy.deepcopy(model), cast) for t in m.parameters())
assert not any(alignment.lies_even(t) for m in (model, cast) for t in m.buffers() if t.dim())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
