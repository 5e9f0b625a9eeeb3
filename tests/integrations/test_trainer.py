"""Trainer and Seq2SeqTrainer: checkpoints of the adapter alone, resuming, the best model, and their
options.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grafts
from grafts.methods import Method
from helpers import bases
from helpers.adapters import any_config
from helpers.bases import BY_NAME
from helpers.closeness import assert_all_rounded, assert_bitwise, assert_rounded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tokenizer.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning"),
]
STEPS = 8


def rows(count: int = 32, length: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 50, (length,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def fresh(config: grafts.AdapterConfig | str = "lora", base: str = "llama") -> nn.Module:
    model = grafts.init(BY_NAME[base].model())
    torch.manual_seed(3)
    if isinstance(config, str):
        config = grafts.config_from(config)
    model.add_adapter(config)
    return model


def arguments(folder: Path, cls: str = "TrainingArguments", **options: Any) -> Any:
    import transformers

    usual = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "logging_steps": STEPS // 2,
    }
    usual |= {"learning_rate": 1e-2, "seed": 0, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return getattr(transformers, cls)(str(folder), **(usual | options))


def trained(model: nn.Module, folder: Path, resume: Path | None = None, **options: Any) -> Any:
    from transformers import Trainer

    trainer = Trainer(model, arguments(folder, **options), train_dataset=rows(), eval_dataset=rows(8))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.clone()
        for name in model.peft_config
        for key, value in model.get_adapter_state_dict(name).items()
    }


def trainable(method: Method) -> grafts.AdapterConfig:
    """The method's config for a training of a few steps."""
    if "total_step" in method.config.field_names():
        return any_config(method, total_step=STEPS, tinit=1, tfinal=2, deltaT=1, init_r=4, target_r=2)
    return any_config(method)


