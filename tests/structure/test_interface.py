"""Interfaces: written by hand, worked out, resolved, saved; and that a wrong one is told apart before
anything is touched.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grafts
from grafts.lifecycle.registry import parts_of
from grafts.structure.view import look_at
from helpers.adapters import randomise
from helpers.bases import BY_NAME, ids, llama
from helpers.caches import cache_of, going_on
from helpers.closeness import assert_rounded

LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]
BY_HAND = grafts.AdapterModelInterface(
    ["bottleneck", "prefix_tuning", "lora", "prompt_tuning", "reft", "invertible"],
    "embed_tokens",
    "layers",
    "self_attn",
    None,
    "k_proj",
    "q_proj",
    "v_proj",
    "o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    None,
    "post_attention_layernorm",
    layer_gate_proj="mlp.gate_proj",
)


def test_names_and_their_order_are_those_that_people_know() -> None:
    names = "adapter_methods model_embeddings model_layers layer_self_attn layer_cross_attn attn_k_proj "
    names += "attn_q_proj attn_v_proj attn_o_proj layer_intermediate_proj layer_output_proj "
    names += "layer_pre_self_attn layer_pre_cross_attn layer_pre_ffn layer_ln_1 layer_ln_2"
    parameters = inspect.signature(grafts.AdapterModelInterface).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == names.split()
    assert {"attn_qkv_proj", "base_model", "layer_gate_proj"} <= parameters.keys() - set(positional)


def test_inferred_is_what_a_person_would_write() -> None:
    found = grafts.infer_interface(LLAMA.model())
    assert found == BY_HAND
    assert {finding.sure for finding in found.report} == {"seen", "name", "not there"}
    by_name = {finding.accessor: finding for finding in found.report}
    assert by_name["layer_output_proj"].sure == "seen"
    assert "2 of 2 layers" in by_name["layer_output_proj"].why


@pytest.mark.parametrize(
    "base", [BY_NAME[name] for name in ("sdpa", "llama", "gpt2", "bert", "t5", "vit")], ids=lambda b: b.name
)
def test_printed_interface_is_python_that_gives_it_again(base: object) -> None:
    found = grafts.infer_interface(base.model())  # type: ignore[attr-defined]
    assert eval(str(found), {"AdapterModelInterface": grafts.AdapterModelInterface}) == found
    assert grafts.AdapterModelInterface.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gpt2",
            {"attn_qkv_proj": "c_attn", "layer_pre_ffn": "ln_2", "layer_ln_1": None, "model_layers": "h"},
        ),
        (
            "bert",
            {
                "layer_ln_1": "attention.output.LayerNorm",
                "layer_pre_ffn": "intermediate",
                "attn_o_proj": "output.dense",
            },
        ),
        (
            "t5",
            {
                "model_layers": ("encoder.block", "decoder.block"),
                "layer_cross_attn": ("layer.1.EncDecAttention", None),
            },
        ),
        (
            "vit",
            {"layer_pre_self_attn": "layernorm_before", "model_embeddings": "embeddings", "layer_ln_1": None},
        ),
        (
            "sdpa",
            {
                "model_embeddings": "embed",
                "layer_self_attn": "",
                "attn_o_proj": "wo",
                "layer_pre_ffn": "norm2",
            },
        ),
    ],
)
def test_inferred_accessors_of_models_of_other_builds(name: str, expected: dict[str, object]) -> None:
    found = grafts.infer_interface(BY_NAME[name].model())
    assert {accessor: getattr(found, accessor) for accessor in expected} == expected


class Strange(nn.Module):
    """A layer whose names say nothing: queries and values are told by what they are multiplied with; norms
    after adding.
    """

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(dim, dim) for _ in range(4))
        self.e, self.f = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.n, self.m = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        c, a, b = (w(x).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.c, self.a, self.b))
        x = self.n(x + self.d(F.scaled_dot_product_attention(c, a, b).transpose(1, 2).flatten(-2)))
        return self.m(self.f(F.gelu(self.e(x))) + x)


class StrangeModel(nn.Module):
    """Layers in a Sequential, no config."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.steps = nn.Sequential(Strange(), Strange())
        self.out = nn.Linear(16, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.steps(self.words(x)))


