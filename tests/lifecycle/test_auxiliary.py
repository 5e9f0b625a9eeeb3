"""What an adapter of any method may have beside its own parts: trained tokens, and parts that follow a tied
weight.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import BY_NAME, Base
from helpers.closeness import assert_rounded

LLAMA = BY_NAME["llama"]
TIED = Base("tied", lambda: bases.llama(tie_word_embeddings=True), LLAMA.inputs)
each_base = pytest.mark.parametrize(
    "base", [LLAMA, TIED, BY_NAME["gpt2"], BY_NAME["t5"]], ids=lambda base: base.name
)


def with_tokens(base: Base, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    target = {"gpt2": "c_attn", "t5": "q"}.get(base.name, "q_proj")
    config = grafts.LoraConfig(r=2, target_modules=[target], trainable_token_indices=[4, 7, 49], **options)
    return grafts.add(base.model(dtype), config, name="en")


@each_base
def test_trained_tokens_are_rows_of_the_embedding_and_of_a_tied_head(base: Base) -> None:
    model = with_tokens(base)
    assert_rounded(base.output(model), base.output(base.model()))
    randomise(model, "en")
    expected = base.model()
    rows = next(p for name, p in model.named_parameters() if "trainable_tokens" in name)
    for path, part in parts_of(model, "en"):
        weight = expected.get_submodule(path).weight
        if "trainable_tokens_delta" in part._parameters:
            weight[[4, 7, 49]] = rows.detach()
            assert part.trainable_tokens_delta is rows
        else:
            update = part.scaling * (part.lora_B @ part.lora_A).detach()
            weight += update.T if base.name == "gpt2" else update
    torch.testing.assert_close(base.output(model), base.output(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_base
def test_trained_tokens_merge_without_untying_what_follows(base: Base, dtype: torch.dtype) -> None:
    model = with_tokens(base, dtype)
    bare = base.output(base.model(dtype))
    randomise(model, "en")
    unmerged = base.output(model)
    merged = base.output(grafts.merge(model, "en"))
    assert (merged - unmerged).abs().max() <= (
        1e-5 if dtype == torch.float32 else 0.06
    ) * unmerged.abs().max()
    if base is TIED:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(base.output(grafts.detach(grafts.unmerge(model))), bare)


def test_gradients_of_tokens_come_from_embedding_and_head_and_stay_in_their_rows() -> None:
    model = with_tokens(TIED).train()
    TIED.output(model).square().mean().backward()
    rows = next(p for name, p in model.named_parameters() if "trainable_tokens" in name)
    assert rows.grad is not None
    plain = TIED.model()
    plain.model.embed_tokens.weight.requires_grad_(True)
    TIED.output(plain).square().mean().backward()
    torch.testing.assert_close(
        rows.grad, plain.model.embed_tokens.weight.grad[[4, 7, 49]], rtol=1e-4, atol=1e-6
    )


def test_new_tokens_of_an_enlarged_vocabulary_are_trained_and_saved_alone(tmp_path: Path) -> None:
    model = LLAMA.model()
    model.resize_token_embeddings(53, mean_resizing=False)
    config = grafts.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[50, 51, 52])
    grafts.add(model, config, name="en")
    randomise(model, "en")
    grafts.save(model, "en", tmp_path)
    ids = torch.tensor([[50, 3, 52]])
    expected = model(input_ids=ids).logits
    fresh = LLAMA.model()
    fresh.resize_token_embeddings(53, mean_resizing=False)
    fresh.lm_head.weight.data = model.lm_head.weight.data
    grafts.load(fresh, tmp_path)
    assert_rounded(fresh(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": [50]}, r"has 50, and there are 50 rows: enlarge the vocabulary first"),
        ({"trainable_token_indices": [1, 1]}, "different token ids"),
        ({"trainable_token_indices": ["1"]}, "different token ids"),
        ({"trainable_token_indices": {"embed": [1]}}, "nearest names: 'embed_tokens'"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "one way or the other"),
        ({"trainable_token_indices": {"q_proj": [1]}, "target_modules": ["q_proj"]}, "one way or the other"),
        ({"trainable_token_indices": {"input_layernorm": [1]}}, "has no rows"),
    ],
)
def test_tokens_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.add(LLAMA.model(), grafts.LoraConfig(**({"target_modules": ["v_proj"]} | options)))


def test_tied_embedding_and_head_want_the_same_rows() -> None:
    config = grafts.LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}
    )
    with pytest.raises(grafts.ConfigError, match="share one weight; give both the same rows"):
        grafts.plan(TIED.model(), config)


@pytest.mark.parametrize("first", ["embed_tokens", "lm_head"])
def test_tied_update_is_one_update_of_the_shared_weight(first: str) -> None:
    config = grafts.LoraConfig(r=3, ensure_weight_tying=True, target_modules=[first, "q_proj"])
    made = grafts.plan(TIED.model(), config)
    assert {t.path: t.tied_to for t in made.targets if "proj" not in t.path} in (
        {"model.embed_tokens": None, "lm_head": "model.embed_tokens"},
        {"model.embed_tokens": "lm_head", "lm_head": None},
    )
    model = grafts.add(TIED.model(), config, name="en")
    assert made.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert_rounded(TIED.output(model), TIED.output(TIED.model()))
    randomise(model, "en")
    expected = TIED.model()
    for path, part in parts_of(model, "en"):
        if path == "lm_head":
            a, b = part.factors()
            expected.lm_head.weight += part.scaling * (b @ a).detach()
        elif "proj" in path:
            expected.get_submodule(path).weight += part.scaling * (part.lora_B @ part.lora_A).detach()
    unmerged = TIED.output(model)
    torch.testing.assert_close(unmerged, TIED.output(expected), rtol=1e-5, atol=1e-5)
    grafts.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(TIED.output(model), unmerged, rtol=1e-5, atol=1e-5)
    assert_rounded(TIED.output(grafts.detach(grafts.unmerge(model))), TIED.output(TIED.model()))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    ],
    ids=["update", "copy", "tokens"],
)
def test_tied_parts_stay_one_in_copies_files_and_training(
    options: dict[str, object], how: object, tmp_path: Path
) -> None:
    config = grafts.LoraConfig(r=3, ensure_weight_tying=True, **options)
    model = grafts.add(TIED.model(), config, name="en")
    randomise(model, "en")
    twin = how(model)  # type: ignore[operator]
    grafts.save(twin, "en", tmp_path)
    fresh = TIED.model()
    grafts.load(fresh, tmp_path, name="en", train=True)
    for each in (model, twin, fresh):
        optimizer = torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=0.05)
        for _ in range(2):
            TIED.output(each).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(TIED.output(twin), TIED.output(model))
    torch.testing.assert_close(TIED.output(fresh), TIED.output(model))


def test_file_whose_tied_tensors_differ_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = grafts.LoraConfig(r=3, ensure_weight_tying=True, target_modules=["embed_tokens"])
    grafts.save(grafts.add(TIED.model(), config), "default", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(grafts.CheckpointError, match=r"is not what 'model.embed_tokens' has"):
        grafts.load(TIED.model(), tmp_path)


def test_dora_and_shapes_that_cannot_follow_are_refused() -> None:
    config = grafts.LoraConfig(use_dora=True, ensure_weight_tying=True, target_modules=["embed_tokens"])
    with pytest.raises(grafts.ConfigError, match="use_dora cannot follow a tied weight"):
        grafts.add(TIED.model(), config)
