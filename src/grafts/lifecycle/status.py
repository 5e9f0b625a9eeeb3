"""What the adapters of a model are and do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from grafts.config import AdapterConfig
from grafts.lifecycle.registry import find_registry, is_trainable, unwrapped


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a model: what it is, how large it is, and what it is doing.

    Attributes:
        name: what it is called.
        method: its method's title.
        config: its config.
        modules: at how many modules it has parts.
        parameters: how many it holds.
        active: it acts in the next call.
        trainable: some of its parameters get gradients.
        merged: it is folded into the base weights.
    """

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
        doing = []
        if self.active:
            doing.append("active")
        if self.trainable:
            doing.append("trainable")
        if self.merged:
            doing.append("merged")
        size = f"{self.parameters:,} parameters in {self.modules} modules"
        return f"{self.name}: {self.method}, {size}; {', '.join(doing) or 'idle'}"


def adapters(model: nn.Module) -> dict[str, AdapterStatus]:
    """The adapters of ``model`` by name, in the order of adding; empty where there are none.

    Args:
        model: any module, also in the wrapper of a compiler or of `DistributedDataParallel`.
    """
    registry = find_registry(unwrapped(model))
    if registry is None:
        return {}
    statuses = {}
    for name, plan in registry.plans.items():
        statuses[name] = AdapterStatus(
            name=name,
            method=plan.method.title,
            config=plan.config,
            modules=len({target.path for target in plan.targets}),
            parameters=plan.parameters,
            active=name in registry.setup.active,
            trainable=any(is_trainable(part) for _, part in registry.parts[name]),
            merged=name in registry.setup.merged,
        )
    return statuses
