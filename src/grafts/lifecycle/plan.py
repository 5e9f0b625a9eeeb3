"""What adding an adapter would do: pure data, printable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from grafts.config import AdapterConfig
from grafts.methods._registry import Method
from grafts.modules.patterns import collapsed
from grafts.sites.module import ModuleSite
from grafts.sites.site import Part, Site
from grafts.structure.interface import AdapterModelInterface

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Target:
    """One module that gets a part of the adapter.

    Attributes:
        path: the module's path in the base model.
        kind: what is put there: the method's name, ``"copy"`` (`modules_to_save`) or ``"bias"``.
        role: what the module is there for in the model.
        shape: the module's sizes, for people.
        tensors: name in the checkpoint (after the module's path) -> shape of each tensor that the part holds.
        build: makes the part for the module, on the default device.
        tied_to: the path of the module whose part of the same kind this one shares, or None.
        site: the kind of site that the part stands at.
        member: of an adapter that is made of several, the number of the one that it belongs to.
    """

    path: str
    kind: str
    role: str
    shape: str
    tensors: Mapping[str, torch.Size]
    build: Callable[[nn.Module], Part] = field(repr=False, compare=False)
    tied_to: str | None = None
    site: type[Site] = field(default=ModuleSite, repr=False)
    member: int = 0

    @property
    def key(self) -> Key:
        """What tells it from the other targets of the adapter."""
        return self.path, self.kind, self.member

    @property
    def parameters(self) -> int:
        """How many parameters of its own the part holds."""
        return 0 if self.tied_to is not None else sum(math.prod(shape) for shape in self.tensors.values())


@dataclass(frozen=True)
class Plan:
    """What adding an adapter would do; nothing has been touched.

    Attributes:
        model_name: class of the base model.
        base_parameters: how many parameters the base holds.
        config: the config that was resolved.
        method: its method.
        targets: every part that would be made, in the model's order.
        interface: what the model's modules were taken for, where that was given or inferred.
        members: the plans of those that the adapter is made of, where it is a union.
    """

    model_name: str
    base_parameters: int
    config: AdapterConfig
    method: Method
    targets: tuple[Target, ...]
    interface: AdapterModelInterface | None = field(default=None, repr=False)
    members: tuple[Plan, ...] = field(default=(), repr=False)

    def each(self) -> tuple[Plan, ...]:
        """The plans of the single methods: its members, or itself."""
        return self.members or (self,)

    @property
    def parameters(self) -> int:
        """How many parameters the adapter would hold."""
        return sum(target.parameters for target in self.targets)

    def rows(self) -> list[tuple[str, str, str, str, int, int]]:
        """The targets with repeated layers as one row: module, role, shape, kind, how many, parameters in
        all.
        """
        groups: dict[tuple[str, str, str, str, int], int] = {}
        for target in self.targets:
            key = (collapsed(target.path), target.role, target.shape, target.kind, target.parameters)
            groups[key] = groups.get(key, 0) + 1
        return [(*key[:4], count, key[4] * count) for key, count in groups.items()]

    def summary(self) -> str:
        """One line of totals."""
        share = self.parameters / max(self.base_parameters, 1)
        return (
            f"{self.method.title}: {self.parameters:,} trainable parameters in {len(self.targets)} modules, "
            f"{share:.2%} of {self.model_name}'s {self.base_parameters:,}"
        )

    def __str__(self) -> str:
        """The plan as a table in plain text."""
        head = ("module", "role", "shape", "part", "count", "parameters")
        rows = [head, *((*row[:4], str(row[4]), f"{row[5]:,}") for row in self.rows())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.rjust(w) if i >= 4 else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(
            [
                lines[0].rstrip(),
                "  ".join("-" * w for w in widths),
                *map(str.rstrip, lines[1:]),
                self.summary(),
            ]
        )
