"""The command line, on small models and files: what it leaves, what it prints, and one sentence for what is
wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

import grafts
from grafts.cli.main import main
from grafts.lifecycle.registry import parts_of
from grafts.methods import Method
from helpers import bases
from helpers.adapters import any_config

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["the", "a", "red", "blue", "fast", "slow", "cat", "dog", "runs", "sleeps", "web", "server", "game"]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a small BERT, Llama and T5, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("bert", bases.bert()), ("llama", bases.llama()), ("t5", bases.t5())):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


def rows(count: int = 24) -> list[dict[str, object]]:
    made = []
    for index in range(count):
        fast = index % 2
        words = [
            "the",
            "fast" if fast else "slow",
            ("cat", "dog", "game")[index % 3],
            "runs" if fast else "sleeps",
        ]
        tags = ["O", "SPEED", "THING", "O"]
        text, label = " ".join(words), "quick" if fast else "lazy"
        made.append(
            {
                "text": text,
                "label": label,
                "tokens": words,
                "tags": tags,
                "target": "fast" if fast else "slow",
            }
        )
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return file


def call(*arguments: object, status: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert (stop.value.code or 0) == status


def train(
    models: Path,
    data: Path,
    output: Path,
    *more: object,
    model: str = "bert",
    task: str = "sequence-classification",
) -> None:
    given = ["--model", models / model, "--task", task, "--train-file", data, "--output-dir", output]
    call("train", *given, "--max-length", 16, "--batch-size", 8, *more)


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("model", "task", "figure"),
    [
        ("bert", "sequence-classification", "accuracy"),
        ("bert", "token-classification", "accuracy"),
        ("llama", "sequence-classification", "accuracy"),
        ("llama", "causal-lm", "perplexity"),
        ("t5", "seq2seq-lm", "perplexity"),
    ],
)
def test_train_leaves_everything_and_predict_uses_it(
    model: str,
    task: str,
    figure: str,
    models: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    more = ["--validation-file", data, "--test-file", data, "--epochs", 8, "--learning-rate", 0.02, "--r", 4]
    if task == "causal-lm":
        more += ["--no-pack", "--modules-to-save", "lm_head"]
    train(models, data, output, *more, model=model, task=task)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "loss.png",
            "metrics.json",
            "report.html",
            "run.yaml",
        ]
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["test"] == metrics["validation"]
    good = metrics["test"][figure] > 0.9 if figure == "accuracy" else metrics["test"][figure] < 4
    assert good, metrics["test"]
    page = (output / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://", "").split("<svg")[0]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    call("predict", output, "the fast cat runs", "the slow dog sleeps", "--max-new-tokens", 3)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 2
    if task == "sequence-classification":
        assert [answer["label"] for answer in answers] == ["quick", "lazy"]
    if task == "token-classification":
        assert answers[0] == {"tokens": ["the", "fast", "cat", "runs"], "tags": ["O", "SPEED", "THING", "O"]}


def test_run_yaml_makes_the_same_run_again(models: Path, data: Path, tmp_path: Path) -> None:
    train(
        models,
        data,
        tmp_path / "one",
        "--max-steps",
        4,
        "--rank-pattern",
        "{query: 2}",
        "--target-modules",
        "query,value",
    )
    call("train", "--config", tmp_path / "one" / "run.yaml", "--output-dir", tmp_path / "two")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["rank_pattern"] == {"query": 2}


def test_mixed_precision_checkpointing_accumulation_and_given_labels_work_together(
    models: Path, data: Path, tmp_path: Path
) -> None:
    more = [
        "--precision",
        "bf16",
        "--gradient-checkpointing",
        "--gradient-accumulation-steps",
        2,
        "--labels",
        "quick,lazy",
    ]
    train(models, data, tmp_path / "run", "--epochs", 2, "--dtype", "bfloat16", *more)
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["labels"] == ["quick", "lazy"]


def test_adapter_of_peft_is_used_with_the_base_and_labels_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification

    from helpers.peers import peft

    base = AutoModelForSequenceClassification.from_pretrained(models / "bert")
    peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(
        tmp_path / "theirs"
    )
    call("predict", tmp_path / "theirs", "the cat", status=1)
    assert "does not name its labels" in printed(capsys)
    call("predict", tmp_path / "theirs", "the cat", "--labels", "a,b,c")
    assert json.loads(capsys.readouterr().out)["label"] in {"a", "b", "c"}


def test_every_method_trains_predicts_and_merges(
    method: Method, models: Path, data: Path, tmp_path: Path
) -> None:
    chosen = method.name if method.members is None else "seq_bn[reduction_factor=4]|lora"
    train(models, data, tmp_path / "run", "--epochs", 4, "--method", chosen, "--learning-rate", 0.01)
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert settings["method"] == chosen
    call("predict", tmp_path / "run", "the fast cat runs")
    merges = method.can_merge(any_config(method))
    call("merge", tmp_path / "run", tmp_path / "merged", status=0 if merges else 1)
    assert (tmp_path / "merged" / "model.safetensors").is_file() == merges


@pytest.mark.parametrize("name", ["adaption_prompt", "prefix_tuning", "prompt_tuning", "p_tuning"])
@pytest.mark.parametrize(
    ("model", "task"),
    [("bert", "token-classification"), ("llama", "causal-lm"), ("t5", "seq2seq-lm")],
    ids=["bert", "llama", "t5"],
)
def test_methods_inside_attention_and_in_front_of_the_input_serve_every_task(
    name: str,
    model: str,
    task: str,
    models: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--test-file", data, "--max-steps", 3, "--learning-rate", 0.02, "--method", name]
    train(models, data, tmp_path / "run", *more, model=model, task=task)
    capsys.readouterr()
    call("predict", tmp_path / "run", "the fast cat")
    assert capsys.readouterr().out.strip()


def test_trained_adapter_loads_from_python(models: Path, data: Path, tmp_path: Path) -> None:
    train(models, data, tmp_path / "run", "--max-steps", 2)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        models / "bert", num_labels=2, ignore_mismatched_sizes=True
    )
    assert grafts.load(model, tmp_path / "run").plan.parameters == sum(
        p.numel() for _, q in parts_of(model, "default") for p in q.parameters()
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json", ".txt"])
def test_other_kinds_of_file_are_read(suffix: str, models: Path, tmp_path: Path) -> None:
    import pandas

    file = tmp_path / f"train{suffix}"
    frame = pandas.DataFrame([{"text": row["text"], "label": row["label"]} for row in rows(8)])
    if suffix == ".parquet":
        frame.to_parquet(file)
    elif suffix == ".json":
        file.write_text(frame.to_json(orient="records"))
    elif suffix == ".txt":
        file.write_text("\n".join(frame["text"]))
    else:
        frame.to_csv(file, index=False, sep="\t" if suffix == ".tsv" else ",")
    task = ("llama", "causal-lm") if suffix == ".txt" else ("bert", "sequence-classification")
    train(models, file, tmp_path / "run", "--max-steps", 1, model=task[0], task=task[1])
    assert (tmp_path / "run" / "report.html").exists()


def test_merge_writes_a_plain_model_with_the_same_answers(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import pipeline

    train(models, data, tmp_path / "run", "--epochs", 6, "--learning-rate", 0.02)
    call("merge", tmp_path / "run", tmp_path / "plain")
    classify = pipeline("text-classification", str(tmp_path / "plain"))
    assert [answer["label"] for answer in classify(["the fast cat runs", "the slow dog sleeps"])] == [
        "quick",
        "lazy",
    ]
    call("merge", tmp_path / "run", tmp_path / "plain", status=1)
    assert "is there already" in printed(capsys)


def test_inspect_shows_the_plan_of_a_model_and_the_contents_of_an_adapter(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("inspect", models / "llama", "--target-modules", "all-linear", "--r", 2)
    shown = capsys.readouterr().out
    assert "LoRA: 928 trainable parameters in 14 modules" in shown
    assert "lm_head" not in shown
    model = grafts.add(bases.llama(), grafts.LoraConfig(r=2))
    grafts.save(model, "default", tmp_path / "adapter")
    call("inspect", tmp_path / "adapter")
    shown = capsys.readouterr().out
    assert "q_proj, v_proj" in shown
    assert "lora_A.weight" in shown
    assert "bytes" in shown


def test_predict_reads_files_and_writes_one(models: Path, data: Path, tmp_path: Path) -> None:
    train(models, data, tmp_path / "run", "--max-steps", 1)
    call("predict", tmp_path / "run", "--file", data, "--output", tmp_path / "out" / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == [row["text"] for row in rows()]


def broken(tmp_path: Path, name: str, content: str) -> Path:
    file = tmp_path / name
    file.write_text(content)
    return file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text-column", "txt"], "has no column 'txt'; did you mean 'text'"),
        (["--label-column", "lbel"], "has no column 'lbel'; did you mean 'label'"),
        (["--train-file", "nowhere.jsonl"], "no file 'nowhere.jsonl'"),
        (["--train-file", "EMPTY"], "is empty"),
        (["--train-file", "BROKEN"], "cannot be read as json"),
        (["--train-file", "ONE"], "has the label 'quick' in every row"),
        (["--train-file", "HOLE"], "row 2 has no value in column 'text'"),
        (["--train-file", "data.xls"], "no file 'data.xls'"),
        (["--train-file", "README"], "is of an unknown kind"),
        (["--test-file", "UNKNOWN"], "row 1 has the unknown label 'quik'; did you mean 'quick'"),
        (["--model", "no/such-model"], "there is no model 'no/such-model'"),
        (["--model", "FOLDER"], "is a folder without a config.json"),
        (["--task", "classification"], "no task is called 'classification'; did you mean"),
        (["--method", "lorra"], "no method is called 'lorra'; did you mean 'lora'"),
        (["--r", "0"], "LoraConfig.r is 0"),
        (["--target-modules", "q_proj"], "no module matches target_modules='q_proj'"),
        (["--precision", "int8"], "precision is 'int8'; it must be one of float32, bf16, fp16"),
        (["--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--config", "UNKNOWN_KEY"], "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        (["--config", "UNKNOWN_OPTION"], "LoraConfig has no field 'rnk'"),
        (["--config", "LIST"], "holds a list; it must hold settings by name"),
        (["--config", "TYPE"], "epochs is 'many'; it must be of type float"),
        (["--config", "nowhere.yaml"], "cannot read 'nowhere.yaml'"),
        (["--output-dir", "BROKEN"], "is a file; output_dir must be a folder"),
        (["--output-dir", "/proc/run"], "cannot write to '/proc'"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence_a_nonzero_exit_and_leaves_nothing(
    arguments: list[str],
    message: str,
    models: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = '{"text": "the cat", "label": "quick"}\n'
    made = {
        "EMPTY": broken(tmp_path, "empty.jsonl", ""),
        "BROKEN": broken(tmp_path, "broken.jsonl", '{"text": '),
        "ONE": broken(tmp_path, "one.jsonl", first * 3),
        "HOLE": broken(tmp_path, "hole.jsonl", first + '{"text": null, "label": "lazy"}\n'),
        "README": broken(tmp_path, "readme.docx", "x"),
        "UNKNOWN": broken(tmp_path, "unknown.jsonl", '{"text": "the cat", "label": "quik"}\n'),
        "FOLDER": tmp_path,
        "UNKNOWN_KEY": broken(tmp_path, "key.yaml", "lerning_rate: 1"),
        "UNKNOWN_OPTION": broken(tmp_path, "option.yaml", "adapter: {rnk: 1}"),
        "LIST": broken(tmp_path, "list.yaml", "- 1"),
        "TYPE": broken(tmp_path, "type.yaml", "epochs: many"),
    }
    given = {
        "--model": models / "bert",
        "--task": "sequence-classification",
        "--train-file": data,
        "--output-dir": tmp_path / "run",
    }
    given |= {arguments[0]: made.get(arguments[1], arguments[1])}
    call("train", *[word for pair in given.items() for word in pair], status=1)
    said = printed(capsys)
    assert said.startswith("error: ")
    assert message in said.replace("\n", " ")
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_debug_shows_where(models: Path, tmp_path: Path) -> None:
    with pytest.raises(grafts.GraftsError, match="no file"):
        main(
            [
                "train",
                "--model",
                "m",
                "--task",
                "causal-lm",
                "--train-file",
                "x.txt",
                "--output-dir",
                str(tmp_path / "r"),
                "--debug",
            ]
        )


def test_unknown_flag_is_a_usage_error() -> None:
    call("train", "--lerning-rate", 1, status=2)


def test_existing_run_is_kept_unless_overwriting(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(models, data, tmp_path / "run", "--max-steps", 1)
    call("train", "--config", tmp_path / "run" / "run.yaml", status=1)
    assert "--overwrite replaces it" in printed(capsys)
    call("train", "--config", tmp_path / "run" / "run.yaml", "--overwrite")


def test_disk_that_is_full_at_the_end_leaves_nothing(
    models: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    given = [
        "--model",
        models / "bert",
        "--task",
        "sequence-classification",
        "--train-file",
        data,
        "--max-steps",
        1,
    ]
    monkeypatch.setattr("grafts.checkpoints.atomic_write.os.fsync", full)
    call("train", *given, "--output-dir", tmp_path / "run", status=1)
    assert "No space left on device" in printed(capsys)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_every_flag_is_documented(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from grafts.cli.options import adapter_parameters, settings_parameters
    from grafts.cli.training.settings import RunSettings

    for parameter in [*settings_parameters(RunSettings), *adapter_parameters()]:
        assert parameter.annotation.__metadata__[0].help
    call("train", "--help")
    assert "--learning-rate" in capsys.readouterr().out


def test_settings_from_flags_win_over_the_file() -> None:
    from grafts.cli.training.settings import RunSettings

    fields = {"model": "m", "task": "t", "train_file": "f", "output_dir": "o"}
    file = Path(os.environ.get("TMPDIR", "/tmp")) / f"grafts-{os.getpid()}.yaml"
    file.write_text(
        yaml.safe_dump(fields | {"epochs": 2, "learning_rate": "3e-3", "adapter": {"r": 4, "bias": "all"}})
    )
    settings = RunSettings.combined(file, {"epochs": 5.0, "seed": None}, {"r": 16})
    file.unlink()
    assert (settings.epochs, settings.learning_rate, settings.seed) == (5.0, 3e-3, 0)
    assert settings.adapter == {"r": 16, "bias": "all"}


def test_two_processes_train_the_same_command(models: Path, data: Path, tmp_path: Path) -> None:
    """`torchrun` with two `gloo` processes; the one that is first writes."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "grafts",
        "train",
    ]
    given = [
        "--model",
        models / "bert",
        "--task",
        "sequence-classification",
        "--train-file",
        data,
        "--test-file",
        data,
    ]
    more = [
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        3,
        "--batch-size",
        4,
        "--max-length",
        16,
        "--device",
        "cpu",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [str(word) for word in [*launch, *given, *more]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("adapter and report are in") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["rows"] == 24
    assert sum(figures["rows"] for figures in metrics["test"]["classes"].values()) == 24


def test_inspect_prints_an_interface_ready_to_paste_and_plans_a_union(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("inspect", models / "bert", "--interface")
    text = capsys.readouterr().out
    code = text[: text.index("\n)") + 2]
    found = eval(code, {"AdapterModelInterface": grafts.AdapterModelInterface})
    assert found.layer_ln_2 == "output.LayerNorm"
    assert "seen" in text[len(code) :]
    call("inspect", models / "bert", "--method", "seq_bn[reduction_factor=4]|lora")
    assert "added to the stream" in capsys.readouterr().out
