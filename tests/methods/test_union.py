"""Unions: several methods in one adapter, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grafts
from helpers.adapters import randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded

LLAMA, BERT, SDPA = BY_NAME["llama"], BY_NAME["bert"], BY_NAME["sdpa"]


def test_members_of_a_union_may_stand_at_one_module_and_are_saved_apart(tmp_path: Path) -> None:
    model = LLAMA.model()
    grafts.add(
        model,
        "double_seq_bn[reduction_factor=4]|lora[target_roles=['o', 'output']]|lora[r=2, target_roles=['o']]",
        name="en",
    )
    randomise(model, "en")
    expected = LLAMA.output(model)
    grafts.save(model, "en", tmp_path)
    again = LLAMA.model()
    report = grafts.load(again, tmp_path, name="de")
    assert_rounded(LLAMA.output(again), expected)
    assert "Union" in str(report)
    rows = model(**LLAMA.inputs(), adapter_names=["en", None]).logits
    torch.testing.assert_close(rows[0], expected[0], rtol=1e-5, atol=1e-5)
    grafts.train_only(again, "de")
    LLAMA.output(again).sum().backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)


def test_a_union_file_with_a_missing_member_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = LLAMA.model()
    grafts.add(model, "seq_bn|lora", name="en")
    grafts.save(model, "en", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith("0.")}, file)
    with pytest.raises(grafts.CheckpointError, match="missing '1"):
        grafts.load(LLAMA.model(), tmp_path)
    save_file({f"x{key}": tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(grafts.CheckpointError, match="begin with a member's number"):
        grafts.load(LLAMA.model(), tmp_path)


def test_configs_of_a_union_are_kept_and_a_union_of_unions_is_refused() -> None:
    union = grafts.config_from("seq_bn|loreft")
    assert grafts.UnionConfig.from_dict(union.to_dict()) == union
    with pytest.raises(grafts.ConfigError, match="no unions"):
        grafts.UnionConfig(configs=[union])
    with pytest.raises(grafts.ConfigError, match="given to the configs of the union"):
        grafts.UnionConfig(configs=[grafts.LoraConfig()], target_modules=["q_proj"])
