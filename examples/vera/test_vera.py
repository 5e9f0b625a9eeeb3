"""VeRA has the properties of a method, and computes what its formula says."""

from __future__ import annotations

import grafts_vera
import pytest
import torch
from grafts_vera import VeraConfig, VeraPart
from torch import nn

import grafts
from grafts.testing import check_method


def parts_of(model: nn.Module) -> list[VeraPart]:
    return [module for module in model.modules() if isinstance(module, VeraPart)]


def test_it_is_a_method() -> None:
    report = check_method("vera")
    assert report.not_claimed.keys() == {
        "one adapter with weight 1 is that adapter, in every way of combining"
    }


def test_it_computes_its_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    x = torch.randn(4, 6)
    grafts.add(model, VeraConfig(r=4, projection_prng_key=7, target_modules="all-linear"), name="a")
    first, last = parts_of(model)
    for part in (first, last):
        nn.init.normal_(part.vera_lambda_b)
        nn.init.normal_(part.vera_lambda_d)

    down, up = grafts_vera.projections((4, 10), (10, 4), seed=7)
    hidden = model[0].weight @ x.T
    hidden = hidden + first.vera_lambda_b[:, None] * (
        up @ (first.vera_lambda_d[:, None] * (down[:, :6] @ x.T))
    )
    hidden = (hidden + model[0].bias[:, None]).relu()
    output = last.vera_lambda_b[:, None] * (up[:3] @ (last.vera_lambda_d[:, None] * (down @ hidden)))
    output = output + model[2].weight @ hidden + model[2].bias[:, None]
    torch.testing.assert_close(model(x), output.T)


def test_a_file_without_the_projection_is_read_again(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))
    x = torch.randn(4, 6)
    config = VeraConfig(r=4, save_projection=False, target_modules="all-linear")
    grafts.add(base, config, name="a")
    for part in parts_of(base):
        nn.init.normal_(part.vera_lambda_b)
    expected = base(x)
    grafts.save(base, "a", tmp_path)
    grafts.detach(base)
    grafts.load(base, tmp_path, name="a")
    torch.testing.assert_close(base(x), expected)


def test_peft_reads_its_files_and_it_reads_those_of_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaModel(sizes).eval()
    ids = torch.randint(50, (2, 5))

    grafts.add(model, VeraConfig(r=4, target_modules=["q_proj", "down_proj"]), name="a")
    for part in parts_of(model):
        nn.init.normal_(part.vera_lambda_b)
    expected = model(ids).last_hidden_state
    grafts.save(model, "a", tmp_path / "ours")
    grafts.detach(model)

    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(ids).last_hidden_state, expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = theirs.unload()
    grafts.load(model, tmp_path / "theirs", name="a")
    torch.testing.assert_close(model(ids).last_hidden_state, expected)