def test_training_resumed_from_a_checkpoint_ends_where_the_uninterrupted_one_does(
    method: Method, tmp_path: Path
) -> None:
    whole, resumed = fresh(trainable(method)), fresh(trainable(method))
    before = tensors(whole)
    trained(whole, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    held = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= held
    assert not any(name.startswith(("model", "pytorch_model")) or name == "config.json" for name in held)
    trained(resumed, tmp_path / "resumed", checkpoint)
    assert_all_rounded(tensors(whole), tensors(resumed))
    assert any(not torch.equal(value, before[key]) for key, value in tensors(whole).items())
    assert type(whole).__name__ == "LlamaForCausalLM"


def test_checkpoint_is_as_large_as_the_adapter_and_peft_loads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = fresh(grafts.LoraConfig(r=2, target_modules=["q_proj"]))
    trained(model, tmp_path)
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 8 * 2 * 2 * 32 + 1500
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(BY_NAME["llama"].model(), checkpoint)
    x = bases.ids()
    torch.testing.assert_close(theirs(x).logits, model.eval()(x).logits, atol=1e-5, rtol=1e-5)


def test_checkpoint_does_not_load_as_a_model_where_there_is_no_adapter_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    from transformers.integrations import peft as their_peft
    from transformers.models.auto import auto_factory

    trained(fresh(), tmp_path)
    monkeypatch.setattr(their_peft, "is_peft_available", lambda: False)
    monkeypatch.setattr(auto_factory, "is_peft_available", lambda: False)
    config = BY_NAME["llama"].model().config
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        for options in ({}, {"config": config}):
            with pytest.raises(
                (OSError, ValueError, TypeError, AttributeError)
            ):  # of 4.57 the last two, of its own making
                load(tmp_path / f"checkpoint-{STEPS}", **options)


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    from transformers import Trainer

    model = fresh()
    figures = iter([0.9, 0.3, 0.2, 0.1])
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    options |= {"metric_for_best_model": "figure", "greater_is_better": True}
    trainer = Trainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=lambda predictions: {"figure": next(figures)},
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    best = grafts.init(BY_NAME["llama"].model())
    best.load_adapter(tmp_path / "checkpoint-2")
    assert_bitwise(tensors(model), tensors(best))
    last = grafts.init(BY_NAME["llama"].model())
    last.load_adapter(tmp_path / f"checkpoint-{STEPS}")
    assert not torch.equal(next(iter(tensors(last).values())), next(iter(tensors(model).values())))


def test_several_adapters_are_saved_and_resumed_together(tmp_path: Path) -> None:
    def several() -> nn.Module:
        model = fresh()
        model.add_adapter(grafts.IA3Config(), "scale")
        model.add_adapter(grafts.LoraConfig(r=2, target_modules=["o_proj"]), "idle")
        model.train_adapter(["default", "scale"])
        return model

    whole, resumed = several(), several()
    trained(whole, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    assert sorted(path.name for path in checkpoint.iterdir() if path.is_dir()) == ["default", "scale"]
    trained(resumed, tmp_path / "resumed", checkpoint)
    assert_all_rounded(tensors(whole), tensors(resumed))


def test_checkpoint_of_another_adapter_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    trained(fresh(), tmp_path / "one")
    model = fresh(grafts.LoraConfig(r=4))
    before = tensors(model)
    with pytest.raises(grafts.CheckpointError, match="does not fit"):
        trained(model, tmp_path / "two", tmp_path / "one" / f"checkpoint-{STEPS}")
    assert_bitwise(tensors(model), before)
    model = fresh(grafts.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"]))
    before = tensors(model)
    with pytest.raises(grafts.CheckpointError, match=r"missing .*o_proj"):
        trained(model, tmp_path / "more", tmp_path / "one" / f"checkpoint-{STEPS}")
    assert_bitwise(tensors(model), before)
    model = fresh()
    model.add_adapter(grafts.IA3Config(), "scale")
    model.train_adapter(["default", "scale"])
    with pytest.raises(grafts.CheckpointError, match="does not hold adapter"):
        trained(model, tmp_path / "three", tmp_path / "one" / f"checkpoint-{STEPS}")


OPTIONS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("text", ["lora", "prompt_tuning", "seq_bn[reduction_factor=4]"])
def test_option_of_the_trainer_trains_the_adapter_and_leaves_no_hook(
    text: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = fresh(text)
    before = tensors(model)
    base = {name: value.clone() for name, value in model.named_parameters() if "grafts" not in name}
    trained(model, tmp_path, **options)
    assert any(not torch.equal(value, before[key]) for key, value in tensors(model).items())
    assert all(torch.equal(base[name], value) for name, value in model.named_parameters() if name in base)
    if "gradient_checkpointing" in options:
        model.gradient_checkpointing_disable()
    model.delete_adapter("default")
    bare = BY_NAME["llama"].model()
    for name, module in model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
    output = type(bare).forward(
        model.eval(), bases.ids()
    )  # `accelerate` leaves its autocast around the model's own forward
    assert_rounded(output.logits, bare(bases.ids()).logits)


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_trains_and_resumes(tmp_path: Path) -> None:
    whole, resumed = fresh(), fresh()
    trained(whole, tmp_path / "whole", torch_compile=True, torch_compile_backend="eager")
    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    trained(resumed, tmp_path / "resumed", checkpoint, torch_compile=True, torch_compile_backend="eager")
    assert_all_rounded(tensors(whole), tensors(resumed))


def test_seq2seq_trainer_generates_and_resumes(tmp_path: Path) -> None:
    from transformers import Seq2SeqTrainer

    def run(model: nn.Module, folder: Path, resume: Path | None = None) -> Any:
        made = arguments(
            folder, "Seq2SeqTrainingArguments", predict_with_generate=True, generation_max_length=9
        )
        trainer = Seq2SeqTrainer(model, made, train_dataset=rows(), eval_dataset=rows(8))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    whole, resumed = fresh("prefix_tuning", "t5"), fresh("prefix_tuning", "t5")
    trainer = run(whole, tmp_path / "whole")
    predicted = trainer.predict(rows(8)).predictions
    assert predicted.shape[0] == 8
    run(resumed, tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{STEPS // 2}")
    assert_all_rounded(tensors(whole), tensors(resumed))


def test_training_with_nothing_trainable_says_so(tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "adapter")
    model = grafts.init(BY_NAME["llama"].model())
    model.load_adapter(tmp_path / "adapter")
    with pytest.raises(grafts.StateError, match="nothing is trainable"):
        trained(model, tmp_path / "run")
    with pytest.raises(
        grafts.StateError, match="nothing is trainable"
    ):  # though the inputs want gradients here
        trained(model, tmp_path / "run", gradient_checkpointing=True)
    model.gradient_checkpointing_disable()
    model.add_adapter("ia3", "idle")
    model.set_adapter("default")
    grafts.train_only(model, "idle")
    with pytest.raises(grafts.StateError, match="nothing is trainable"):
        trained(model, tmp_path / "run", gradient_checkpointing=True)
    model.gradient_checkpointing_disable()
    model.train_adapter("default")
    trained(model, tmp_path / "run")
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "adapter", is_trainable=True)
    trained(model, tmp_path / "run")


def test_model_without_adapters_is_saved_and_resumed_as_ever(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return grafts.init(BY_NAME["llama"].model().requires_grad_(True))

    whole, resumed = model(), model()
    trained(whole, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    assert (checkpoint / "model.safetensors").is_file()
    trained(resumed, tmp_path / "resumed", checkpoint)
    assert_all_rounded(dict(whole.named_parameters()), dict(resumed.named_parameters()))


def test_state_of_the_trainer_names_the_adapter_checkpoint(tmp_path: Path) -> None:
    trained(fresh(), tmp_path)
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS


def test_class_of_ones_own_resumes_too(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    class Own(grafts.PeftAdapterMixin, LlamaForCausalLM):
        pass

    def model() -> Any:
        torch.manual_seed(0)
        made = Own(BY_NAME["llama"].model().config)
        made.add_adapter("lora")
        return made

    whole, resumed = model(), model()
    trained(whole, tmp_path / "whole")
    trained(resumed, tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{STEPS // 2}")
    assert_all_rounded(tensors(whole), tensors(resumed))


def test_model_inside_a_module_of_ones_own_is_trained_and_resumed_as_that_one_says(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fresh()

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return self.inner(input_ids=input_ids, labels=labels)

    whole, resumed = Outer(), Outer()
    trained(whole, tmp_path / "whole")
    trained(resumed, tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{STEPS // 2}")
    assert_all_rounded(tensors(whole.inner), tensors(resumed.inner))