def test_a_module_whose_names_say_nothing_is_read_from_what_it_does() -> None:
    found = grafts.infer_interface(StrangeModel())
    assert (found.attn_q_proj, found.attn_k_proj, found.attn_v_proj, found.attn_o_proj) == (
        "c",
        "a",
        "b",
        "d",
    )
    assert (found.layer_intermediate_proj, found.layer_output_proj) == ("e", "f")
    assert (found.layer_ln_1, found.layer_ln_2) == ("n", "m")
    assert (found.model_embeddings, found.model_layers) == ("words", "steps")
    assert "what the kernel's operands come from" in {f.accessor: f.why for f in found.report}["attn_q_proj"]


@pytest.mark.parametrize(
    "config",
    [
        "seq_bn",
        "adapter_plus",
        "loreft",
        "invertible",
        "lora[target_roles=['q', 'v']]",
        "prefix_tuning_flat[prefix_length=2]",
    ],
)
def test_a_module_without_a_config_takes_every_kind_of_adapter(config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = StrangeModel().eval()
    bare = model(ids())
    grafts.add(model, config, name="en")
    randomise(model, "en")
    expected = model(ids())
    assert not torch.allclose(expected, bare, atol=1e-3)
    grafts.save(model, "en", tmp_path)
    torch.manual_seed(0)
    again = StrangeModel().eval()
    grafts.load(again, tmp_path)
    assert_rounded(again(ids()), expected)
    assert torch.equal(grafts.detach(model)(ids()), bare)


def test_inferring_leaves_the_model_as_it_was() -> None:
    model = LLAMA.model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    values = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.random.get_rng_state()
    grafts.infer_interface(model)
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(p, values[name]) for name, p in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_second_adapter_is_placed_while_another_acts() -> None:
    model = LLAMA.model()
    grafts.add(model, "prompt_tuning[num_virtual_tokens=3]", name="first")
    grafts.add(model, "double_seq_bn", name="second", activate=False)
    assert grafts.adapters(model)["first"].active
    assert grafts.adapters(model)["second"].modules == 4


def test_experts_beside_dense_layers_and_layers_without_attention_are_told_apart() -> None:
    from transformers import JambaConfig, JambaForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    more = {
        "num_key_value_heads": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
    }
    more |= {
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    }
    model = JambaForCausalLM(JambaConfig(**sizes, **more, pad_token_id=0)).eval()
    found = grafts.infer_interface(model)
    stream = found.resolve(look_at(model))
    outs = [[step.out.removeprefix(f"{layer.path}.") for step in layer.sublayers] for layer in stream.layers]
    assert outs[0] == ["mamba.out_proj", "feed_forward.down_proj"]
    assert outs[1][0] == "self_attn.o_proj"
    assert outs[1][1] in ("feed_forward", "feed_forward.experts")
    grafts.add(model, "par_bn", name="en")
    assert grafts.adapters(model)["en"].modules >= 4


def test_what_several_towers_have_is_numbered_through() -> None:
    model = BY_NAME["t5"].model()
    stream = grafts.infer_interface(model).resolve(look_at(model))
    assert [layer.number for layer in stream.layers] == list(range(len(stream.layers)))
    assert [len(layer.sublayers) for layer in stream.layers] == [2, 2, 3, 3]
    plan = grafts.plan(model, "seq_bn[leave_out=[0, 3]]")
    adapted = {
        t.path.partition(".block.")[0] + t.path.partition(".block.")[2][:1]
        for t in plan.targets
        if t.parameters
    }
    assert adapted == {"encoder1", "decoder0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_output_proj": "mlp.dwn_proj"},
            r"layer_output_proj='mlp.dwn_proj' leads nowhere in layer 0 \('model.layers.0', a",
        ),
        ({"layer_output_proj": "mlp.dwn_proj"}, r"nearest: \['down_proj'"),
        (
            {"attn_q_proj": "query"},
            "model.layers.0.self_attn is a LlamaAttention and it has no 'query'; it holds 'q_proj'",
        ),
        ({"layer_pre_ffn": "self_attn.head_dim"}, "'head_dim' there is a int"),
        ({"model_layers": "layer"}, "model_layers='layer' leads nowhere in the base model"),
        ({"model_layers": "norm"}, "is a LlamaRMSNorm and holds no layers"),
        ({"base_model": "decoder"}, "base_model='decoder': LlamaForCausalLM has no such module"),
        ({"layer_ln_1": ("post_norm", None)}, "leads nowhere in any layer"),
    ],
)
def test_an_accessor_that_leads_nowhere_is_named_with_what_stands_there(
    changes: dict[str, object], message: str
) -> None:
    model = LLAMA.model()
    keys = list(model.state_dict())
    wrong = grafts.AdapterModelInterface.from_dict(BY_HAND.to_dict() | changes)
    with pytest.raises(grafts.InterfaceError, match=message):
        grafts.add(model, "seq_bn", interface=wrong)
    assert list(model.state_dict()) == keys


