"""What adding an adapter would do: pure data, printable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Size, nn

from grafts.config import AdapterConfig
from grafts.methods._registry import Method
from grafts.modules.patterns import collapsed
from grafts.sites.module import ModuleSite
from grafts.sites.site import Part, Site
from grafts.structure.interface import AdapterModelInterface

# What tells a target from the others of its adapter: its path, its kind, and its member's number.
Key = tuple[str, str, int]
# The kinds of targets that are no method's: a copy of a module, trained biases, trained rows of an embedding.
AUXILIARY_KINDS = ("copy", "bias", "tokens")


@dataclass(frozen=True)
class Target:
    """One module that gets a part of the adapter.

    Attributes:
        path: the module's path in the base model.
        kind: what is put there: the method's name, ``"copy"`` (`modules_to_save`), ``"bias"`` or
            ``"tokens"``.
        role: what the module is there for in the model.
        shape: the module's sizes, as a text for people.
        tensors: name in the checkpoint (after the module's path) -> shape of each tensor that the part holds.
        frozen: the names of those that are never trained.
        build: makes the part for the module, on the default device.
        tied_to: the path of the module whose part of the same kind this one shares, or None.
        site: the kind of site that the part stands at.
        member: of an adapter that is made of several, the number of the one that it belongs to.
    """

    path: str
    kind: str
    role: str
    shape: str
    tensors: Mapping[str, Size]
    build: Callable[[nn.Module], Part] = field(repr=False, compare=False)
    tied_to: str | None = None
    site: type[Site] = field(default=ModuleSite, repr=False)
    member: int = 0
    frozen: frozenset[str] = frozenset()

    @property
    def key(self) -> Key:
        """What tells it from the other targets of the adapter: where it is, what it is, and of which member
        of a union.
        """
        return self.path, self.kind, self.member

    @property
    def is_own(self) -> bool:
        """Whether its part is one that the method makes, and its tensors are not those of another target
        whose weight it shares.
        """
        return self.kind not in AUXILIARY_KINDS and self.tied_to is None

    @property
    def parameters(self) -> int:
        """How many parameters of its own the part trains; 0 for one that follows another target, with whose
        tensors it computes.
        """
        if self.tied_to is not None:
            return 0
        return sum(math.prod(shape) for name, shape in self.tensors.items() if name not in self.frozen)


class PlanRow(NamedTuple):
    """The same target of repeated layers, as one row of a table.

    Attributes:
        module: its path, the number of the layer as ``*``.
        role: what it is there for.
        shape: its sizes.
        part: what is put there.
        times: how many there are.
        parameters: of all of them.
    """

    module: str
    role: str
    shape: str
    part: str
    times: int
    parameters: int


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
    method: Method[Any]
    targets: tuple[Target, ...]
    interface: AdapterModelInterface | None = field(default=None, repr=False)
    members: tuple[Plan, ...] = field(default=(), repr=False)

    @property
    def single_plans(self) -> tuple[Plan, ...]:
        """The plans of single methods that it is made of: its members where it is of a union, else itself
        alone.
        """
        return self.members or (self,)

    @property
    def parameters(self) -> int:
        """How many parameters the adapter would train, each counted once however many targets use it; without
        those that a method keeps frozen.
        """
        return sum(target.parameters for target in self.targets)

    def rows(self) -> list[PlanRow]:
        """The targets with repeated layers as one row: those that differ in the number of their layer only.

        Returns:
            The rows, in the order of the first target of each.
        """
        counts: dict[tuple[str, str, str, str, int], int] = {}
        for target in self.targets:
            group = (collapsed(target.path), target.role, target.shape, target.kind, target.parameters)
            counts[group] = counts.get(group, 0) + 1
        rows = []
        for (module, role, shape, kind, parameters), count in counts.items():
            rows.append(PlanRow(module, role, shape, kind, count, parameters * count))
        return rows

    def summary(self) -> str:
        """One line of totals: the method, how many parameters in how many modules, and what share of the base
        that is.
        """
        share = self.parameters / max(self.base_parameters, 1)
        return (
            f"{self.method.title}: {self.parameters:,} trainable parameters in {len(self.targets)} modules, "
            f"{share:.2%} of {self.model_name}'s {self.base_parameters:,}"
        )

    def __str__(self) -> str:
        """The plan as a table in plain text."""
        table: list[tuple[str, ...]] = [("module", "role", "shape", "part", "count", "parameters")]
        for row in self.rows():
            table.append((*row[:4], str(row.times), f"{row.parameters:,}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for *texts, count, parameters in table:
            cells = [text.ljust(width) for text, width in zip(texts, widths, strict=False)]
            # Numbers stand under each other by their last digit.
            cells += [count.rjust(widths[-2]), parameters.rjust(widths[-1])]
            lines.append("  ".join(cells).rstrip())
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([lines[0], rule, *lines[1:], self.summary()])
