"""Unions: one adapter made of several methods, as MAM (He et al. 2021) and UniPELT (Mao et al. 2022) are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from grafts.config import AdapterConfig, config, option
from grafts.errors import ConfigError
from grafts.methods._registry import Place, method, method_named, method_of
from grafts.sites.site import Part


@config
class UnionConfig(AdapterConfig):
    """What a union is: several configs under one name; their parts act, are trained, saved and deleted
    together.

    >>> from grafts import LoraConfig, BnConfig
    >>> len(UnionConfig(configs=[LoraConfig(), BnConfig()]).configs)
    2
    """

    configs: tuple[AdapterConfig, ...] = option((), "The configs, none of them a union.")

    peft_type: ClassVar[str] = "UNION"

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        are_configs = all(isinstance(config, AdapterConfig) for config in self.configs)
        self.require("configs", len(self.configs) > 0 and are_configs, "a list of configs")
        has_unions = any(isinstance(config, UnionConfig) for config in self.configs)
        self.require("configs", not has_unions, "a list of configs that are no unions")
        for field in ("target_modules", "exclude_modules", "modules_to_save", "target_roles"):
            self.require(
                field, getattr(self, field) is None, "given to the configs of the union, not to itself"
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""
        configs = [{"peft_type": config.peft_type, **config.to_dict()} for config in self.configs]
        return {**super().to_dict(), "configs": configs}

    @classmethod
    def from_configs(cls, configs: Sequence[AdapterConfig]) -> Self:
        """A union of these."""
        values: dict[str, Any] = {"configs": tuple(configs)}
        return cls(**values)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A config from plain data.

        Raises:
            ConfigError: one of the configs names no method.
        """
        entries = data.get("configs")
        if not isinstance(entries, (list, tuple)):
            raise _not_a_list()
        configs = []
        for entry in entries:
            if not isinstance(entry, Mapping) or "peft_type" not in entry:
                raise _not_a_list()
            values = {}
            for name, value in entry.items():
                if name != "peft_type":
                    values[name] = value
            configs.append(method_named(str(entry["peft_type"])).config.from_dict(values))
        return super().from_dict({**data, "configs": tuple(configs)})


def _not_a_list() -> ConfigError:
    return ConfigError("a union's configs are a list, each with its peft_type")


def members(config: UnionConfig) -> Sequence[AdapterConfig]:
    """The configs that it is made of.

    Raises:
        ConfigError: one of them is not the config of a registered method.
    """
    for member in config.configs:
        method_of(member)
    return config.configs


def example(**changes: Any) -> UnionConfig:
    """A union of a bottleneck and LoRA, with these changes in both."""
    names = ("bottleneck", "lora")
    return UnionConfig.from_configs([method_named(name).example(**changes) for name in names])


@method(
    "union",
    title="Union",
    config=UnionConfig,
    layers=set(),
    default_roles=(),
    inert=False,
    mergeable=False,
    source="He et al. 2021, https://arxiv.org/abs/2110.04366",
    example=example,
    members=members,
)
def union_part(config: UnionConfig, place: Place) -> Part:
    """Never called: a union's parts are those of its members."""
    raise AssertionError(place.path)
