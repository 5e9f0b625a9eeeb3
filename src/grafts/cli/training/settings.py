"""The settings of a run: one dataclass that is the flags of ``grafts train``, the keys of its YAML file, and
their help.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, RunError, did_you_mean
from grafts.methods._presets import USUAL, config_from
from grafts.methods._registry import method_named, method_names, method_of

MODEL, DATA, TRAINING, OUTPUT = "Model and adapter", "Data", "Training", "Output"


def setting(default: Any, panel: str, help: str) -> Any:
    """A field with the panel in which its help is shown."""
    return dataclasses.field(default=default, metadata={"panel": panel, "help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that a run depends on; ``run.yaml`` holds it."""

    model: str = setting("", MODEL, "The base model: a folder, or an id on the Hugging Face hub.")
    task: str = setting("", MODEL, "sequence-classification, token-classification, causal-lm or seq2seq-lm.")
    method: str = setting(
        USUAL,
        MODEL,
        "The kind of adapter, its options being flags; or a preset or union: "
        "seq_bn[reduction_factor=8]|lora.",
    )
    adapter: dict[str, Any] | None = setting(
        None, MODEL, "In YAML: the adapter's options, as in adapter: {r: 8}."
    )
    dtype: str = setting("float32", MODEL, "What the base is held in: float32, bfloat16 or float16.")

    train_file: str = setting("", DATA, "Training data: .jsonl, .json, .csv, .tsv, .parquet or .txt.")
    validation_file: str | None = setting(None, DATA, "Data for figures after each epoch.")
    test_file: str | None = setting(None, DATA, "Data for the figures at the end.")
    text_column: str | None = setting(
        None, DATA, "Column of the input: 'text', for token-classification 'tokens'."
    )
    text_pair_column: str | None = setting(None, DATA, "Column of a second text, for classifying pairs.")
    label_column: str | None = setting(
        None, DATA, "Column of the label: 'label', for token-classification 'tags'."
    )
    target_column: str | None = setting(None, DATA, "Column of the output text for seq2seq-lm: 'target'.")
    labels: list[str] | None = setting(
        None, DATA, "The labels in order, with commas; found in the training data if not given."
    )
    max_length: int = setting(128, DATA, "Tokens of an input; what is longer is cut.")
    max_target_length: int = setting(128, DATA, "Tokens of an output text; what is longer is cut.")
    pack: bool = setting(
        True, DATA, "For causal-lm: join the texts and cut blocks of max_length, instead of one text a row."
    )

    epochs: float = setting(3.0, TRAINING, "How often to go through the training data.")
    max_steps: int | None = setting(None, TRAINING, "Stop after this many steps, whatever the epochs.")
    learning_rate: float = setting(1e-3, TRAINING, "The highest learning rate.")
    lr_scheduler: str = setting(
        "linear", TRAINING, "Its course, by the names of transformers: linear, cosine, constant ..."
    )
    warmup_steps: int = setting(0, TRAINING, "Steps over which it rises from zero.")
    weight_decay: float = setting(0.0, TRAINING, "AdamW's weight decay.")
    batch_size: int = setting(32, TRAINING, "Rows a step on each device.")
    eval_batch_size: int = setting(64, TRAINING, "Rows at a time when not training.")
    gradient_accumulation_steps: int = setting(1, TRAINING, "Batches that make one step.")
    gradient_checkpointing: bool = setting(False, TRAINING, "Compute activations twice to save memory.")
    precision: str = setting(
        "float32", TRAINING, "What to compute in: float32, or bf16 or fp16 through autocast."
    )
    seed: int = setting(0, TRAINING, "Seed of everything random.")
    device: str = setting("auto", TRAINING, "auto (a GPU where there is one) or cpu.")

    output_dir: str = setting("", OUTPUT, "Where adapter, figures, settings, picture and report go.")
    overwrite: bool = setting(False, OUTPUT, "Write into output_dir although it holds a run already.")

    def __post_init__(self) -> None:
        """Refuse values that cannot be.

        Raises:
            RunError: naming the setting, its value and what it may be.
        """
        for name in _REQUIRED:
            if not getattr(self, name):
                raise RunError(
                    f"{name} is not given: use --{name.replace('_', '-')} or {name}: in the YAML file"
                )
        for name, values in _MAY_BE.items():
            if getattr(self, name) not in values:
                raise RunError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in _ABOVE_ZERO:
            # Asked this way round, so that what is no number at all is refused too.
            if not getattr(self, name) > 0:
                raise RunError(f"{name} is {getattr(self, name)}; it must be above 0")

    def adapter_config(self, task_type: str) -> AdapterConfig:
        """The adapter's config; ``target_modules`` is every linear layer unless the settings say otherwise.

        Raises:
            ConfigError: an option is unknown or cannot be.
        """
        options = {"task_type": task_type} | (self.adapter or {})
        if self.method not in method_names():
            return self._from_text(options)
        method = method_named(self.method)
        config_class: type[AdapterConfig] = method.config
        config_class.check_names(options)
        values: dict[str, Any] = dict(options)
        if "linear" in method.layers and "target_roles" not in options:
            values.setdefault("target_modules", "all-linear")
        try:
            return config_class(**values)
        except TypeError as error:
            raise ConfigError(f"adapter options {self.adapter}: {error}") from error

    def _from_text(self, options: Mapping[str, Any]) -> AdapterConfig:
        """The config of a preset or a union; the first part of a union gets the head.

        Raises:
            ConfigError: an option is unknown or cannot be.
        """
        config = config_from(self.method)
        config.check_names(options)
        members_of = method_of(config).members
        if members_of is None:
            return dataclasses.replace(config, **options)
        if self.adapter:
            raise ConfigError(
                f"options of {self.method!r} stand in brackets behind the name of the part that they belong "
                f"to"
            )
        first, *others = members_of(config)
        members: dict[str, Any] = {"configs": (dataclasses.replace(first, **options), *others)}
        return dataclasses.replace(config, **members, **options)

    @classmethod
    def combined(cls, file: Path | None, flags: Mapping[str, Any], adapter_flags: Mapping[str, Any]) -> Self:
        """Settings from a YAML file and flags, the flags winning.

        Raises:
            RunError: the file cannot be read, or a key or value in it cannot be.
        """
        values = dict(read_yaml(file)) if file is not None else {}
        fields = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise RunError(
                    f"{str(file)!r} holds an unknown key {key!r}; {did_you_mean(str(key), fields)}"
                )
        if not isinstance(values.get("adapter"), (dict, type(None))):
            raise RunError(f"{str(file)!r}: adapter is {values['adapter']!r}; it must be options by name")
        # Flags that were not given are None, and leave what the file says.
        values |= _without_none(flags)
        values["adapter"] = (values.get("adapter") or {}) | _without_none(adapter_flags)
        hints = typing.get_type_hints(cls)
        return cls(**{key: as_type(key, value, hints[key]) for key, value in values.items()})

    def to_yaml(self) -> str:
        """The settings as a file for ``--config``, in the order in which the help shows them; those that are
        not used are left out.
        """
        values = _without_none(dataclasses.asdict(self))
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


