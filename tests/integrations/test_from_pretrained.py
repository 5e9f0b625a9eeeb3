"""A base and its adapter in one call, by this library's own function and, with the integration on, by
`transformers`'.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import grafts
from grafts.methods import Method
from helpers import bases
from helpers.adapters import any_config, randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded
from helpers.tokens import tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def saved(method: Method, tmp_path: Path) -> tuple[Path, Tensor]:
    """The folder of an adapter of the method that names its base, and what they compute."""
    BY_NAME["llama"].model().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    model = grafts.init(LlamaForCausalLM.from_pretrained(tmp_path / "base").requires_grad_(False))
    model.add_adapter(any_config(method))
    randomise(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(bases.ids()).logits


def test_base_and_adapter_in_one_call(saved: tuple[Path, Tensor]) -> None:
    folder, expected = saved
    model: Any = grafts.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert_rounded(logits(model), expected)
    trainable: Any = grafts.from_pretrained(folder, adapter_name="en", is_trainable=True, dtype=torch.float64)
    assert trainable.active_adapters() == ["en"]
    assert any(parameter.requires_grad for parameter in trainable.parameters())
    assert logits(trainable).dtype == torch.float64


def test_an_interface_goes_to_the_adapter(tmp_path: Path) -> None:
    BY_NAME["llama"].model().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    model = grafts.init(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.add_adapter("seq_bn[reduction_factor=4]")
    model.save_pretrained(tmp_path / "adapter")
    fitting = grafts.infer_interface(model)
    wrong = dataclasses.replace(fitting, layer_output_proj="mlp.no_such_linear")
    loaded: Any = grafts.from_pretrained(tmp_path / "adapter", interface=fitting)
    assert loaded.active_adapters() == ["default"]
    with pytest.raises(grafts.InterfaceError, match="no_such_linear"):
        grafts.from_pretrained(tmp_path / "adapter", interface=wrong)


def test_transformers_opens_an_adapter_while_the_integration_is_on(saved: tuple[Path, Tensor]) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

    folder, expected = saved
    before = PreTrainedModel.load_adapter
    with grafts.integrate():
        for cls in (AutoModelForCausalLM, LlamaForCausalLM):
            model = cls.from_pretrained(folder)
            assert_rounded(logits(model), expected)
            assert model.active_adapters() == ["default"]
            assert isinstance(model, grafts.PeftAdapterMixin)
        bare = LlamaForCausalLM.from_pretrained(folder.parent / "base")
        assert not isinstance(bare, grafts.PeftAdapterMixin)
        bare.load_adapter(folder, "en")
        assert_rounded(logits(bare), expected)
    assert PreTrainedModel.load_adapter is before
    first, second = grafts.integrate(), grafts.integrate()
    first.remove()
    first.remove()
    assert PreTrainedModel.load_adapter is not before
    second.remove()
    assert PreTrainedModel.load_adapter is before


def test_without_peft_transformers_opens_adapters_with_the_integration_alone(tmp_path: Path) -> None:
    BY_NAME["llama"].model().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    model = grafts.init(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.add_adapter("prefix_tuning")
    randomise(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model).sum().item()
    code = f"""
        import importlib.util, importlib.metadata, sys
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "peft" else found(name, *rest)
        sys.modules["peft"] = None
        import torch, transformers, grafts
        from transformers.utils import is_peft_available
        assert not is_peft_available()
        ids = torch.tensor({bases.ids().tolist()})
        try:
            transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
        except (OSError, ValueError) as error:
            print("refused")
        with grafts.integrate():
            model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
        print(model(ids).logits.sum().item())
        print(grafts.from_pretrained({str(tmp_path / "adapter")!r})(ids).logits.sum().item())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    refused, *sums = done.stdout.split()
    assert refused == "refused"
    assert [float(value) for value in sums] == pytest.approx([expected, expected], rel=1e-4)


HEADS = {
    "SEQ_CLS": ("BertForSequenceClassification", "bert"),
    "TOKEN_CLS": ("BertForTokenClassification", "bert"),
    "QUESTION_ANS": ("BertForQuestionAnswering", "bert"),
    "FEATURE_EXTRACTION": ("BertModel", "bert"),
    "SEQ_2_SEQ_LM": ("T5ForConditionalGeneration", "t5"),
    "CAUSAL_LM": ("LlamaForCausalLM", "llama"),
    None: ("BertForMaskedLM", "bert"),
}


