"""Checkpoints are written whole or not at all, and read only when everything fits."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import grafts
from grafts.checkpoints import atomic_write as files
from grafts.checkpoints import peft_format as peft
from helpers.adapters import randomise
from helpers.bases import BY_NAME

STEPS = ["mkdtemp", "fsync", "open", "rename", "replace", "rmdir", "chmod"]


def write(directory: Path, r: int) -> None:
    """A checkpoint whose config and tensors both say ``r``."""
    config = grafts.LoraConfig(r=r).to_dict() | {"peft_type": "LORA"}
    files.write_all(
        directory, peft.files_of(config, {"m.lora_A.weight": torch.full((r, 3), float(r))}, "a card")
    )


def whole(directory: Path) -> int:
    """The ``r`` of a checkpoint of which all parts agree."""
    checkpoint = peft.read(directory)
    tensor = checkpoint.tensors["m.lora_A.weight"]
    assert tensor.shape == (checkpoint.config.r, 3)
    assert torch.equal(tensor, torch.full_like(tensor, checkpoint.config.r))
    return checkpoint.config.r


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process; its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def dying_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process die without a word at its ``step``-th operation on files."""
    left = [step]

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(files.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(files.tempfile, "mkdtemp", counted(files.tempfile.mkdtemp))
    for name in ("open", "rename", "replace", "rmdir", "chmod", "mkdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))


def test_process_that_dies_at_any_step_leaves_the_old_or_the_new_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for step in range(40):
        directory = tmp_path / str(step)
        write(directory, 2)

        def work(directory: Path = directory, step: int = step) -> None:
            dying_at(step, monkeypatch)
            write(directory, 5)

        _, status = os.waitpid(in_child(work), 0)
        found.append(whole(directory))
        write(directory, 7)
        assert whole(directory) == 7
        assert sorted(path.name for path in directory.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert os.waitstatus_to_exitcode(status) == 0
    assert found == sorted(found)
    assert {2, 5} == set(found)
    assert found.count(5) > 2


def test_process_killed_many_times_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 2)
    choose = random.Random(0)
    for _ in range(40):
        reading, writing = os.pipe()

        def work(writing: int = writing) -> None:
            for r in range(10_000):
                write(tmp_path, 2 + r % 7)
                os.write(writing, b".")

        child = in_child(work)
        os.close(writing)
        for _ in range(choose.randint(1, 6)):
            os.read(reading, 1)
        for _ in range(choose.randint(0, 20_000)):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        assert whole(tmp_path) in range(2, 9)


def test_same_bytes_are_not_written_again(tmp_path: Path) -> None:
    write(tmp_path, 2)
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    write(tmp_path, 2)
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before


def test_other_files_in_the_directory_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, 2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_full_disk_leaves_the_old_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(grafts.CheckpointError, match="No space left on device"):
        write(tmp_path, 3)
    monkeypatch.undo()
    assert whole(tmp_path) == 2
    assert not list(tmp_path.glob(".writing*"))


def test_a_file_where_the_directory_should_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(grafts.CheckpointError, match="cannot write"):
        write(tmp_path / "file", 2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = grafts.add(BY_NAME["llama"].model(), grafts.LoraConfig(r=4), name="en")
    randomise(model, "en")
    return grafts.save(model, "en", tmp_path / "saved")


def edited(saved: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, saved / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY), "missing 'model.layers.0.self_attn.q_proj.lora_A.weight'"),
        (
            lambda t: t.update({KEY.replace("q_proj", "z_proj"): t[KEY].clone()}),
            "unexpected 'model.layers.0.self_attn.z_proj",
        ),
        (lambda t: t.update({KEY: torch.zeros(3, 16)}), r"\(3, 16\) in the file and \(4, 16\) here"),
        (lambda t: t.update({"other.weight": torch.zeros(1)}), "names in this layout begin with"),
    ],
    ids=["missing", "unexpected", "misshapen", "foreign"],
)
def test_tensor_that_does_not_fit_is_refused_before_the_model_is_touched(
    saved: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edited(saved, edit)
    model = BY_NAME["llama"].model()
    keys = list(model.state_dict())
    with pytest.raises(grafts.CheckpointError, match=message):
        grafts.load(model, saved, name="en")
    assert list(model.state_dict()) == keys


def test_adapter_for_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(grafts.GraftsError):
        grafts.load(BY_NAME["bert"].model(), saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "names no 'peft_type'"),
        ('{"r": 4}', "names no 'peft_type'"),
        ('{"peft_type": "LORB"}', "did you mean 'lora'"),
        ('{"peft_type": "LORA", "r": "four"}', "LoraConfig.r is 'four'"),
        ('{"peft_type": "LORA", "lora_dropout": "much"}', "adapter_config.json"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_config_that_cannot_be_read_is_refused(saved: Path, content: str, message: str) -> None:
    (saved / "adapter_config.json").write_text(content)
    with pytest.raises(grafts.GraftsError, match=message):
        grafts.load(BY_NAME["llama"].model(), saved)


def test_broken_and_absent_files_are_named(saved: Path, tmp_path: Path) -> None:
    model = BY_NAME["llama"].model()
    (saved / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(grafts.CheckpointError, match="not a whole safetensors file"):
        grafts.load(model, saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(grafts.CheckpointError, match=r"holds no adapter_model\.safetensors"):
        grafts.load(model, saved)
    with pytest.raises(grafts.CheckpointError, match="no such directory"):
        grafts.load(model, tmp_path / "nowhere")


def test_config_is_data_and_imports_nothing(saved: Path) -> None:
    file = saved / "adapter_config.json"
    data = json.loads(file.read_text())
    data["auto_mapping"] = {"base_model_class": "Popen", "parent_library": "antigravity"}
    file.write_text(json.dumps(data))
    import sys

    grafts.load(BY_NAME["llama"].model(), saved)
    assert "antigravity" not in sys.modules


def test_report_prints_where_what_and_how_much(saved: Path) -> None:
    text = str(grafts.load(BY_NAME["llama"].model(), saved, name="en"))
    assert f"loaded adapter 'en' from {saved}" in text
    assert "LoRA: 448 trainable parameters in 4 modules" in text
    assert "8 tensors" in text
