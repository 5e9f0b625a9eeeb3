"""Adapters from a hub and to it: a small one that runs on loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.file_download
import huggingface_hub.hf_api
import pytest
import torch
import transformers.utils.hub
import yaml
from huggingface_hub import constants
from torch import Tensor

import grafts
from grafts.checkpoints.save import checkpoint_files
from helpers import bases
from helpers.adapters import randomise
from helpers.bases import BY_NAME
from helpers.closeness import assert_rounded
from helpers.hubserver import TOKEN, Hub, serving

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that `huggingface_hub` takes for the real one, with an empty cache and no stored token."""
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, huggingface_hub.file_download):
            template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False, raising=False)
        new_sessions()
        yield server
    new_sessions()


def new_sessions() -> None:
    """Let `huggingface_hub` look at its constants again."""
    from huggingface_hub import utils

    for name in ("reset_sessions", "close_session"):
        if hasattr(utils, name):
            getattr(utils, name)()


def ready() -> Any:
    return grafts.init(BY_NAME["llama"].model())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(bases.ids()).logits


def adapter(seed: int, text: str = "lora") -> tuple[dict[str, bytes], Tensor]:
    """The files of a trained adapter, and what the model computes with it."""
    model = ready()
    model.add_adapter(text)
    randomise(model, "default", seed=seed)
    return checkpoint_files(model, "default"), logits(model)


def test_adapter_of_a_repository_is_loaded_at_each_revision(hub: Hub) -> None:
    first, expected_first = adapter(1)
    second, expected_second = adapter(2)
    repository = hub.add("someone/lora", first)
    repository.refs["v1"] = old = repository.refs["main"]
    repository.commit(second)
    for revision, expected in (
        ("v1", expected_first),
        (None, expected_second),
        ("main", expected_second),
        (old, expected_first),
    ):
        model = ready()
        report = model.load_adapter("someone/lora", revision=revision)
        assert_rounded(logits(model), expected)
        assert report.path.name == (repository.refs["main"] if revision in (None, "main") else old)
    with pytest.raises(grafts.CheckpointError, match="has no revision 'v9'"):
        ready().load_adapter("someone/lora", revision="v9")


def test_only_files_of_an_adapter_are_fetched(hub: Hub) -> None:
    files, _ = adapter(1)
    hub.add(
        "someone/lora",
        files | {"optimizer.pt": b"x" * 1000, "code.py": b"print()", "model.safetensors": b"large"},
    )
    folder = grafts.fetch("someone/lora")
    assert {path.name for path in folder.iterdir()} == set(files)
    assert not any(
        "optimizer" in line or "code.py" in line or "/model.safetensors" in line for line in hub.asked
    )


def test_what_was_fetched_is_there_without_a_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    files, expected = adapter(1)
    hub.add("someone/lora", files)
    with pytest.raises(grafts.CheckpointError, match="the hub was not reached"):
        ready().load_adapter("someone/lora", local_files_only=True)
    grafts.fetch("someone/lora")
    asked = len(hub.asked)
    model = ready()
    model.load_adapter("someone/lora", local_files_only=True)
    assert_rounded(logits(model), expected)
    assert len(hub.asked) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_sessions()
    model = ready()
    model.load_adapter("someone/lora")
    assert_rounded(logits(model), expected)
    assert len(hub.asked) == asked
    with pytest.raises(grafts.CheckpointError, match="the cache does not hold"):
        ready().load_adapter("someone/other")


def test_private_and_gated_repositories_need_the_token(hub: Hub) -> None:
    files, expected = adapter(1)
    hub.add("someone/private", files, private=True)
    hub.add("someone/gated", files, gated=True)
    with pytest.raises(grafts.CheckpointError, match="a private one needs token="):
        ready().load_adapter("someone/private")
    with pytest.raises(grafts.CheckpointError, match="is gated: ask for access"):
        ready().load_adapter("someone/gated")
    with pytest.raises(grafts.CheckpointError, match="no repository 'someone/nothing'"):
        ready().load_adapter("someone/nothing", token=TOKEN)
    for options in ({"token": TOKEN}, {"adapter_kwargs": {"token": TOKEN}}):
        for name in ("someone/private", "someone/gated"):
            model = ready()
            model.load_adapter(name, **options)
            assert_rounded(logits(model), expected)