@pytest.mark.parametrize("task", HEADS, ids=str)
def test_class_and_head_of_the_model_come_from_the_adapter(task: str | None, tmp_path: Path) -> None:
    import transformers

    name, base = HEADS[task]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    config = BY_NAME[base].model().config
    config.num_labels = 5 if task in ("SEQ_CLS", "TOKEN_CLS") else 2
    body = transformers.BertModel(config) if base == "bert" else cls(config)
    body.save_pretrained(tmp_path / "base")
    model = grafts.init(
        cls.from_pretrained(tmp_path / "base", num_labels=config.num_labels).requires_grad_(False)
    )
    model.add_adapter(grafts.LoraConfig(task_type=task))
    randomise(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    again = grafts.from_pretrained(tmp_path / "adapter")
    assert type(again).__name__ == name
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        assert again.config.num_labels == 5
    if task not in ("QUESTION_ANS", None):  # whose heads are new, and not the adapter's
        inputs = BY_NAME[base].inputs()
        assert_rounded(next(iter(again(**inputs).values())), next(iter(model.eval()(**inputs).values())))


def test_class_that_a_file_names_is_looked_up_only_among_models(tmp_path: Path) -> None:
    BY_NAME["llama"].model().save_pretrained(tmp_path / "base")
    model = grafts.init(BY_NAME["llama"].model())
    model.add_adapter(grafts.LoraConfig(base_model_name_or_path=str(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    for named in (
        {"base_model_class": "os.system", "parent_library": "os"},
        {"base_model_class": "pipeline"},
        {"base_model_class": 3},
    ):
        values = json.loads(file.read_text()) | {"auto_mapping": named}
        file.write_text(json.dumps(values))
        assert type(grafts.from_pretrained(tmp_path / "adapter")).__name__ == "LlamaForCausalLM"


def test_missing_base_says_which(tmp_path: Path) -> None:
    model = grafts.init(BY_NAME["llama"].model())
    model.add_adapter("lora")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(grafts.CheckpointError, match="does not name its base model: give it with base="):
        grafts.from_pretrained(tmp_path / "adapter")
    with pytest.raises(grafts.CheckpointError, match="the base 'no/such' cannot be loaded"):
        grafts.from_pretrained(tmp_path / "adapter", base="no/such")
    BY_NAME["llama"].model().save_pretrained(tmp_path / "base")
    other = grafts.from_pretrained(tmp_path / "adapter", base=tmp_path / "base")
    assert_rounded(logits(other), logits(model))
    with pytest.raises(grafts.CheckpointError, match="there is no folder"):
        grafts.from_pretrained("/no/such/adapter")


PIPELINES = {
    "text-generation": ("llama", "LlamaForCausalLM", "CAUSAL_LM", {"max_new_tokens": 4, "do_sample": False}),
    "text-classification": ("bert", "BertForSequenceClassification", "SEQ_CLS", {}),
    "token-classification": ("bert", "BertForTokenClassification", "TOKEN_CLS", {}),
    "feature-extraction": ("bert", "BertModel", "FEATURE_EXTRACTION", {}),
}


@pytest.mark.filterwarnings("ignore:.*generation.*")
@pytest.mark.parametrize("task", PIPELINES)
@pytest.mark.parametrize(
    "text", ["lora", "prefix_tuning", "prompt_tuning[num_virtual_tokens=3]", "seq_bn[reduction_factor=2]"]
)
def test_pipeline_takes_a_model_and_an_adapter_by_its_folder(task: str, text: str, tmp_path: Path) -> None:
    import transformers

    base, name, kind, options = PIPELINES[task]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    cls(BY_NAME[base].model().config).save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    model = grafts.init(cls.from_pretrained(tmp_path / "base").requires_grad_(False))
    model.add_adapter(dataclasses.replace(grafts.config_from(text), task_type=kind))
    randomise(model, "default", scale=1.0)
    model.save_pretrained(tmp_path / "adapter")
    words = "w7 w8 w9 w30"
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    expected = transformers.pipeline(task, model=model.eval(), tokenizer=tokens)(words, **options)
    with grafts.integrate():
        got = transformers.pipeline(task, model=str(tmp_path / "adapter"))(words, **options)
    assert got == expected
    model.disable_adapters()
    assert transformers.pipeline(task, model=model, tokenizer=tokens)(words, **options) != expected
