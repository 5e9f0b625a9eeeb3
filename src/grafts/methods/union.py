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
        fits = len(self.configs) > 0 and all(isinstance(one, AdapterConfig) for one in self.configs)
        self.require("configs", fits, "a list of configs")
        self.require(
            "configs",
            not any(isinstance(one, UnionConfig) for one in self.configs),
            "a list of configs that are no unions",
        )
        for field in ("target_modules", "exclude_modules", "modules_to_save", "target_roles"):
            self.require(
                field, getattr(self, field) is None, "given to the configs of the union, not to itself"
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""
        each = [{"peft_type": one.peft_type, **one.to_dict()} for one in self.configs]
        return {**super().to_dict(), "configs": each}

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
        each = data.get("configs")
        if not isinstance(each, (list, tuple)) or not all(
            isinstance(one, Mapping) and "peft_type" in one for one in each
        ):
            raise ConfigError("a union's configs are a list, each with its peft_type")
        made = tuple(
            method_named(str(one["peft_type"])).config.from_dict(
                {k: v for k, v in one.items() if k != "peft_type"}
            )
            for one in each
        )
        return super().from_dict({**data, "configs": made})


def members(config: UnionConfig) -> Sequence[AdapterConfig]:
    """The configs that it is made of."""
    for one in config.configs:
        method_of(one)
    return config.configs


@method(
    "union",
    title="Union",
    config=UnionConfig,
    layers=set(),
    default_roles=(),
    inert=False,
    mergeable=False,
    source="He et al. 2021, https://arxiv.org/abs/2110.04366",
    members=members,
)
def union_part(config: UnionConfig, place: Place) -> Part:
    """Never called: a union's parts are those of its members."""
    raise AssertionError(place.path)
