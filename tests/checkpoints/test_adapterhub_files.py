"""Adapters in AdapterHub's layout: its own files give its outputs, and it reads ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import grafts
from helpers.adapters import randomise

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "adapterhub"  # made by scripts/adapterhub_reference.py
CASES = sorted(path.name for path in DATA.iterdir())
PEER = ROOT / ".venv-hub" / "bin" / "python"
sys.path.append(str(ROOT / "scripts"))


def base(case: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The base of a case, its inputs and its expected output."""
    from adapterhub_reference import model

    data = load_file(DATA / case / "case.safetensors")
    inputs = {
        name.removeprefix("input."): tensor for name, tensor in data.items() if name.startswith("input.")
    }
    made = model(case)
    made.load_state_dict({n: t for n, t in data.items() if n != "output" and not n.startswith("input.")})
    return made.requires_grad_(False), inputs, data["output"]


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "t5-flat"])
def test_files_of_adapterhub_give_its_outputs(case: str, kernel: str) -> None:
    from adapterhub_reference import output

    model, inputs, expected = base(case)
    model.set_attn_implementation(kernel)
    bare = output(case, model, inputs)
    grafts.load(model, DATA / case / "adapter", name="any", allow_pickle=True)
    real = inputs.get(
        "attention_mask", torch.ones(expected.shape[:2])
    ).bool()  # kernels differ in what padding becomes
    torch.testing.assert_close(output(case, model, inputs)[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bare[real], expected[real], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("t5-flat", "gpt2-lora")])
def test_what_was_read_is_written_again_and_adapterhub_reads_it(case: str, tmp_path: Path) -> None:
    from adapterhub_reference import output

    model, inputs, _ = base(case)
    grafts.load(model, DATA / case / "adapter", name="en", allow_pickle=True)
    randomise(model, "en", scale=0.1)
    expected = output(case, model, inputs)
    folder = tmp_path / case
    grafts.save(model, "en", folder / "adapter", layout="adapterhub")
    again, _, _ = base(case)
    grafts.load(again, folder / "adapter", allow_pickle=True)
    torch.testing.assert_close(output(case, again, inputs), expected, rtol=1e-5, atol=1e-5)
    if PEER.exists():
        read_by_the_peer(folder, case, expected)


