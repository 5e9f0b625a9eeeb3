"""What goes wrong in `adapters` 1.3.0: here it is right, or refused.

Defects of its composition blocks and of its own model classes have no counterpart here.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.adapters import randomise
from helpers.bases import BY_NAME, ids, llama
from helpers.caches import cache_of, going_on
from helpers.closeness import assert_rounded

ROOT = Path(__file__).parents[1]
HUB = ROOT / "tests" / "data" / "adapterhub"
LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]


def shaken_norms(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def adapted(config: str, base: object = LLAMA, scale: float = 0.3) -> nn.Module:
    model = base.model()  # type: ignore[attr-defined]
    grafts.add(model, config, name="en")
    randomise(model, "en", scale=scale)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        "double_seq_bn[reduction_factor=4]",
        "par_bn[reduction_factor=4]",
        "seq_bn_inv[reduction_factor=4]",
        "loreft",
        "lora",
    ],
)
def test_cached_generation_is_that_of_full_forwards(config: str) -> None:
    model = adapted(config)
    tokens = ids()[:, :5]
    cached = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    grown = tokens
    for _ in range(6):
        grown = torch.cat([grown, model(input_ids=grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, grown)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "union", ["mam", "prefix_tuning[prefix_length=3, flat=True]|par_bn[reduction_factor=2]"]
)
def test_prefixes_in_unions_act_alike_in_every_kernel(union: str, padded: bool) -> None:
    outputs = {}
    for kernel in ("eager", "sdpa"):
        model = LLAMA.model()
        model.set_attn_implementation(kernel)
        bare = model(input_ids=ids()).logits
        torch.manual_seed(0)
        grafts.add(model, union, name="en")
        randomise(model, "en", scale=0.05)
        mask = torch.ones_like(ids())
        mask[0, :3] = int(not padded)
        outputs[kernel] = model(input_ids=ids(), attention_mask=mask).logits[:, 3:]
        assert not torch.allclose(outputs[kernel], bare[:, 3:], atol=1e-3)
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], rtol=1e-5, atol=1e-5)


def test_attaching_changes_no_tensor_of_the_base() -> None:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = ModernBertForMaskedLM(
        ModernBertConfig(**sizes, pad_token_id=0, cls_token_id=1, sep_token_id=2)
    ).eval()
    before, keys = model(input_ids=ids()).logits, list(model.state_dict())
    grafts.add(model, "lora", name="en")
    assert torch.equal(model(input_ids=ids()).logits, before)
    assert [key for key in model.state_dict() if "grafts" not in key] == keys


def test_weight_decay_leaves_loreft_orthonormal_and_at_work() -> None:
    model = adapted("loreft[r=3]")
    before = LLAMA.output(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.5
    )
    for _ in range(20):
        LLAMA.output(model).square().mean().backward()
        optimizer.step()
    for _, part in parts_of(model, "en"):
        for unit in part.units.values() if hasattr(part, "units") else ():
            torch.testing.assert_close(
                unit.rotation() @ unit.rotation().T, torch.eye(3), rtol=1e-5, atol=1e-5
            )
    after = LLAMA.output(model)
    assert not torch.allclose(after, LLAMA.output(grafts.deactivate(model)), atol=1e-3)
    assert not torch.allclose(after, before)


def test_shared_matrices_of_a_bare_base_are_saved(tmp_path: Path) -> None:
    model = LLAMA.model().model
    grafts.add(model, "compacter[reduction_factor=4]", name="en")
    randomise(model, "en")
    expected = model(input_ids=ids()).last_hidden_state
    grafts.save(model, "en", tmp_path)
    again = LLAMA.model().model
    grafts.load(again, tmp_path)
    assert_rounded(again(input_ids=ids()).last_hidden_state, expected)


def test_ia3_merges_its_bias_and_unmerging_restores(tmp_path: Path) -> None:
    model = BERT.model()
    grafts.add(
        model, grafts.IA3Config(target_roles=("k", "v", "intermediate"), feedforward_modules=[]), name="en"
    )
    randomise(model, "en")
    expected, before = BERT.output(model), {name: p.clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(BERT.output(grafts.merge(model)), expected)
    grafts.unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_direft_comes_back_as_direft(tmp_path: Path) -> None:
    model = adapted("direft")
    expected = LLAMA.output(model)
    grafts.add(model, "noreft", name="other")
    assert grafts.adapters(model)["en"].config != grafts.adapters(model)["other"].config
    grafts.save(model, "en", tmp_path)
    again = LLAMA.model()
    report = grafts.load(again, tmp_path)
    assert report.plan.config.subtract_projection is False
    assert_rounded(LLAMA.output(again), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "config", ["double_seq_bn[reduction_factor=4]", "loreft[r=3]", "seq_bn_inv[reduction_factor=4]", "lora"]
)
def test_the_mean_of_one_adapter_twice_is_that_adapter(config: str) -> None:
    model = adapted(config)
    grafts.add(model, config, name="same")
    for (_, one), (_, other) in zip(parts_of(model, "en"), parts_of(model, "same"), strict=True):
        other.load_state_dict(one.state_dict())
    expected = LLAMA.output(grafts.activate(model, "en"))
    way = "cat" if config == "lora" else "linear"
    grafts.combine(model, ["en", "same"], [0.5, 0.5], "mean", method=way)
    torch.testing.assert_close(LLAMA.output(model), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_average_of_rotations_is_a_rotation() -> None:
    model = adapted("loreft[r=3]")
    grafts.add(model, "loreft[r=3]", name="other")
    randomise(model, "other", seed=8, scale=0.9)
    grafts.combine(model, ["en", "other"], [0.5, 0.5], "mean", method="linear")
    for _, part in parts_of(model, "mean"):
        if hasattr(part, "units"):
            rotation = part.units["prefix"].rotation()
            torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), rtol=1e-5, atol=1e-5)
    grafts.add(model, "loreft[r=2]", name="smaller")
    with pytest.raises(grafts.ConfigError, match="adapters with r=3 and 2 cannot be averaged"):
        grafts.combine(model, ["en", "smaller"], [0.5, 0.5], "no", method="linear")


def test_lora_and_ia3_stand_where_their_roles_say() -> None:
    model = LLAMA.model()
    roles = {"intermediate": "up_proj", "output": "down_proj", "gate": "gate_proj", "o": "o_proj"}
    for role, name in roles.items():
        targets = grafts.plan(model, grafts.LoraConfig(target_roles=(role,))).targets
        assert {target.path.rpartition(".")[2] for target in targets} == {name}


@torch.no_grad()
def test_a_generated_token_is_no_first_position() -> None:
    model = adapted("loreft[prefix_positions=2]")
    mask = torch.ones_like(ids())
    mask[0, :2] = 0
    whole = model(input_ids=ids(), attention_mask=mask).logits[:, -1]
    begun = model(input_ids=ids()[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    last = model(input_ids=ids()[:, -1:], attention_mask=mask, **going_on(cache_of(begun)))
    torch.testing.assert_close(last.logits[:, 0], whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_layer_uses_its_own_norm() -> None:
    from torch.nn import functional as F

    model = shaken_norms(BERT.model())
    grafts.add(model, "seq_bn[reduction_factor=4]", name="en")
    randomise(model, "en")
    parts = {path: part for path, part in parts_of(model, "en") if type(part).__name__ == "BottleneckPart"}
    seen: dict[str, Tensor] = {}
    for index, path in enumerate(parts):
        layer = model.get_submodule(f"bert.encoder.layer.{index}")
        layer.intermediate.register_forward_pre_hook(
            lambda m, args, i=index: seen.__setitem__(f"r{i}", args[0])
        )
        layer.output.register_forward_hook(lambda m, args, out, i=index: seen.__setitem__(f"out{i}", out))
        assert path == f"bert.encoder.layer.{index}.output.dense"
    BERT.output(model)
    for index, part in enumerate(parts.values()):
        layer = model.get_submodule(f"bert.encoder.layer.{index}")
        r, norm = seen[f"r{index}"], layer.output.LayerNorm
        h = F.linear(F.gelu(F.linear(r, layer.intermediate.dense.weight, layer.intermediate.dense.bias)),
                     layer.output.dense.weight, layer.output.dense.bias)  # fmt: skip
        down, up = part.adapter_down[0], part.adapter_up
        normed = F.layer_norm(h + r, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        u = F.linear(F.relu(F.linear(normed, down.weight, down.bias)), up.weight, up.bias)
        expected = F.layer_norm(u + h + r, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(seen[f"out{index}"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config", ["prompt_tuning[num_virtual_tokens=3]", "seq_bn", "loreft", "lora", "unipelt"]
)
def test_any_name_and_safetensors_for_every_method(config: str, tmp_path: Path) -> None:
    model = adapted(config, BERT)
    expected = BERT.output(model)
    grafts.save(model, "en", tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))
    again = BERT.model()
    grafts.load(again, tmp_path, name="another.name")
    assert_rounded(BERT.output(again), expected)


def test_an_adapter_whose_name_begins_another_and_names_with_dots(tmp_path: Path) -> None:
    model = BERT.model()
    for name in ("a", "a,b", "a.b"):
        grafts.add(model, "seq_bn[reduction_factor=4]", name=name)
        randomise(model, name)
        grafts.save(model, name, tmp_path / name)
    sizes = {
        name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("a", "a,b", "a.b")
    }
    assert len(set(sizes.values())) == 1


def test_a_prefix_is_added_trained_and_deleted_after_saving_the_base(tmp_path: Path) -> None:
    model = LLAMA.model()
    model.save_pretrained(tmp_path)
    grafts.add(model, "prefix_tuning_flat[prefix_length=3]", name="en")
    LLAMA.output(model).sum().backward()
    grafts.delete(model, "en")
    assert grafts.adapters(model) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    ["double_seq_bn", "adapter_plus", "compacter[reduction_factor=4]", "loreft", "invertible", "lora"],
)
def test_half_precision_bases_are_served(config: str, dtype: torch.dtype) -> None:
    model = LLAMA.model(dtype)
    grafts.add(model, config, name="en")
    output = LLAMA.output(model)
    assert output.dtype == dtype
    output.float().sum().backward()


@torch.no_grad()
def test_two_lora_adapters_add_up_also_beside_grouped_heads() -> None:
    model = LLAMA.model()
    for name in ("en", "de"):
        grafts.add(model, grafts.LoraConfig(target_roles=("k", "v")), name=name)
        randomise(model, name, seed=len(name) + ord(name[0]))
    layer = model.model.layers[0].self_attn.v_proj
    x = torch.randn(2, 3, 16)
    each = [grafts.activate(model, name) and layer(x) for name in ("en", "de")]
    bare = grafts.deactivate(model) and layer(x)
    grafts.activate(model, ["en", "de"])
    torch.testing.assert_close(layer(x), each[0] + each[1] - bare)


@torch.no_grad()
@pytest.mark.parametrize("config", ["loreft", "invertible", "prompt_tuning[num_virtual_tokens=2]"])
def test_every_active_adapter_acts_and_rows_choose(config: str) -> None:
    model = LLAMA.model()
    for seed, name in enumerate(("en", "de")):
        grafts.add(model, config, name=name)
        randomise(model, name, seed=seed)
    alone = {name: LLAMA.output(grafts.activate(model, name)) for name in ("en", "de")}
    both = LLAMA.output(grafts.activate(model, ["en", "de"]))
    assert all(not torch.allclose(both, one, atol=1e-4) for one in alone.values())
    rows = model(**LLAMA.inputs(), adapter_names=["de", "en"]).logits
    torch.testing.assert_close(rows[0], alone["de"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[1], alone["en"][1], rtol=1e-5, atol=1e-5)


def test_a_file_of_loreft_holds_no_hidden_by_hidden_matrix(tmp_path: Path) -> None:
    model = LLAMA.model()
    model = llama(hidden_size=256, intermediate_size=64)
    grafts.add(model, "loreft", name="en")
    grafts.save(model, "en", tmp_path)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * parameters + 2000
    theirs = (HUB / "qwen2-loreft" / "adapter" / "pytorch_adapter.bin").stat().st_size
    assert theirs > 2 * 4 * 16 * 16  # one such matrix for each unit of each layer


def test_vera_with_dense_matrices_is_refused_and_dora_stands_at_fused_projections(tmp_path: Path) -> None:
    source = HUB / "bert-lora" / "adapter"
    data = json.loads((source / "adapter_config.json").read_text())
    data["config"] |= {"vera_d": 0.1, "vera_b": 0.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(data))
    with pytest.raises(grafts.ConfigError, match="VeRA has dense matrices where the paper has vectors"):
        grafts.load(BERT.model(), tmp_path)
    base = BY_NAME["gpt2"]
    model = grafts.add(base.model(), "dora[target_roles=['q']]", name="en")
    randomise(model, "en")
    expected = base.output(model)
    torch.testing.assert_close(base.output(grafts.merge(model)), expected, rtol=1e-4, atol=1e-5)


def test_deleting_one_leaves_the_other_and_merged_ones_can_be_had_back() -> None:
    model = LLAMA.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name in ("a", "b"):
        grafts.add(model, "lora", name=name)
        randomise(model, name)
    grafts.activate(model, ["a", "b"])
    grafts.delete(model, "a")
    assert grafts.adapters(model)["b"].active
    grafts.merge(model, "b")
    grafts.unmerge(model)
    grafts.delete(model, "b")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_glow_is_inverted_before_the_head_also_a_tied_one() -> None:
    block = (
        grafts.plan(LLAMA.model(), "invertible[block='glow']")
        .targets[0]
        .build(LLAMA.model().model.embed_tokens)
        .block
    )
    for parameter in block.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.3)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block.inverse(block(x)), x, rtol=1e-4, atol=1e-4)
    for tied in (False, True):
        model = llama(tie_word_embeddings=tied)
        planned = {target.path: target.role for target in grafts.plan(model, "invertible").targets}
        assert planned == {"model.embed_tokens": "stream begins", "lm_head": "stream ends"}


def test_whole_numbers_missing_activations_and_seeds_are_taken_for_what_they_are() -> None:
    model = LLAMA.model()
    state = torch.random.get_rng_state()
    grafts.add(model, "seq_bn[scaling=2, non_linearity=None, init_weights_seed=0]", name="en")
    assert torch.equal(torch.random.get_rng_state(), state)
    again = LLAMA.model()
    torch.manual_seed(99)
    grafts.add(again, "seq_bn[scaling=2, non_linearity=None, init_weights_seed=0]", name="en")
    ours, theirs = (dict(parts_of(each, "en")) for each in (model, again))
    for path, part in ours.items():
        assert all(
            torch.equal(a, b) for a, b in zip(part.parameters(), theirs[path].parameters(), strict=True)
        )
    first, second = (p for _, p in parts_of(model, "en") if hasattr(p, "adapter_up"))
    assert not torch.equal(first.adapter_up.weight, second.adapter_up.weight)


def test_layers_are_left_out_of_unions_too() -> None:
    plan = grafts.plan(LLAMA.model(), "seq_bn[leave_out=[0]]|loreft[layers=[1]]")
    assert all("layers.0" not in target.path for target in plan.targets)


def test_adapters_of_cross_and_self_attention_stand_apart() -> None:
    model = BY_NAME["t5"].model()
    grafts.add(model, "double_seq_bn[cross_adapter=True]", name="en")
    steps = [part.sublayer.kind for _, part in parts_of(model, "en") if hasattr(part, "sublayer")]
    assert {kind: steps.count(kind) for kind in set(steps)} == {"self": 4, "cross": 2, "ffn": 4}


def test_adapted_models_are_pickled_and_copied() -> None:
    model = adapted("unipelt", BERT)
    expected = BERT.output(model)
    assert_rounded(BERT.output(pickle.loads(pickle.dumps(model))), expected)
    assert_rounded(BERT.output(copy.deepcopy(model)), expected)


def test_a_loreft_that_weight_decay_has_rounded_away_is_refused(tmp_path: Path) -> None:
    sys.path.append(str(ROOT / "scripts"))
    from adapterhub_reference import model

    folder = tmp_path / "adapter"
    folder.mkdir()
    source = HUB / "qwen2-loreft" / "adapter"
    tensors: Mapping[str, Tensor] = torch.load(source / "pytorch_adapter.bin", weights_only=True)
    decayed = {key: tensor * (0.99 if key.endswith("original") else 1.0) for key, tensor in tensors.items()}
    buffer = io.BytesIO()
    torch.save(decayed, buffer)
    (folder / "pytorch_adapter.bin").write_bytes(buffer.getvalue())
    (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((source / "adapter_config.json").read_text()))
    )
    with pytest.raises(grafts.CheckpointError, match="not orthonormal"):
        grafts.load(model("qwen2"), folder, allow_pickle=True)