def test_every_layer_is_looked_at_and_none_says_that_some_may_lack_it() -> None:
    model = LLAMA.model()
    model.model.layers[1].mlp.wide = model.model.layers[1].mlp.up_proj
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(
        grafts.InterfaceError, match=r"layer 1 .*if some layers have none, write \('mlp.up_proj', None\)"
    ):
        grafts.plan(model, "seq_bn", interface=BY_HAND)
    either = grafts.AdapterModelInterface.from_dict(
        BY_HAND.to_dict() | {"layer_intermediate_proj": ["mlp.up_proj", "mlp.wide"]}
    )
    numbered = {"layer_intermediate_proj": {"default": "mlp.up_proj", 1: "mlp.wide"}}
    by_number = grafts.AdapterModelInterface.from_dict(BY_HAND.to_dict() | numbered)
    for interface in (either, by_number):
        plan = grafts.plan(model, grafts.LoraConfig(target_roles=("intermediate",)), interface=interface)
        assert [target.path.rpartition(".")[2] for target in plan.targets] == ["up_proj", "wide"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_methods": ["bottle"]}, "adapter_methods names 'bottle'; did you mean 'bottleneck'"),
        ({"attn_q_proj": None}, "of the projections only"),
        ({"attn_qkv_proj": "qkv"}, "attn_qkv_proj is given beside attn_q_proj"),
        ({"layer_ln_1": 3}, "layer_ln_1 is 3; it must be a dotted path"),
        ({"layer_ln_1": {"first": "norm"}}, "a mapping is layer number, or 'default'"),
        ({"layer_ln_3": "norm"}, "an interface has no 'layer_ln_3'; did you mean"),
        ({"model_layers": None}, "model_layers names no list"),
    ],
)
def test_an_interface_that_cannot_be_is_refused_at_once(values: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.InterfaceError, match=message):
        grafts.AdapterModelInterface.from_dict(BY_HAND.to_dict() | values)


def test_a_fused_projection_gets_its_true_split_also_with_grouped_queries() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
    }
    model = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    found = grafts.infer_interface(model)
    assert (found.attn_qkv_proj, found.attn_q_proj) == ("qkv_proj", None)
    prefix = grafts.plan(model, "prefix_tuning_flat[prefix_length=3]", interface=found)
    assert {tuple(t.tensors["prefix"]) for t in prefix.targets if t.tensors} == {
        (3, 2 * 2 * 4)
    }  # two heads of four