def test_adapter_in_a_subfolder_and_a_cache_of_ones_own(hub: Hub, tmp_path: Path) -> None:
    files, expected = adapter(1)
    hub.add("someone/many", {f"french/{name}": data for name, data in files.items()} | {"README.md": b"many"})
    model = ready()
    model.load_adapter("someone/many", adapter_kwargs={"subfolder": "french", "cache_dir": tmp_path / "own"})
    assert_rounded(logits(model), expected)
    assert (tmp_path / "own").is_dir()
    with pytest.raises(grafts.CheckpointError, match=r"holds no adapter_config\.json, so no adapter"):
        ready().load_adapter("someone/many")
    with pytest.raises(grafts.CheckpointError, match=r"holds no adapter_config\.json in 'german'"):
        ready().load_adapter("someone/many", adapter_kwargs={"subfolder": "german"})


def test_broken_file_is_an_error_and_the_model_stays_as_it_was(hub: Hub) -> None:
    files, _ = adapter(1)
    hub.add("someone/cut", files | {"adapter_model.safetensors": files["adapter_model.safetensors"][:-7]})
    model = ready()
    before = logits(model)
    with pytest.raises(grafts.CheckpointError, match="not a whole safetensors file"):
        model.load_adapter("someone/cut")
    hub.add("someone/lora", files)
    hub.broken.add("adapter_model.safetensors")
    with pytest.raises(grafts.CheckpointError):
        model.load_adapter("someone/lora")
    assert model.peft_config == {}
    assert torch.equal(logits(model), before)
    hub.broken.clear()
    model.load_adapter("someone/lora")


def test_slow_answer_is_waited_for_and_one_that_is_too_slow_is_an_error(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, expected = adapter(1)
    hub.add("someone/lora", files)
    hub.slow["adapter_config.json"] = 0.3
    model = ready()
    model.load_adapter("someone/lora")
    assert_rounded(logits(model), expected)
    hub.add("someone/slow", files)
    hub.slow["adapter_model.safetensors"] = 3.0
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    other = ready()
    with pytest.raises(grafts.CheckpointError, match=r"did not answer in time|could not be read|not reached"):
        other.load_adapter("someone/slow", adapter_kwargs={"force_download": True})
    assert other.peft_config == {}


def test_pushed_adapter_has_a_card_and_loads_again(hub: Hub) -> None:
    model = ready()
    model.config._name_or_path = "someone/base"
    model.add_adapter(grafts.LoraConfig(r=4, task_type="CAUSAL_LM"))
    randomise(model, "default")
    about = grafts.About(
        data=("someone/data",), figures={"accuracy": 0.75}, license="apache-2.0", text="For tests."
    )
    url = model.push_to_hub(
        "someone/pushed", about=about, token=TOKEN, private=True, tags=["tiny"], commit_message="First"
    )
    repository = hub.repositories["someone/pushed"]
    sha = repository.refs["main"]
    assert url == f"{hub.url}/someone/pushed/commit/{sha}"
    assert repository.private
    assert repository.messages[-1] == "First"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(repository.commits[sha])
    other = ready()
    other.load_adapter("someone/pushed", token=TOKEN)
    assert_rounded(logits(other), logits(model))
    card = repository.commits[sha]["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["base_model"] == "someone/base"
    assert facts["datasets"] == ["someone/data"]
    assert facts["license"] == "apache-2.0"
    assert facts["library_name"] == "peft"
    assert set(facts["tags"]) == {"grafts", "lora", "tiny"}
    (result,) = facts["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": 0.75}]
    assert result["task"]["type"] == "text-generation"
    for said in (
        "Hu et al. 2021",
        "someone/base",
        "someone/data",
        "| accuracy | 0.75 |",
        "For tests.",
        "`r=4`",
    ):
        assert said in text
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.base_model == "someone/base"


def test_verbs_push_to_a_branch_and_a_subfolder(hub: Hub) -> None:
    model = BY_NAME["llama"].model()
    grafts.add(model, "ia3", name="small")
    randomise(model, "small")
    grafts.push(model, "small", "someone/verbs", revision="trial", subfolder="a/b", token=TOKEN)
    grafts.push(model, "small", "someone/verbs", revision="trial", subfolder="c", token=TOKEN)
    folder = grafts.fetch("someone/verbs", revision="trial", subfolder="a/b")
    other = BY_NAME["llama"].model()
    grafts.load(other, folder)
    assert_rounded(logits(other), logits(model))
    assert list(
        hub.repositories["someone/verbs"].commits[hub.repositories["someone/verbs"].refs["main"]]
    ) == [".gitattributes"]
    with pytest.raises(grafts.CheckpointError, match="could not be put into"):
        grafts.push(model, "small", "someone/verbs")
    with pytest.raises(grafts.AdapterNameError):
        grafts.push(model, "nobody", "someone/verbs", token=TOKEN)


def test_several_adapters_are_pushed_into_folders_of_their_names(hub: Hub, tmp_path: Path) -> None:
    model = ready()
    for name in ("en", "de"):
        model.add_adapter("lora", name)
    model.set_adapter(["en", "de"])
    model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="someone/both", token=TOKEN)
    held = hub.repositories["someone/both"].commits[hub.repositories["someone/both"].refs["main"]]
    assert {"en/adapter_config.json", "de/adapter_model.safetensors"} <= set(held)
    other = ready()
    other.load_adapter("someone/both", "de", adapter_kwargs={"subfolder": "de"})


