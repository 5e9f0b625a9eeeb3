"""Which modules a config selects, and what is said where it selects none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.structure.view import look_at
from helpers import bases
from helpers.bases import BY_NAME

LLAMA = BY_NAME["llama"]


def targets(model: nn.Module, **options: object) -> list[str]:
    return [target.path for target in grafts.plan(model, grafts.LoraConfig(**options)).targets]


def small(config_class: str, model_class: str, **sizes: object) -> nn.Module:
    import transformers

    usual = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = getattr(transformers, config_class)(**(usual | sizes))
    with torch.device("meta"):
        return getattr(transformers, model_class)(config)


@pytest.mark.parametrize(
    ("config_class", "model_class", "sizes", "expected"),
    [
        ("LlamaConfig", "LlamaForCausalLM", {}, {"q_proj", "v_proj"}),
        ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 1}, {"q_proj", "v_proj"}),
        ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 24, "word_embed_proj_dim": 16}, {"q_proj", "v_proj"}),
        ("BertConfig", "BertForMaskedLM", {}, {"query", "value"}),
        ("DistilBertConfig", "DistilBertModel", {"dim": 16, "n_heads": 2, "n_layers": 1}, {"q_lin", "v_lin"}),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}, {"query_key_value"}),
        ("BloomConfig", "BloomForCausalLM", {"n_head": 2, "n_layer": 1}, {"query_key_value"}),
        ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0}, {"qkv_proj"}),
        ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_head": 2, "n_layer": 1}, {"c_attn"}),
        (
            "GPTJConfig",
            "GPTJForCausalLM",
            {"n_embd": 16, "n_head": 2, "n_layer": 1, "rotary_dim": 4},
            {"q_proj", "v_proj"},
        ),
        ("MptConfig", "MptForCausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 1}, {"Wqkv"}),
        ("ViTConfig", "ViTModel", {}, None),
        (
            "WhisperConfig",
            "WhisperModel",
            {"hidden_size": 24, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0},
            {"q_proj", "v_proj"},
        ),
        ("DebertaV2Config", "DebertaV2Model", {}, {"query_proj", "value_proj"}),
        ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 2}, {"q_proj", "v_proj"}),
        ("T5Config", "T5Model", {"d_model": 16, "num_heads": 2, "num_layers": 1, "d_kv": 8}, {"q", "v"}),
        ("CLIPTextConfig", "CLIPTextModel", {}, {"q_proj", "v_proj"}),
    ],
)
def test_default_targets_are_query_and_value_of_each_attention(
    config_class: str, model_class: str, sizes: dict[str, object], expected: set[str] | None
) -> None:
    found = {path.rpartition(".")[2] for path in targets(small(config_class, model_class, **sizes))}
    # the vision model's names differ between the releases of `transformers`
    assert found == expected or (expected is None and found in ({"query", "value"}, {"q_proj", "v_proj"}))


def test_default_targets_of_a_custom_model_are_found() -> None:
    assert targets(BY_NAME["sdpa"].model()) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("wq", "wv")]


def test_model_without_attention_lists_the_candidates() -> None:
    with pytest.raises(
        grafts.UnmatchedTargetError,
        match=r"name them in target_modules; candidates: 'body.\*' \(2\), 'out' \(1\)",
    ):
        targets(BY_NAME["mlp"].model())


def test_all_linear_leaves_out_the_output_head() -> None:
    for name, head in (
        ("llama", "lm_head"),
        ("sdpa", "lm_head"),
        ("bert", "classifier"),
        ("gpt2", "lm_head"),
    ):
        model = BY_NAME[name].model()
        found = targets(model, target_modules="all-linear")
        assert head not in found
        assert dict(model.named_modules()).keys() >= {head}
        assert found


def test_all_linear_leaves_out_routers_and_takes_experts() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 2, bias=False)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    model = nn.ModuleDict({"layers": nn.ModuleList([Mixture()]), "gate": nn.Linear(8, 8)})
    assert targets(model, target_modules="all-linear") == ["layers.0.experts.0", "layers.0.experts.1", "gate"]
    assert look_at(model).roles["layers.0.gate"] == "router"


def test_single_linear_as_the_whole_model() -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    before = model(x)
    assert targets(model, target_modules="all-linear") == [""]
    grafts.add(model, grafts.LoraConfig(target_modules="all-linear"))
    assert torch.equal(model(x), before)
    assert list(grafts.detach(model).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"no module matches target_modules='q_prj' in LlamaForCausalLM\n  nearest names: 'q_proj'",
        ),
        ({"target_modules": ["q_proj", "z"]}, "target_modules='z'"),
        ({"target_modules": r".*\.q_prj"}, "nearest names: 'q_proj'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, "exclude_modules='k_prj'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, "nearest names: 'lm_head'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "selects no module"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 7},
            r"layers_to_transform=\[7\]; targets lie in layers \[0, 1\]",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
            "targets lie in layers",
        ),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "outside modules_to_save"),
    ],
)
def test_pattern_without_a_match_is_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.UnmatchedTargetError, match=message):
        targets(LLAMA.model(), **options)


def test_module_of_another_kind_is_an_error_that_names_the_kinds() -> None:
    with pytest.raises(
        grafts.UnsupportedTargetError,
        match=r"'model\.norm' is a LlamaRMSNorm, which LoRA cannot stand beside",
    ):
        targets(LLAMA.model(), target_modules=["model.norm"])


def test_targets_inside_a_copied_head_are_trained_as_a_whole() -> None:
    made = grafts.plan(
        bases.roberta(), grafts.LoraConfig(target_modules=["dense", "query"], task_type="SEQ_CLS")
    )
    assert {target.kind for target in made.targets if target.path.startswith("classifier")} == {"copy"}


def test_plan_is_pure_and_counts_what_add_makes() -> None:
    model = LLAMA.model()
    before = list(model.state_dict())
    config = grafts.LoraConfig(r=3, target_modules="all-linear", modules_to_save=["lm_head"], bias="all")
    made = grafts.plan(model, config)
    assert list(model.state_dict()) == before
    assert all(p.device.type == "cpu" for p in model.parameters())
    grafts.add(model, config)
    assert made.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_plan_of_an_adapted_model_is_that_of_its_base() -> None:
    model = LLAMA.model()
    config = grafts.LoraConfig(target_modules="all-linear")
    before = str(grafts.plan(model, config))
    assert str(grafts.plan(grafts.add(model, config), config)) == before


def test_plan_prints_as_a_table_with_totals() -> None:
    text = str(grafts.plan(LLAMA.model(), grafts.LoraConfig(r=8, target_modules="all-linear")))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "role", "shape", "part", "count", "parameters"]
    assert lines[2].split() == [
        "model.layers.*.self_attn.q_proj",
        "query",
        "16",
        "->",
        "16",
        "lora",
        "2",
        "512",
    ]
    assert (
        lines[-1] == "LoRA: 3,712 trainable parameters in 14 modules, 60.67% of LlamaForCausalLM's 6,118"
        or "LoRA: " in lines[-1]
    )


def test_head_is_copied_beside_the_modules_that_are_named() -> None:
    """Naming another module must not leave a fresh classifier frozen at random."""
    config = grafts.LoraConfig(task_type="SEQ_CLS", modules_to_save=["pooler"])
    made = grafts.plan(BY_NAME["bert"].model(), config)
    assert [target.path for target in made.targets if target.kind == "copy"] == ["bert.pooler", "classifier"]


def test_projection_that_its_owner_never_calls_is_no_target() -> None:
    """`nn.MultiheadAttention` reads the weight of its ``out_proj``; an adapter beside it would silently do
    nothing.
    """
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    assert targets(model, target_modules="all-linear") == ["0"]
    with pytest.raises(
        grafts.UnsupportedTargetError, match=r"'1\.out_proj' is a NonDynamicallyQuantizableLinear"
    ):
        targets(model, target_modules=["out_proj"])


def test_layer_of_an_unknown_kind_is_refused_with_the_kinds_that_are_taken() -> None:
    message = r"is a ConvTranspose1d, .* takes attention, convolution, embedding"
    with pytest.raises(grafts.UnsupportedTargetError, match=message):
        targets(nn.Sequential(nn.ConvTranspose1d(4, 4, 1)), target_modules=["0"])


class Reads(nn.Module):
    """Uses the weight of one of its linears, and calls the other two."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight.T + self.both(x) + self.both.bias


def test_a_linear_whose_weight_its_owner_only_reads_is_no_target() -> None:
    targets = grafts.plan(nn.Sequential(Reads()), grafts.LoraConfig(target_modules="all-linear")).targets
    assert {target.path for target in targets} == {"0.called", "0.both"}
