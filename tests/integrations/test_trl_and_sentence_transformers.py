"""Libraries on top of `transformers` with models of this one: TRL and sentence-transformers, on tiny
models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

import grafts
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded
from helpers.tokens import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
QUIET = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 0,
}


def words(seed: int, count: int = 6) -> str:
    numbers = torch.randint(5, 50, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.get_adapter_state_dict().items()}


def base_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_parameters() if "grafts" not in name}


@pytest.mark.parametrize("text", ["lora", "prefix_tuning", "prompt_tuning[num_virtual_tokens=3]"])
def test_sft_trainer_trains_saves_and_resumes_an_adapter(text: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    rows = datasets.Dataset.from_dict({"text": [words(seed) for seed in range(16)]})

    def run(folder: Path, resume: Path | None = None) -> Any:
        model = grafts.init(BY_NAME["llama"].model())
        torch.manual_seed(0)
        model.add_adapter(text)
        before, base = tensors(model), base_of(model)
        options = QUIET | {
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
        }
        config = trl.SFTConfig(
            str(folder), **options, max_length=8, learning_rate=0.05, gradient_checkpointing=False, bf16=False
        )
        trainer = trl.SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer())
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
        assert all(torch.equal(tensor, base[name]) for name, tensor in base_of(model).items())
        return model

    whole = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = run(tmp_path / "resumed", checkpoint)
    assert all(torch.equal(tensor, tensors(resumed)[name]) for name, tensor in tensors(whole).items())


def test_dpo_trainer_takes_the_same_model_without_adapters_as_reference(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    columns = {
        name: [words(17 * seed + at) for seed in range(8)]
        for at, name in enumerate(("prompt", "chosen", "rejected"))
    }
    model: Any = grafts.init(BY_NAME["llama"].model())
    torch.manual_seed(0)
    model.add_adapter("lora")
    randomise(model, "default")
    reference: Any = grafts.bare(model)
    untouched = reference(bases.ids()).logits
    assert_rounded(untouched, BY_NAME["llama"].model()(bases.ids()).logits)
    config = trl.DPOConfig(
        str(tmp_path), **QUIET, max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, max_length=24,
        gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    before, base = tensors(model), base_of(model)
    data = datasets.Dataset.from_dict(columns)
    trainer = trl.DPOTrainer(model, reference, args=config, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - 0.6931) > 1e-3  # log 2 is what equal models give
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_of(model).items())
    model.disable_adapters()
    assert torch.equal(model.eval()(bases.ids()).logits, untouched)


def test_bare_base_shares_its_weights_and_nothing_else() -> None:
    model: Any = BY_NAME["llama"].model()
    expected = model(bases.ids()).logits
    grafts.add(model, "lora")
    randomise(model, "default")
    moved = model(bases.ids()).logits
    reference = grafts.bare(model)
    assert type(reference) is type(model)
    assert torch.equal(reference(bases.ids()).logits, expected)
    own = {name: id(p) for name, p in model.named_parameters() if "grafts" not in name}
    assert {name: id(p) for name, p in reference.named_parameters()} == own
    assert not any(p.requires_grad for p in reference.parameters())
    grafts.deactivate(model)
    grafts.activate(model, "default")
    assert torch.equal(model(bases.ids()).logits, moved)
    assert grafts.adapters(model)["default"].trainable
    with pytest.raises(grafts.StateError, match="has no adapters"):
        grafts.bare(reference)
    grafts.merge(model)
    with pytest.raises(grafts.StateError, match="unmerge"):
        grafts.bare(model)


def sentence_model(folder: Path) -> Any:
    """A model of sentences with a random BERT and the mean of its tokens."""
    st = pytest.importorskip("sentence_transformers")
    from transformers import BertModel

    if not folder.exists():
        torch.manual_seed(0)
        BertModel(bases.bert_config()).save_pretrained(folder)
        tokenizer(folder)
    from sentence_transformers.models import Pooling, Transformer

    return st.SentenceTransformer(
        modules=[Transformer(str(folder), max_seq_length=16), Pooling(16)], device="cpu"
    )


@pytest.mark.parametrize(
    "text", ["lora", "prompt_tuning[num_virtual_tokens=3]", "seq_bn[reduction_factor=4]"]
)
def test_sentence_transformer_has_trains_saves_and_loads_adapters(text: str, tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    sentences = [words(seed) for seed in range(8)]
    model = sentence_model(tmp_path / "base")
    before = model.encode(sentences)
    inner = grafts.init(model[0].auto_model)
    model.add_adapter(grafts.config_from(text))  # its own method, which asks the inner model
    assert model.active_adapters() == ["default"]
    rows = datasets.Dataset.from_dict({"anchor": sentences, "positive": sentences[::-1]})
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), **QUIET, max_steps=3, learning_rate=0.05
    )
    loss = MultipleNegativesRankingLoss(model)
    st.SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).train()
    after = model.encode(sentences)
    assert abs(after - before).max() > 1e-3
    inner.save_pretrained(tmp_path / "adapter")
    other = sentence_model(tmp_path / "base")
    grafts.init(other[0].auto_model)
    other.load_adapter(str(tmp_path / "adapter"))
    assert abs(other.encode(sentences) - after).max() < 1e-6
    other.disable_adapters()
    assert abs(other.encode(sentences) - before).max() < 1e-6


def test_saved_sentence_transformer_is_its_adapter_and_opens_with_the_integration(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers", minversion="6.0")
    pytest.importorskip("peft")  # without it sentence-transformers opens no adapter, whoever would load it
    model = sentence_model(tmp_path / "base")
    inner = grafts.init(model[0].auto_model)
    model.add_adapter("lora")
    randomise(inner, "default")
    model.save_pretrained(str(tmp_path / "saved"))
    held = [path.name for path in (tmp_path / "saved").iterdir()]
    assert "adapter_model.safetensors" in held
    assert "model.safetensors" not in held
    with grafts.integrate():
        again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert isinstance(again[0].auto_model, grafts.PeftAdapterMixin)
    assert abs(again.encode([words(1)]) - model.encode([words(1)])).max() < 1e-6
