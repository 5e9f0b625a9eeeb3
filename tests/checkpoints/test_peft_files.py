"""Files and outputs against `peft` 0.21, in both directions, in float32."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import grafts
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import BY_NAME, Base
from helpers.peers import peft

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing.*:FutureWarning"
    ),  # `peft` asks for a deprecated name
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*BOS.*|.*fan_in_fan_out.*:UserWarning"),
]

TIED_LLAMA = Base("tied-llama", lambda: bases.llama(tie_word_embeddings=True), BY_NAME["llama"].inputs)
ROBERTA = Base("roberta", bases.roberta, BY_NAME["bert"].inputs)


class Layers(nn.Module):
    """Every kind of layer that is no linear of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(5, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv2 = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.linear = nn.Linear(4, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = x + self.attention(x.mT, x.mT, x.mT)[0].mT
        x = self.conv2(x[:, None]).relu()
        x = self.conv3(x.unflatten(1, (2, 3))).mean((-1, -2, -3))
        return self.out(self.linear(x).tanh())


LAYERS = Base("layers", Layers, lambda: {"x": bases.noise(2, 5, 8)})
CASES = {
    "llama-default": (BY_NAME["llama"], {"task_type": "CAUSAL_LM"}),
    "llama-all-linear": (BY_NAME["llama"], {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama-regex": (BY_NAME["llama"], {"target_modules": r".*layers\.0\.self_attn\.(q|v)_proj"}),
    "llama-rslora-patterns": (
        BY_NAME["llama"],
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"^model.layers.1.self_attn.v_proj": 6, "q_proj": 2},
            "alpha_pattern": {"q_proj": 16},
        },
    ),
    "llama-layers": (
        BY_NAME["llama"],
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "llama-excluded": (
        BY_NAME["llama"],
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    ),
    "llama-embedding": (BY_NAME["llama"], {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama-head": (BY_NAME["llama"], {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama-head-and-embedding": (
        BY_NAME["llama"],
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "llama-gaussian": (
        BY_NAME["llama"],
        {"init_lora_weights": "gaussian", "target_modules": ["o_proj", "up_proj"]},
    ),
    "gpt2-default": (BY_NAME["gpt2"], {"task_type": "CAUSAL_LM"}),
    "gpt2-all-linear": (BY_NAME["gpt2"], {"target_modules": "all-linear"}),
    "gpt2-embedding": (BY_NAME["gpt2"], {"target_modules": ["wpe", "c_fc"]}),
    "gpt2-bias-all": (BY_NAME["gpt2"], {"target_modules": ["c_attn"], "bias": "all"}),
    "gpt2-bias-lora-only": (BY_NAME["gpt2"], {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "bert-classification": (BY_NAME["bert"], {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "bert-pooler-and-head": (BY_NAME["bert"], {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    "bert-default": (BY_NAME["bert"], {"task_type": "SEQ_CLS"}),
    "roberta-composite-head": (ROBERTA, {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"]}),
    "t5-default": (BY_NAME["t5"], {"task_type": "SEQ_2_SEQ_LM"}),
    "t5-all-linear": (BY_NAME["t5"], {"target_modules": "all-linear"}),
    "conv-container-head": (BY_NAME["conv"], {"target_modules": ["classifier.1"], "bias": "all"}),
    "vit": (BY_NAME["vit"], {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "tied-llama": (TIED_LLAMA, {"target_modules": "all-linear"}),
    "dora-llama": (BY_NAME["llama"], {"use_dora": True, "target_modules": "all-linear"}),
    "dora-gpt2": (BY_NAME["gpt2"], {"use_dora": True, "target_modules": ["c_attn", "c_fc"]}),
    "dora-embedding": (BY_NAME["llama"], {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora-convolutions": (
        LAYERS,
        {"use_dora": True, "target_modules": ["conv1", "conv2", "conv3", "linear"]},
    ),
    "dora-rslora-bert": (BY_NAME["bert"], {"use_dora": True, "use_rslora": True, "task_type": "SEQ_CLS"}),
    "lora-bias": (BY_NAME["gpt2"], {"lora_bias": True, "target_modules": ["c_attn", "c_proj"]}),
    "convolutions": (LAYERS, {"target_modules": ["conv1", "conv2", "conv3"]}),
    "convolutions-bias": (LAYERS, {"lora_bias": True, "target_modules": ["conv1", "conv2", "conv3"]}),
    "pissa": (BY_NAME["llama"], {"init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "pissa-gpt2": (BY_NAME["gpt2"], {"init_lora_weights": "pissa", "target_modules": ["c_attn"]}),
    "olora": (BY_NAME["llama"], {"init_lora_weights": "olora", "target_modules": ["q_proj", "down_proj"]}),
    "orthogonal": (
        BY_NAME["llama"],
        {"init_lora_weights": "orthogonal", "target_modules": ["q_proj", "down_proj"]},
    ),
    "tokens": (BY_NAME["llama"], {"trainable_token_indices": [4, 7], "target_modules": ["q_proj"]}),
    "tokens-tied": (TIED_LLAMA, {"trainable_token_indices": [4, 7], "target_modules": ["q_proj"]}),
    "tokens-gpt2": (BY_NAME["gpt2"], {"trainable_token_indices": [4, 7], "target_modules": ["c_attn"]}),
    "tokens-t5": (BY_NAME["t5"], {"trainable_token_indices": [4, 7], "target_modules": ["q"]}),
    "tokens-by-name": (
        BY_NAME["llama"],
        {"trainable_token_indices": {"embed_tokens": [4], "lm_head": [5, 9]}, "target_modules": ["q_proj"]},
    ),
    "tying-lora": (TIED_LLAMA, {"ensure_weight_tying": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "tying-copy": (
        TIED_LLAMA,
        {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    ),
    "ia3-llama": (BY_NAME["llama"], {"task_type": "CAUSAL_LM"}, "IA3Config"),
    "ia3-gpt2": (BY_NAME["gpt2"], {"task_type": "CAUSAL_LM"}, "IA3Config"),
    "ia3-t5": (BY_NAME["t5"], {"task_type": "SEQ_2_SEQ_LM"}, "IA3Config"),
    "ia3-bert": (
        BY_NAME["bert"],
        {
            "task_type": "SEQ_CLS",
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
        "IA3Config",
    ),
    "ia3-regex": (
        BY_NAME["llama"],
        {"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*\.down_proj"},
        "IA3Config",
    ),
    "ia3-convolutions": (
        LAYERS,
        {
            "target_modules": ["conv2", "conv3", "linear"],
            "feedforward_modules": ["conv3"],
            "modules_to_save": ["out"],
        },
        "IA3Config",
    ),
    "ia3-random": (
        BY_NAME["llama"],
        {"target_modules": ["v_proj", "o_proj"], "feedforward_modules": [], "init_ia3_weights": False},
        "IA3Config",
    ),
    "adalora-llama": (BY_NAME["llama"], {"task_type": "CAUSAL_LM", "total_step": 10}, "AdaLoraConfig"),
    "adalora-gpt2": (BY_NAME["gpt2"], {"init_r": 5, "target_r": 3, "total_step": 10}, "AdaLoraConfig"),
    "adalora-t5": (
        BY_NAME["t5"],
        {"target_modules": ["q", "wo"], "lora_alpha": 3, "total_step": 10},
        "AdaLoraConfig",
    ),
    "adalora-bert": (
        BY_NAME["bert"],
        {"task_type": "SEQ_CLS", "target_modules": "all-linear", "bias": "lora_only", "total_step": 10},
        "AdaLoraConfig",
    ),
    "adalora-conv2d": (
        LAYERS,
        {"target_modules": ["conv2", "linear"], "init_r": 4, "target_r": 2, "total_step": 5},
        "AdaLoraConfig",
    ),
}
Case = tuple[Base, dict[str, object], str]
CASES = {name: (*case, "LoraConfig")[:3] for name, case in CASES.items()}
ATTENTION = {
    "attention": (LAYERS, {"target_modules": ["attention", "linear"]}, "LoraConfig"),
    "attention-bias": (LAYERS, {"lora_bias": True, "target_modules": ["attention"]}, "LoraConfig"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SIZES = {"r": 4, "lora_alpha": 8}


def randomised(model: nn.Module) -> nn.Module:
    """A `peft` model with values as after training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def config_of(library: object, case: Case) -> object:
    """The case's config of one library; a copy of its options, as `peft` writes into the lists that it is
    given.
    """
    _, options, kind = case
    return getattr(library, kind)(**(copy.deepcopy(options) | (SIZES if kind == "LoraConfig" else {})))


@each_case
def test_peft_loads_what_we_write_and_gives_our_output(case: Case, tmp_path: Path) -> None:
    base = case[0]
    model = base.model()
    bare = base.output(model)
    grafts.add(model, config_of(grafts, case), name="en")
    randomise(model, "en")
    expected = base.output(model)
    grafts.save(model, "en", tmp_path)

    theirs = peft.PeftModel.from_pretrained(base.model(), tmp_path).eval()
    torch.testing.assert_close(base.output(theirs), expected, rtol=1e-5, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-3


@each_case
def test_we_load_what_peft_writes_and_give_its_output(case: Case, tmp_path: Path) -> None:
    base = case[0]
    theirs = randomised(peft.get_peft_model(base.model(), config_of(peft, case))).eval()
    expected = base.output(theirs)
    theirs.save_pretrained(tmp_path)

    model = base.model()
    bare = base.output(model)
    report = grafts.load(model, tmp_path, name="en")
    torch.testing.assert_close(base.output(model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-3
    assert report.tensors > 0
    assert torch.equal(base.output(grafts.detach(model)), bare)


@pytest.mark.parametrize("case", (CASES | ATTENTION).values(), ids=(CASES | ATTENTION).keys())
def test_keys_and_shapes_are_those_of_peft(case: Case, tmp_path: Path) -> None:
    base = case[0]
    model = grafts.add(base.model(), config_of(grafts, case))
    grafts.save(model, "default", tmp_path / "ours")
    theirs = peft.get_peft_model(base.model(), config_of(peft, case))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, reference = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in reference.items()}


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
def test_attention_module_from_peft_gives_the_output_of_the_formula(case: Case, tmp_path: Path) -> None:
    """`peft` 0.21.2 is no reference there: it adds the output projection's update twice, and drops the
    input's lora_bias.
    """
    base = case[0]
    randomised(peft.get_peft_model(base.model(), config_of(peft, case))).save_pretrained(tmp_path)
    tensors = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    model, scaling = base.model(), 8 / 4
    for name, prefix in (("in_proj", "attention"), ("out_proj.", "attention.base_layer.out_proj")):
        joined = name if name.endswith(".") else f"{name}_"
        weight = model.attention.get_parameter(f"{joined}weight")
        weight += scaling * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        if f"{prefix}.lora_B.bias" in tensors:
            bias = model.attention.get_parameter(f"{joined}bias")
            bias += scaling * tensors[f"{prefix}.lora_B.bias"]
    if "linear.lora_A.weight" in tensors:
        model.linear.weight += scaling * tensors["linear.lora_B.weight"] @ tensors["linear.lora_A.weight"]
    expected = base.output(model)
    ours = base.model()
    bare = base.output(ours)
    grafts.load(ours, tmp_path)
    torch.testing.assert_close(base.output(ours), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(base.output(grafts.merge(ours)), expected, rtol=1e-5, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-3


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=["beside", "beneath"])
def test_resized_embedding_that_peft_saves_beside_the_adapter_comes_along(
    targets: list[str], tmp_path: Path
) -> None:
    """`peft` writes the base's own embedding when the vocabulary has grown; its new rows differ in the next
    process.
    """
    base = BY_NAME["llama"]

    def grown(seed: int) -> nn.Module:
        model = base.model()
        torch.manual_seed(seed)
        model.resize_token_embeddings(53, mean_resizing=False)
        if "embed_tokens" in targets:  # the head is not written then
            torch.manual_seed(1)
            nn.init.normal_(model.lm_head.weight)
        return model

    theirs = randomised(
        peft.get_peft_model(grown(1), peft.LoraConfig(**SIZES, target_modules=targets))
    ).eval()
    ids = {"input_ids": torch.tensor([[50, 51, 52, 3]])}
    expected = theirs(**ids).logits
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)

    fresh = grown(2)
    bare = fresh(**ids).logits
    grafts.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(**ids).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grafts.merge(fresh)(**ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(grafts.detach(grafts.unmerge(fresh))(**ids).logits, bare)


def test_written_config_names_every_target_so_that_any_reader_finds_the_same(tmp_path: Path) -> None:
    model = grafts.add(BY_NAME["llama"].model(), grafts.LoraConfig(r=4))
    grafts.save(model, "default", tmp_path)
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    assert data["target_modules"] == ["q_proj", "v_proj"]
    assert data["peft_type"] == "LORA"
    assert data["inference_mode"] is True
    assert data["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_layers_of_a_bare_model_are_written_as_names_because_peft_would_not_find_their_indices(
    tmp_path: Path,
) -> None:
    model = BY_NAME["llama"].model().model
    grafts.add(model, grafts.LoraConfig(target_modules=["q_proj"], layers_to_transform=1))
    grafts.save(model, "default", tmp_path)
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (data["target_modules"], data["layers_to_transform"]) == (["layers.1.self_attn.q_proj"], None)
    fresh = peft.PeftModel.from_pretrained(BY_NAME["llama"].model().model, tmp_path)
    assert sum("lora_A" in name for name, _ in fresh.named_parameters()) == 1


def test_default_head_for_classification_includes_all_of_it(tmp_path: Path) -> None:
    """`peft` takes only modules called classifier or score; DistilBERT's pre_classifier stays random
    there.
    """
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=32
    )
    model = DistilBertForSequenceClassification(config)
    made = grafts.plan(model, grafts.LoraConfig(task_type="SEQ_CLS"))
    assert [target.path for target in made.targets if target.kind == "copy"] == [
        "pre_classifier",
        "classifier",
    ]


def test_bin_file_is_refused_with_the_way_to_convert_and_read_on_request(tmp_path: Path) -> None:
    base = BY_NAME["llama"]
    theirs = randomised(
        peft.get_peft_model(base.model(), peft.LoraConfig(**SIZES, target_modules=["q_proj"]))
    )
    tensors = peft.get_peft_model_state_dict(theirs)
    theirs.peft_config["default"].save_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    model = base.model()
    with pytest.raises(grafts.CheckpointError, match="To convert it, load it once with"):
        grafts.load(model, tmp_path)
    assert grafts.adapters(model) == {}
    grafts.load(model, tmp_path, allow_pickle=True)
    torch.testing.assert_close(base.output(model), base.output(theirs.eval()), rtol=1e-5, atol=1e-5)


class Exploit:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploited"),))


def test_bin_file_with_code_runs_none_even_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = grafts.add(BY_NAME["llama"].model(), grafts.LoraConfig())
    grafts.save(model, "default", tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Exploit()}, tmp_path / "adapter_model.bin")
    with pytest.raises(grafts.CheckpointError, match="more than tensors"):
        grafts.load(BY_NAME["llama"].model(), tmp_path, allow_pickle=True)
    assert not (tmp_path / "exploited").exists()


def test_option_that_is_not_here_is_an_error_and_not_dropped(tmp_path: Path) -> None:
    model = grafts.add(BY_NAME["llama"].model(), grafts.LoraConfig())
    grafts.save(model, "default", tmp_path)
    file = tmp_path / "adapter_config.json"
    data = json.loads(file.read_text())
    for name, value in (("use_quantum", True), ("init_lora_weights", "pisa")):
        file.write_text(json.dumps(data | {name: value}))
        with pytest.raises(grafts.ConfigError, match=name):
            grafts.load(BY_NAME["llama"].model(), tmp_path)
    file.write_text(
        json.dumps(data | {"use_quantum": None, "megatron_core": "megatron.core", "qalora_group_size": 16})
    )
    grafts.load(BY_NAME["llama"].model(), tmp_path)


def test_their_config_fields_are_all_known_or_unused(tmp_path: Path) -> None:
    theirs = peft.LoraConfig(**SIZES).to_dict()
    theirs.pop("peft_type")
    theirs.pop("peft_version")
    assert grafts.LoraConfig.from_dict(copy.deepcopy(theirs)).r == 4


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_training_from_the_same_start_takes_the_course_of_peft(name: str, tmp_path: Path) -> None:
    """Same data, same optimizer, same random numbers (the base has dropout): the same losses and the same
    adapter.
    """
    base = BY_NAME[name]
    options = SIZES | {"target_modules": "all-linear"} | ({"task_type": "SEQ_CLS"} if name == "bert" else {})
    theirs = peft.get_peft_model(base.model(), peft.LoraConfig(**options))
    theirs.save_pretrained(tmp_path / "start")
    ours = base.model()
    grafts.load(ours, tmp_path / "start", name="en", train=True)

    def course(model: nn.Module) -> list[float]:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(8):
            loss = base.output(model).logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    first, second = course(ours), course(theirs)
    assert first[0] - first[-1] > 1e-3
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    theirs.eval()
    torch.testing.assert_close(base.output(ours.eval()), base.output(theirs), rtol=1e-3, atol=1e-4)