def test_base_and_adapter_come_in_one_call(hub: Hub, tmp_path: Path) -> None:
    base = BY_NAME["llama"].model()
    base.save_pretrained(tmp_path / "base")
    content = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    repository = hub.add("someone/base", {})
    repository.refs["v2"] = repository.commit(content, "v2")
    model = ready()
    model.add_adapter(
        grafts.PromptTuningConfig(num_virtual_tokens=4, base_model_name_or_path="someone/base", revision="v2")
    )
    randomise(model, "default")
    hub.add("someone/prompt", checkpoint_files(model, "default"))
    whole = grafts.from_pretrained("someone/prompt")
    assert_rounded(logits(whole), logits(model))
    assert type(whole).__name__ == "LlamaForCausalLM"


def test_trainer_pushes_its_checkpoint(hub: Hub, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = ready()
    model.add_adapter("lora")
    rows = [{"input_ids": row, "labels": row} for row in bases.ids(8, 6)]
    options = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    pushed = {"push_to_hub": True, "hub_model_id": "someone/trained", "hub_token": TOKEN}
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path / "run"), **options, **pushed), train_dataset=rows
    )
    trainer.train()
    trainer.push_to_hub(token=TOKEN)
    held = hub.repositories["someone/trained"].commits[hub.repositories["someone/trained"].refs["main"]]
    assert "adapter_model.safetensors" in held
    assert "model.safetensors" not in held
    card = held["README.md"].decode()
    for said in ("Hu et al. 2021", "library_name: peft", "- lora", "learning_rate"):
        assert said in card
    other = ready()
    other.load_adapter("someone/trained")
    assert_rounded(logits(other), logits(model))


def test_saving_and_loading_a_folder_open_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = ready()
    model.config._name_or_path = "someone/base"
    model.add_adapter("lora")
    model.save_pretrained(tmp_path / "one")
    model.save_adapter(tmp_path / "two", "default")
    ready().load_adapter(tmp_path / "one")
    grafts.load(BY_NAME["llama"].model(), tmp_path / "two")