def read_by_the_peer(folder: Path, case: str, expected: Tensor) -> None:
    """Have AdapterHub's library load ``adapter`` of a folder and compare its output."""
    data = load_file(DATA / case / "case.safetensors")
    save_file(data | {"output": expected.contiguous()}, folder / "case.safetensors")
    command = [str(PEER), str(ROOT / "scripts" / "adapterhub_reference.py"), "read", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "the same" in done.stdout, done.stderr


@torch.no_grad()
@pytest.mark.parametrize("case", ["bert-gated", "gpt2", "bert-prompt", "bert-prompt-after-bos"])
def test_our_files_come_back_and_adapterhub_reads_them(case: str, tmp_path: Path) -> None:
    from adapterhub_reference import output

    like = (
        case
        if case in CASES
        else next(name for name in CASES if name.startswith(case.split("-", maxsplit=1)[0]))
    )
    model, inputs, _ = base(like)
    config: grafts.AdapterConfig = grafts.PrefixTuningConfig(
        num_virtual_tokens=4, count_positions=False, use_gating="gated" in case, prefix_projection=True
    )
    if "prompt" in case:
        config = grafts.PromptTuningConfig(
            num_virtual_tokens=4, after_embeddings=True, after_first="bos" in case
        )
    grafts.add(model, config, name="en")
    randomise(model, "en")
    expected = output(like, model, inputs)
    folder = tmp_path / like
    grafts.save(model, "en", folder / "adapter", layout="adapterhub")
    again, _, _ = base(like)
    grafts.load(again, folder / "adapter", allow_pickle=True)
    torch.testing.assert_close(output(like, again, inputs), expected, rtol=1e-5, atol=1e-5)
    if PEER.exists():
        read_by_the_peer(folder, like, expected)


def test_the_interface_that_adapterhub_has_saved_is_used() -> None:
    model, _, _ = base("qwen2-seq_bn")
    report = grafts.load(model, DATA / "qwen2-seq_bn" / "adapter", allow_pickle=True)
    theirs = json.loads((DATA / "qwen2-seq_bn" / "adapter" / "adapter_interface.json").read_text())[
        "interface"
    ]
    ours = report.plan.interface.to_dict()
    assert {name: ours[name] for name in theirs if name != "adapter_methods"} == {
        name: value for name, value in theirs.items() if name != "adapter_methods"
    }


def test_what_has_no_place_in_that_layout_is_refused(tmp_path: Path) -> None:
    model, _, _ = base("bert-flat")
    grafts.add(model, grafts.LoraConfig(use_rslora=True), name="lora")
    grafts.add(model, "direft", name="direft")
    grafts.add(model, grafts.AdaLoraConfig(total_step=9), name="adalora")
    grafts.add(model, grafts.PrefixTuningConfig(), name="counted")
    with pytest.raises(grafts.ConfigError, match="AdapterHub has LoRA with one rank and one alpha"):
        grafts.save(model, "lora", tmp_path, layout="adapterhub")
    with pytest.raises(grafts.ConfigError, match="it would read a NoReFT"):
        grafts.save(model, "direft", tmp_path, layout="adapterhub")
    with pytest.raises(grafts.ConfigError, match="a AdaLoraConfig has no place"):
        grafts.save(model, "adalora", tmp_path, layout="adapterhub")
    with pytest.raises(grafts.ConfigError, match="counts positions"):
        grafts.save(model, "counted", tmp_path, layout="adapterhub")
    grafts.add(model, grafts.PromptTuningConfig(), name="before")
    with pytest.raises(grafts.ConfigError, match="behind the embeddings: after_embeddings=True"):
        grafts.save(model, "before", tmp_path, layout="adapterhub")
    with pytest.raises(grafts.ConfigError, match="no layout 'hub'"):
        grafts.save(model, "lora", tmp_path, layout="hub")  # type: ignore[call-overload]
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_read_say_why_and_touch_nothing(tmp_path: Path) -> None:
    model, _, _ = base("bert-flat")
    with pytest.raises(grafts.CheckpointError, match="is a pickle"):
        grafts.load(model, DATA / "bert-flat" / "adapter")
    folder = tmp_path / "adapter"
    shutil.copytree(DATA / "bert-flat" / "adapter", folder)
    file = folder / "adapter_config.json"
    original = json.loads(file.read_text())
    for changes, message in (
        ({"architecture": "mtl_lora"}, "architecture 'mtl_lora'"),
        ({"leave_out": [1]}, r"leave_out=\[1\] cannot be honoured"),
        ({"non_linearity": "relu"}, "non_linearity='relu'"),
        ({"prefix_length": 5}, "a prefix of 192 numbers is none of 5 tokens"),
    ):
        file.write_text(json.dumps(original | {"config": original["config"] | changes}))
        with pytest.raises((grafts.ConfigError, grafts.CheckpointError), match=message):
            grafts.load(model, folder, allow_pickle=True)
    file.write_text(json.dumps(original))
    torch.save({"something.else": torch.zeros(2)}, folder / "pytorch_adapter.bin")
    with pytest.raises(grafts.CheckpointError, match=r"'something\.else' is no tensor of its method"):
        grafts.load(model, folder, allow_pickle=True)
    save_file(
        {"prefix_tuning.prefix_tunings.en.self_prefix.control_trans": torch.zeros(8)},
        folder / "adapter.safetensors",
    )
    with pytest.raises(grafts.CheckpointError, match="a prefix of 8 numbers is none of 3 tokens"):
        grafts.load(model, folder)
    for name in ("pytorch_adapter.bin", "adapter.safetensors"):
        (folder / name).unlink()
    with pytest.raises(grafts.CheckpointError, match=r"holds no pytorch_adapter\.bin"):
        grafts.load(model, folder, allow_pickle=True)
    for case, others in (("gpt2-flat", "bert-mlp"), ("t5-flat", "bert-flat")):
        other, _, _ = base(case)
        with pytest.raises((grafts.CheckpointError, grafts.ConfigError)):
            grafts.load(other, DATA / others / "adapter", allow_pickle=True)
        assert grafts.adapters(other) == {}
    assert grafts.adapters(model) == {}


def test_t5_is_refused_because_that_library_moves_its_distances(tmp_path: Path) -> None:
    model, _, _ = base("t5-flat")
    with pytest.raises(grafts.ConfigError, match="moves the distances between the tokens"):
        grafts.load(model, DATA / "t5-flat" / "adapter", allow_pickle=True)
    grafts.add(model, grafts.PrefixTuningConfig(), name="en")
    with pytest.raises(grafts.ConfigError, match="moves the distances between the tokens"):
        grafts.save(model, "en", tmp_path, layout="adapterhub")
