"""What the adapters of a model are and do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from grafts.config import AdapterConfig
from grafts.lifecycle.registry import find_registry, parts_of, unwrapped


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a model: its method's title, how large it is, and what it is doing."""

    name: str
    method: str
    config: AdapterConfig
    modules: int
    parameters: int
    active: bool
    trainable: bool
    merged: bool

    def __str__(self) -> str:
        """One line."""
        doing = [word for word in ("active", "trainable", "merged") if getattr(self, word)]
        size = f"{self.parameters:,} parameters in {self.modules} modules"
        return f"{self.name}: {self.method}, {size}; {', '.join(doing) or 'idle'}"


def adapters(model: nn.Module) -> dict[str, AdapterStatus]:
    """The adapters of ``model`` by name, in the order of adding; empty where there are none."""
    inner = unwrapped(model)
    registry = find_registry(inner)
    if registry is None:
        return {}
    return {
        name: AdapterStatus(
            name=name,
            method=made.method.title,
            config=made.config,
            modules=len({target.path for target in made.targets}),
            parameters=made.parameters,
            active=name in registry.setup.active,
            trainable=any(p.requires_grad for _, part in parts_of(inner, name) for p in part.parameters()),
            merged=name in registry.setup.merged,
        )
        for name, made in registry.plans.items()
    }
