"""Bottlenecks, invertible adapters, ReFT and unions: what the files of AdapterHub's library do not show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grafts
from bases import BY_NAME, ids, llama
from caches import cache_of, going_on
from closeness import assert_rounded
from conftest import randomise
from grafts.lifecycle.registry import parts_of

LLAMA, BERT, SDPA = BY_NAME["llama"], BY_NAME["bert"], BY_NAME["sdpa"]


def parts_named(model: nn.Module, name: str) -> list[nn.Module]:
    return [part for _, part in parts_of(model, "en") if type(part).__name__ == name]


@torch.no_grad()
@pytest.mark.parametrize("base", [BERT, BY_NAME["gpt2"]], ids=["bert", "gpt2"])
@pytest.mark.parametrize("more", ["", ", scaling='channel'", ", phm_layer=True"])
def test_a_bottleneck_without_an_activation_has_an_exact_merge(base: object, more: str) -> None:
    model = base.model()  # type: ignore[attr-defined]
    before = {name: p.clone() for name, p in model.named_parameters()}
    grafts.add(model, f"double_seq_bn[reduction_factor=4, non_linearity='linear'{more}]", name="en")
    randomise(model, "en")
    expected = base.output(model)  # type: ignore[attr-defined]
    torch.testing.assert_close(base.output(grafts.merge(model)), expected, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
    grafts.unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@torch.no_grad()
def test_a_parallel_one_beside_a_single_linear_has_an_exact_merge() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.only(x)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Stack().eval(), torch.randn(2, 5, 16)
    grafts.add(model, "par_bn[reduction_factor=4, non_linearity=None]", name="en")
    randomise(model, "en")
    expected = model(x)
    torch.testing.assert_close(grafts.merge(model)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        "seq_bn",
        "par_bn[non_linearity=None]",
        "double_seq_bn[non_linearity='linear', ln_after=True]",
        "loreft",
        "invertible",
        "mam",
    ],
)
def test_what_has_no_exact_merge_is_refused_and_nothing_is_changed(config: str) -> None:
    model = LLAMA.model()
    grafts.add(model, config, name="en")
    expected = LLAMA.output(model)
    with pytest.raises(grafts.MergeError, match="no exact merge"):
        grafts.merge(model)
    assert torch.equal(LLAMA.output(model), expected)


def test_biases_that_have_nowhere_to_go_are_refused() -> None:
    model = LLAMA.model()  # its linears have no biases
    grafts.add(model, "double_seq_bn[non_linearity='linear']", name="en")
    grafts.merge(model)  # they are zero yet
    grafts.unmerge(model)
    randomise(model, "en")
    with pytest.raises(grafts.MergeError, match="no bias that the bottleneck's could be merged into"):
        grafts.merge(model)


def test_stochastic_depth_drops_whole_rows_and_only_in_training() -> None:
    model = LLAMA.model()
    grafts.add(model, "double_seq_bn[stochastic_depth=0.5, reduction_factor=4]", name="en")
    randomise(model, "en")
    [part, *_] = parts_named(model, "BottleneckPart")
    h = torch.randn(64, 5, 16)
    torch.testing.assert_close(part(h, h), part(h, h))
    part.train()
    moved = (part(h, h) - h).flatten(1).abs().sum(1)
    part.eval()
    whole = (part(h, h) - h).flatten(1).abs().sum(1)
    dropped = moved == 0
    assert 10 < int(dropped.sum()) < 54
    torch.testing.assert_close(moved[~dropped], 2 * whole[~dropped])


@torch.no_grad()
@pytest.mark.parametrize("block", ["nice", "glow"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_head_gets_back_what_the_embeddings_were(block: str, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied).eval()
    grafts.add(model, grafts.InvertibleConfig(block=block), name="en")
    randomise(model, "en", scale=0.2)
    seen: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    begin, end = parts_named(model, "CouplingPart")
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(end(begin(ids(), x)), x, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in end.parameters()) == 0
    assert not torch.allclose(begin(ids(), x), x, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_reft_counts_real_tokens_as_a_slow_loop_does(side: str) -> None:
    model = LLAMA.model()
    grafts.add(model, "loreft[r=2, prefix_positions=2, suffix_positions=1, layers=[1]]", name="en")
    randomise(model, "en")
    mask = torch.ones_like(ids())
    if side != "none":
        mask[0, :3] = 0 if side == "left" else 1
        mask[0, 4:] = 0 if side == "right" else 1
    [part] = parts_named(model, "ReftPart")
    states: list[Tensor] = []
    model.model.layers[1].register_forward_hook(
        lambda m, args, out: states.append(out if isinstance(out, Tensor) else out[0])
    )
    model(input_ids=ids(), attention_mask=mask)
    model(input_ids=ids(), attention_mask=mask) if not states else None
    grafts.deactivate(model)
    model(input_ids=ids(), attention_mask=mask)
    changed, bare = states[0], states[1]
    expected = bare.clone()
    for row in range(2):
        real = [position for position in range(7) if mask[row, position]]
        for position in real[:2]:
            expected[row, position] = part.units["prefix"](bare[row, position])
        expected[row, real[-1]] = part.units["suffix"](bare[row, real[-1]])
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_reft_passes_over_virtual_tokens_of_another_adapter() -> None:
    model = LLAMA.model()
    for name, config in (
        ("prompt", "prompt_tuning[num_virtual_tokens=3]"),
        ("en", "loreft[prefix_positions=1]"),
    ):
        grafts.add(model, config, name=name)
        randomise(model, name)
    [first, *_] = parts_named(model, "ReftPart")
    observed: list[Tensor] = []
    first.register_forward_pre_hook(lambda m, args: observed.append(first._counter.module.number))
    grafts.activate(model, ["prompt", "en"])
    model(input_ids=ids())
    assert observed[0].tolist() == [[-1, -1, -1, 0, 1, 2, 3, 4, 5, 6]] * 2


@torch.no_grad()
@pytest.mark.parametrize("config", ["seq_bn[use_gating=True]", "lora[use_gating=True]", "unipelt"])
def test_a_gate_refuses_a_cache_that_holds_tokens(config: str) -> None:
    model = LLAMA.model()
    grafts.add(model, config, name="en")
    randomise(model, "en")
    begun = model(input_ids=ids(), use_cache=True)
    with pytest.raises(grafts.StateError, match="use_cache=False"):
        model(input_ids=ids()[:, :1], **going_on(cache_of(begun)))


@torch.no_grad()
def test_gated_lora_is_the_formula() -> None:
    model = SDPA.model()
    grafts.add(model, "lora[r=2, use_gating=True, target_modules=['blocks.0.wq']]", name="en")
    randomise(model, "en")
    [part] = parts_named(model, "GatedLoraPart")
    x, host = torch.randn(3, 5, 16), model.blocks[0].wq
    gate = torch.sigmoid(x @ part.gate.weight.T + part.gate.bias).mean(1, keepdim=True)
    expected = x @ host.weight.T + host.bias + gate * (x @ part.lora_A.T @ part.lora_B.T)
    torch.testing.assert_close(host(x), expected)


def test_a_bottleneck_by_the_names_of_modules_stands_there_alone() -> None:
    model = LLAMA.model()
    plan = grafts.plan(model, "seq_bn|lora")
    assert len(plan.members) == 2
    some = grafts.plan(
        model, grafts.BnConfig(mh_adapter=True, target_modules=["o_proj"], original_ln_before=True)
    )
    with_tensors = {target.path.rpartition(".")[2] for target in some.targets if target.parameters}
    assert with_tensors == {"o_proj"}
    left = grafts.plan(model, grafts.BnConfig(mh_adapter=True, exclude_modules=["o_proj"]))
    assert {target.path.rpartition(".")[2] for target in left.targets if target.parameters} == {"down_proj"}


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq_bm", "no method is called 'seq_bm'; did you mean 'seq_bn'"),
        ("seq_bn[reduction=4]", "BnConfig has no field 'reduction'; did you mean 'reduction_factor'"),
        ("seq_bn[reduction_factor=]", "cannot be read"),
        ("seq_bn[16]", "options are written name=value"),
        ("seq_bn[reduction_factor=__import__('os').getcwd()]", "cannot be read"),
        ("seq_bn[reduction_factor=0]", "it must be a number above 0"),
        ("seq_bn[non_linearity='reloo']", "it must be an activation"),
        ("seq_bn|", "no config"),
        ("mam[prefix_length=3]", "'mam' is a union and takes no options"),
        ("seq_bn[reduction_factor={'5': 4}]", "reduction_factor names layer '5'"),
        ("seq_bn[reduction_factor={'1': 4}]", "reduction_factor has neither '0' nor 'default'"),
        ("compacter[reduction_factor=16]", "phm_dim=4 has to divide"),
        ("loreft[prefix_positions=0]", "else nothing is changed"),
        ("loreft[layers=[0, 7]]", "layers names layer 7; there are 2"),
        ("seq_bn[target_roles=['o']]", "target_roles has no meaning for Bottleneck adapter"),
        ("loreft[r=99]", "r=99 orthonormal rows cannot be had in 16 dimensions"),
        ("seq_bn[leave_out=[2]]", "leave_out names layer 2"),
        ("seq_bn[reduction_factor={'default': 4, 'first': 2}]", "reduction_factor names layer 'first'"),
        ("lora[use_gating=True, use_dora=True]", "use_gating is True; it must be False beside use_dora"),
    ],
)
def test_texts_and_options_that_cannot_be_say_why(text: str, message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.add(LLAMA.model(), text)


def test_every_preset_is_a_config_and_fits_a_transformer() -> None:
    from grafts.methods._presets import PRESETS

    model = llama(hidden_size=64, num_attention_heads=4)
    for name in PRESETS:
        small = "[reduction_factor=4]" if "compacter" in name else ""
        assert grafts.plan(model, name + small).parameters > 0


def test_configs_of_a_union_are_kept_and_a_union_of_unions_is_refused() -> None:
    union = grafts.config_from("seq_bn|loreft")
    assert grafts.UnionConfig.from_dict(union.to_dict()) == union
    with pytest.raises(grafts.ConfigError, match="no unions"):
        grafts.UnionConfig(configs=[union])
    with pytest.raises(grafts.ConfigError, match="given to the configs of the union"):
        grafts.UnionConfig(configs=[grafts.LoraConfig()], target_modules=["q_proj"])