# The settings without which there is no run.
_REQUIRED = ("model", "task", "train_file", "output_dir")
# Settings of which there are only some values.
_MAY_BE = {
    "dtype": ("float32", "bfloat16", "float16"),
    "precision": ("float32", "bf16", "fp16"),
    "device": ("auto", "cpu"),
}
# Settings that count something.
_AT_LEAST_ONE = (
    "max_length",
    "max_target_length",
    "batch_size",
    "eval_batch_size",
    "gradient_accumulation_steps",
)
_ABOVE_ZERO = ("epochs", "learning_rate")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are something."""
    return {key: value for key, value in values.items() if value is not None}


def read_yaml(file: Path) -> Mapping[str, Any]:
    """A YAML file that holds one mapping; an empty file holds an empty one.

    Args:
        file: the file.

    Raises:
        RunError: it is not there, or holds something else.
    """
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {str(file)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{str(file)!r} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RunError(f"{str(file)!r} holds a {type(values).__name__}; it must hold settings by name")
    return values


def as_type(name: str, value: Any, hint: Any) -> Any:
    """``value`` in the type that the setting has; YAML reads ``3e-3`` as text, and whole numbers may be meant
    as fractions.

    Raises:
        RunError: it does not fit.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in options:
        return None
    # Of ``list[str] | None`` the list.
    kind = typing.get_origin(options[0]) or options[0]
    result = value
    if kind is float:
        result = _as_fraction(value)
    elif kind is list:
        result = _as_texts(value)
    # A yes or no is a whole number to Python, and none to people.
    is_confused = kind is int and isinstance(result, bool)
    if isinstance(result, kind) and not is_confused:
        return result
    raise RunError(f"{name} is {value!r}; it must be of type {kind.__name__}")


def _as_fraction(value: Any) -> Any:
    """A whole number, or a text that is a number, as a fraction; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _as_texts(value: Any) -> Any:
    """A text with commas, or a list of texts and numbers, as a list of texts; other values as they are."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",")]
    if isinstance(value, list) and all(isinstance(item, (str, int)) for item in value):
        return [str(item) for item in value]
    return value
