"""Two `gloo` processes against one: the same losses, a whole file, and training that goes on from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import grafts
from helpers import bases
from helpers.bases import BY_NAME

HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch",
    "--cpu",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
]


def started(program: list[str], folder: Path, **more: str) -> dict[str, Any]:
    """What a program of this folder has written."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    done = subprocess.run(
        [sys.executable, *program, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The trainings of one process."""
    folder = tmp_path_factory.mktemp("single")
    return folder, started([str(HERE / "train.py"), "single"], folder)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one_and_go_on_from_the_file(
    single: tuple[Path, dict[str, Any]], how: str, tmp_path: Path
) -> None:
    alone, expected = single
    got = started([*TORCHRUN, str(HERE / "train.py"), how], tmp_path)
    for name, losses in expected.items():
        assert got[name] == pytest.approx(losses, abs=1e-5), (
            name
        )  # sums of two halves, over some steps of training
        assert len(set(losses)) == len(losses)
    for folder in sorted(path for path in tmp_path.iterdir() if path.is_dir()):
        for part in ("middle", "end", "resumed"):
            here, there = (
                load_file(root / folder.name / part / "adapter_model.safetensors")
                for root in (tmp_path, alone)
            )
            assert here.keys() == there.keys()
            for name, tensor in there.items():
                torch.testing.assert_close(here[name], tensor, atol=1e-5, rtol=1e-4)
        texts = [
            (root / folder.name / "end" / "adapter_config.json").read_text() for root in (tmp_path, alone)
        ]
        assert texts[0] == texts[1]
        model = BY_NAME["llama"].model()
        grafts.load(model, folder / "end")
        assert not torch.equal(model(bases.ids()).logits, BY_NAME["llama"].model()(bases.ids()).logits)
    if how == "fsdp":
        assert "lies in pieces on several processes" in got["merge"]
        assert "is sharded, and an adapter that comes later is not" in got["add"]
        assert got["loaded into a sharded base"] == 0.0


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_trainer_on_two_processes_saves_resumes_and_trains_as_on_one(
    launcher: list[str], tmp_path: Path
) -> None:
    expected = started([str(HERE / "trainer.py")], tmp_path / "one")
    got = started([*launcher, str(HERE / "trainer.py")], tmp_path / "two")
    for name, losses in expected.items():
        assert got[name] == pytest.approx(losses, abs=1e-5), (
            name
        )  # sums of two halves, over some steps of training
    for name in ("lora", "prefix_tuning"):
        first, second = (
            load_file(tmp_path / "two" / folder / "checkpoint-4" / "adapter_model.safetensors")
            for folder in (name, f"{name}-resumed")
        )
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_saves_whole_adapters_resumes_and_trains_as_one_process(stage: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")  # not among what the tests install: it has to be built beside PyTorch
    expected = started([str(HERE / "trainer.py")], tmp_path / "one")
    got = started(
        [*TORCHRUN, str(HERE / "trainer.py")], tmp_path / "two", ZERO_STAGE=stage, DS_ACCELERATOR="cpu"
    )
    for name, losses in expected.items():
        assert got[name] == pytest.approx(losses, abs=1e-5), (
            name
        )  # sums of two halves, over some steps of training
        if "resumed" not in name:
            files = (
                tmp_path / run / name / "checkpoint-4" / "adapter_model.safetensors" for run in ("one", "two")
            )
            here, there = map(load_file, files)
            assert here.keys() == there.keys()
            for key, tensor in here.items():
                torch.testing.assert_close(there[key], tensor, atol=1e-5, rtol=1e-4)
