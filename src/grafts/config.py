"""The base of all adapter configs: frozen dataclasses whose fields are those of the ecosystem's
``adapter_config.json``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

from grafts.errors import ConfigError, did_you_mean

Names = str | tuple[str, ...] | None
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Which biases an adapter trains: none, those of its targets, or all; each trains what those before it train,
# and more.
Biases = Literal["none", "lora_only", "all"]
BIASES: tuple[Biases, ...] = ("none", "lora_only", "all")

C = TypeVar("C", bound="AdapterConfig")


def option(default: Any, help: str) -> Any:
    """A config field with its one-line documentation, which the command line and the docs show.

    Args:
        default: the field's value where it is not given; a list or a dictionary is copied for each config.
        help: one sentence: what it does, in which unit, and what values it may have.
    """
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def config(cls: type[C]) -> type[C]:
    """Make ``cls`` a config: a frozen keyword-only dataclass that answers an unknown field with the nearest
    known one.
    """
    config_class = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    initialise: Callable[..., None] = config_class.__init__

    @functools.wraps(initialise)
    def checked(self: C, **values: Any) -> None:
        peft_type = values.pop("peft_type", config_class.peft_type)
        if peft_type != config_class.peft_type:
            raise ConfigError(
                f"{config_class.__name__}.peft_type is {peft_type!r}; it must be "
                f"{config_class.peft_type!r}, or left out"
            )
        config_class.check_names(values)
        initialise(self, **values)

    config_class.__init__ = checked  # type: ignore[method-assign, assignment]
    return config_class


@dataclass(frozen=True)
class Auxiliary:
    """What an adapter trains beside its method's own parts, where its config has options for that.

    Attributes:
        biases: which biases of the base.
        tokens: rows of the input embedding, by token id; or names of embeddings -> ids; None for none.
        tie_weights: modules that share a target's or a copy's weight are adapted with it, as one.
    """

    biases: Biases = "none"
    tokens: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    tie_weights: bool = False


@dataclass(frozen=True)
class LayerSelection:
    """Which of a model's repeated layers targets may lie in.

    Attributes:
        indices: the numbers of the layers, from 0.
        lists: the names of the lists of layers that they count in; where there are none it is the first
            number in a target's path.
    """

    indices: tuple[int, ...]
    lists: tuple[str, ...]


@config
class AdapterConfig:
    """What every method's config has.

    Sequences are kept as tuples and sets as sorted tuples, so that equal configs compare equal and nothing
    can be changed behind the library's back.
    """

    target_modules: Names = option(
        None,
        "Which modules get an adapter: a list matches whole names or the ends of them, a string is a regular "
        "expression for the whole name, 'all-linear' is every linear layer but the output head and MoE "
        "routers; nothing lets the method choose from the model's structure.",
    )
    exclude_modules: Names = option(
        None, "Modules to leave out, a list or a regular expression like target_modules."
    )
    target_roles: tuple[str, ...] | None = option(
        None,
        "Instead of target_modules: what the modules are there for: q, k, v, o, intermediate, gate, output, "
        "embedding, head.",
    )
    modules_to_save: Names = option(
        None, "Modules (a classifier head) of which the adapter trains and saves a copy of its own."
    )
    task_type: str | None = option(
        None,
        f"One of {', '.join(TASK_TYPES)}; with SEQ_CLS and TOKEN_CLS the adapter gets its own copy of the "
        f"head.",
    )
    base_model_name_or_path: str | None = option(
        None, "Where the base model came from; written into the file."
    )
    revision: str | None = option(None, "The revision of the base model; written into the file.")
    inference_mode: bool = option(
        False, "Kept for files of other libraries; here activation and training are verbs."
    )
    auto_mapping: dict[str, Any] | None = option(None, "Kept for files of other libraries.")

    # The method's name in ``adapter_config.json``; may be given to the constructor, where it is checked.
    peft_type: ClassVar[str] = ""
    # Fields of the file format that this version does not implement, with the values that mean "not used".
    elsewhere: ClassVar[Mapping[str, Any]] = {}
    # Fields that the file format does not have; written only where they say something.
    own_fields: ClassVar[frozenset[str]] = frozenset({"target_roles"})
    # Fields that choose targets besides target_modules, and say nothing once those are named one by one.
    selecting_fields: ClassVar[frozenset[str]] = frozenset({"target_roles"})

    def __post_init__(self) -> None:
        """Bring sequences into one form and refuse values that cannot be.

        Raises:
            ConfigError: naming the field, its value, and what it may be.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (set, frozenset)):
                object.__setattr__(self, field.name, tuple(sorted(value)))
            elif isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            self.require(name, _are_names(getattr(self, name)), "a list of module names or a string")
        self._check_roles()
        known_task = self.task_type is None or self.task_type in TASK_TYPES
        self.require("task_type", known_task, f"one of {', '.join(TASK_TYPES)}")
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))

    def _check_roles(self) -> None:
        """Refuse roles that are no names, or that are given beside target_modules."""
        roles = self.target_roles
        if roles is None:
            return
        are_names = isinstance(roles, tuple) and len(roles) > 0 and _are_names(roles)
        self.require("target_roles", are_names, "a list of roles")
        self.require("target_roles", self.target_modules is None, "left out beside target_modules")

    def auxiliary(self) -> Auxiliary:
        """What the adapter trains beside its method's own parts; nothing, where a config has no such
        options.
        """
        return Auxiliary()

    def layer_selection(self) -> LayerSelection | None:
        """Which layers the targets may lie in; None for all, or where a config has no such option."""
        return None

    def for_modules(self, targets: tuple[str, ...] | None, copies: tuple[str, ...], biases: Biases) -> Self:
        """The same config for exactly these modules.

        Args:
            targets: the paths of the targets; None leaves the choice of targets as it is.
            copies: the paths of the modules of which the adapter trains a copy.
            biases: which biases it trains, where the config has that option.
        """
        changes: dict[str, Any] = {"modules_to_save": copies or None}
        if targets is not None:
            changes |= dict.fromkeys((*self.selecting_fields, "exclude_modules"))
            changes["target_modules"] = targets
        return dataclasses.replace(self, **changes)

    def require(self, field: str, holds: bool, may_be: str) -> None:
        """Refuse the value of ``field`` unless ``holds``.

        Raises:
            ConfigError: saying what the value is, and what it may be.
        """
        if not holds:
            raise ConfigError(
                f"{type(self).__name__}.{field} is {getattr(self, field)!r}; it must be {may_be}"
            )

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all fields, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Refuse the first name that is no field.

        Raises:
            ConfigError: naming the nearest field.
        """
        for name in names:
            if name not in cls.field_names():
                raise ConfigError(
                    f"{cls.__name__} has no field {name!r}; {did_you_mean(name, cls.field_names())}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, as in ``adapter_config.json`` (tuples as lists)."""
        data = {}
        for name in self.field_names():
            value = getattr(self, name)
            data[name] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A config from plain data; nothing in it is run, imported or opened.

        Fields that other versions of the format have are accepted while they say that their feature is not
        used.

        Raises:
            ConfigError: an option is asked for that this library does not have, or a value cannot be.
        """
        known = {}
        for name, value in data.items():
            if name in cls.field_names():
                known[name] = value
                continue
            is_off = value in (None, False) or value in ({}, [], "") or value == cls.elsewhere.get(name)
            if not is_off:
                raise ConfigError(
                    f"{cls.__name__} cannot honour {name}={value!r}: this version has no such option; "
                    f"{did_you_mean(name, cls.field_names())} (remove the entry if the adapter computes the "
                    f"same without it)"
                )
        return cls(**known)


def _are_names(value: object) -> bool:
    """Whether a value may name modules: nothing, a regular expression, or a tuple of names."""
    if value is None or isinstance(value, str):
        return True
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
