"""The base of all adapter configs: frozen dataclasses whose fields are those of the ecosystem's
``adapter_config.json``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

from grafts.errors import ConfigError, did_you_mean

Names = str | tuple[str, ...] | None
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

C = TypeVar("C", bound="AdapterConfig")


def option(default: Any, help: str) -> Any:
    """A config field with its one-line documentation, which the command line and the docs show."""
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def config(cls: type[C]) -> type[C]:
    """Make ``cls`` a config: a frozen keyword-only dataclass that answers an unknown field with the nearest
    known one.
    """
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    initialise: Callable[..., None] = made.__init__

    @functools.wraps(initialise)
    def checked(self: C, **values: Any) -> None:
        kind = values.pop("peft_type", made.peft_type)
        if kind != made.peft_type:
            raise ConfigError(
                f"{made.__name__}.peft_type is {kind!r}; it must be {made.peft_type!r}, or left out"
            )
        made.check_names(values)
        initialise(self, **values)

    made.__init__ = checked  # type: ignore[method-assign, assignment]
    return made


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
        roles = self.target_roles
        named = roles is None or (
            isinstance(roles, tuple) and bool(roles) and all(isinstance(name, str) for name in roles)
        )
        self.require("target_roles", named, "a list of roles")
        self.require(
            "target_roles", roles is None or self.target_modules is None, "left out beside target_modules"
        )
        self.require(
            "task_type",
            self.task_type is None or self.task_type in TASK_TYPES,
            f"one of {', '.join(TASK_TYPES)}",
        )
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))

    def require(self, field: str, holds: bool, may_be: str) -> None:
        """Refuse the value of ``field`` unless ``holds``."""
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
        values = {name: getattr(self, name) for name in self.field_names()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A config from plain data; nothing in it is run, imported or opened.

        Fields that other versions of the format have are accepted while they say that their feature is not
        used.

        Raises:
            ConfigError: an option is asked for that this library does not have, or a value cannot be.
        """
        known = {name: value for name, value in data.items() if name in cls.field_names()}
        for name, value in data.items():
            unused = value in (None, False) or value in ({}, [], "") or value == cls.elsewhere.get(name)
            if name not in known and not unused:
                raise ConfigError(
                    f"{cls.__name__} cannot honour {name}={value!r}: this version has no such option; "
                    f"{did_you_mean(name, cls.field_names())} (remove the entry if the adapter computes the "
                    f"same without it)"
                )
        return cls(**known)


def _are_names(value: object) -> bool:
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))
    )