def test_latent_attention_gets_keys_and_values_of_their_own_sizes() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
    }
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
    }
    more = {
        "qk_nope_head_dim": 8,
        "v_head_dim": 4,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
    }
    config = DeepseekV3Config(**sizes, **heads, **more, topk_group=1, first_k_dense_replace=2, pad_token_id=0)
    model = DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
    grafts.add(model, "prefix_tuning_flat[prefix_length=3]", name="en")
    planned = [
        target
        for target in grafts.plan(model, "prefix_tuning_flat[prefix_length=3]").targets
        if target.tensors
    ]
    assert {tuple(target.tensors["prefix"]) for target in planned} == {(3, 4 * (16 + 4))}
    randomise(model, "en")
    full = model(input_ids=ids()).logits
    begun = model(input_ids=ids()[:, :4], use_cache=True)
    rest = model(input_ids=ids()[:, 4:], **going_on(cache_of(begun)))
    torch.testing.assert_close(rest.logits, full[:, 4:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_prefix_inside_attention_of_three_dimensions_is_that_of_a_cache() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)).eval()
    grafts.add(model, "prefix_tuning_flat[prefix_length=3]", name="en")
    ours = model(input_ids=ids()).logits
    begun = model(input_ids=ids()[:, :4], use_cache=True)
    rest = model(input_ids=ids()[:, 4:], **going_on(cache_of(begun))).logits
    torch.testing.assert_close(rest, ours[:, 4:], rtol=1e-4, atol=1e-5)
    # a slow formula for the first layer: softmax over prefix and tokens, ALiBi over the tokens alone
    part = next(part for _, part in parts_of(model, "en") if hasattr(part, "as_heads"))
    layer, keys = model.transformer.h[0], part.as_heads(2)
    seen: list[Tensor] = []
    layer.self_attention.dense.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(input_ids=ids()[:1])
    x = layer.input_layernorm(
        model.transformer.word_embeddings_layernorm(model.transformer.word_embeddings(ids()[:1]))
    )
    q, k, v = layer.self_attention.query_key_value(x).view(1, 7, 2, 3, 8).permute(3, 0, 2, 1, 4)
    slopes = torch.tensor([2.0**-4, 2.0**-8]).view(1, 2, 1, 1)
    scores = q @ k.transpose(-1, -2) / 8**0.5 + slopes * torch.arange(7)
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    weights = torch.cat([q @ keys[0].transpose(-1, -2) / 8**0.5, scores], -1).softmax(-1)
    expected = (weights @ torch.cat([keys[1], v], 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_it_is_saved_beside_the_adapter_and_read_again(tmp_path: Path) -> None:
    model = LLAMA.model()
    grafts.add(model, "double_seq_bn", interface=BY_HAND, name="en")
    randomise(model, "en")
    grafts.save(model, "en", tmp_path)
    data = json.loads((tmp_path / "adapter_interface.json").read_text())
    assert grafts.AdapterModelInterface.from_dict(data["interface"]) == BY_HAND
    again = LLAMA.model()
    report = grafts.load(again, tmp_path)
    assert report.plan.interface == BY_HAND
    assert_rounded(LLAMA.output(again), LLAMA.output(model))
    (tmp_path / "adapter_interface.json").write_text("{}")
    with pytest.raises(grafts.CheckpointError, match="holds no interface"):
        grafts.load(again, tmp_path, name="other")


def test_interface_of_adapterhub_is_read_and_one_of_ours_has_its_fields(tmp_path: Path) -> None:
    fields = "adapter_methods attn_k_proj attn_o_proj attn_q_proj attn_qkv_proj attn_v_proj base_model "
    fields += "layer_cross_attn "
    fields += (
        "layer_intermediate_proj layer_ln_1 layer_ln_2 layer_output_proj layer_pre_cross_attn layer_pre_ffn "
    )
    fields += "layer_pre_self_attn layer_self_attn model_embeddings model_layers"
    model = LLAMA.model()
    grafts.add(model, "seq_bn", interface=BY_HAND, name="en")
    grafts.save(model, "en", tmp_path, layout="adapterhub")
    data = json.loads((tmp_path / "adapter_interface.json").read_text())
    assert sorted(data["interface"]) == fields.split()
    assert data["model_type"] == "llama"
    grafts.load(LLAMA.model(), tmp_path, allow_pickle=True)


def test_an_adapter_goes_to_a_model_of_another_build_than_its_interface_says(tmp_path: Path) -> None:
    model = LLAMA.model()
    grafts.add(model, "seq_bn", name="en")
    grafts.save(model, "en", tmp_path)
    data = json.loads((tmp_path / "adapter_interface.json").read_text())
    data["interface"]["layer_output_proj"] = "feed_forward.last"
    (tmp_path / "adapter_interface.json").write_text(json.dumps(data))
    grafts.load(LLAMA.model(), tmp_path)


def test_a_model_that_cannot_be_run_or_has_no_layers_says_so() -> None:
    class Needy(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return one @ other

    with pytest.raises(grafts.InterfaceError, match="could not be run on a tiny input"):
        grafts.infer_interface(Needy())
    with pytest.raises(grafts.InterfaceError, match="no list of layers"):
        grafts.infer_interface(Needy(), inputs={"one": torch.ones(2, 2), "other": torch.ones(2, 2)})
    with pytest.raises(grafts.InterfaceError, match="adapter 'en': no list of layers"):
        grafts.add(BY_NAME["mlp"].model(), "seq_bn", name="en")


def test_a_config_that_needs_the_stream_says_which_accessor_is_missing() -> None:
    without = grafts.AdapterModelInterface.from_dict(BY_HAND.to_dict() | {"layer_pre_ffn": None})
    model = LLAMA.model()
    for config in ("seq_bn", "par_bn", "adapter_plus"):
        with pytest.raises(grafts.ConfigError, match="give layer_pre_ffn"):
            grafts.add(model, config, interface=without)
    grafts.add(model, "double_seq_bn", interface=without)


def test_a_method_that_the_interface_does_not_offer_is_refused() -> None:
    some = grafts.AdapterModelInterface.from_dict(BY_HAND.to_dict() | {"adapter_methods": ["lora"]})
    grafts.add(LLAMA.model(), "lora", interface=some)
    with pytest.raises(
        grafts.InterfaceError, match=r"does not offer 'bottleneck': its adapter_methods are \['lora'\]"
    ):
        grafts.add(LLAMA.model(), "seq_bn|lora", interface=some)
    with pytest.raises(grafts.InterfaceError, match="interface is a dict"):
        grafts.add(LLAMA.model(), "seq_bn", interface=BY_HAND.to_dict())  # type: ignore[arg-type]


def test_states_of_another_size_than_the_stream_are_refused_when_they_come() -> None:
    wrong = grafts.AdapterModelInterface.from_dict(
        BY_HAND.to_dict() | {"model_layers": "layers", "layer_output_proj": "mlp"}
    )
    model = LLAMA.model()
    model.model.layers[0].mlp.down_proj = nn.Linear(24, 20)
    grafts.add(model, "double_seq_bn[exclude_modules=['o_proj']]", interface=wrong)
    with pytest.raises(
        grafts.StateError, match=r"'model.layers.0.mlp' gives states of size 20, .* was made for 16"
    ):
        model(input_ids=ids())


def test_methods_of_a_config() -> None:
    methods = {
        "seq_bn": ["bottleneck"],
        "seq_bn_inv": ["bottleneck", "invertible"],
        "mam": ["prefix_tuning", "bottleneck"],
        "unipelt|loreft": ["prefix_tuning", "bottleneck", "lora", "reft"],
        "prompt_tuning": ["prompt_tuning"],
        "ia3": ["ia3"],
        "adalora[total_step=9]": ["adalora"],
    }
    for config, expected in methods.items():
        assert grafts.AdapterMethod.get_from_config(config) == expected
    assert grafts.AdapterMethod.get_from_config(grafts.InvertibleConfig()) == [
        grafts.AdapterMethod.invertible
    ]


def test_roles_name_any_projection() -> None:
    model = llama()
    expected = {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "o_proj",
        "intermediate": "up_proj",
        "gate": "gate_proj",
    }
    expected |= {"output": "down_proj", "embedding": "embed_tokens", "head": "lm_head"}
    for role, name in expected.items():
        targets = grafts.plan(model, grafts.LoraConfig(target_roles=(role,))).targets
        assert {target.path.rpartition(".")[2] for target in targets} == {name}
    with pytest.raises(grafts.ConfigError, match="target_roles names 'quer'"):
        grafts.plan(model, grafts.LoraConfig(target_roles=("quer",)))
    with pytest.raises(grafts.ConfigError, match="left out beside target_modules"):
        grafts.LoraConfig(target_roles=("q",), target_modules=["q_proj"])
