"""Linears whose weight is a sum of Kronecker products (Zhang et al. 2021, eq. 4), for Compacter (Karimi et
al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grafts.errors import ConfigError


@dataclass(frozen=True)
class Hypercomplex:
    """How such a weight is made.

    Attributes:
        dim: n, how many products are summed.
        rank: of the factors of each W_i, where it is factorized.
        factorized: whether W_i is a product of two thin matrices.
        factorized_rule: whether each C_i is a product of a column and a row.
        rule_range: the deviation of C_i at the start, where it is shared.
        learn_rule: whether C is trained.
        rule: ``"normal"`` or ``"uniform"``, how C_i starts.
        weights: ``"glorot-normal"``, ``"glorot-uniform"`` or ``"normal"``, how W_i starts.
        bias: whether a bias is added.
    """

    dim: int
    rank: int
    factorized: bool
    factorized_rule: bool
    rule_range: float
    learn_rule: bool
    rule: str
    weights: str
    bias: bool

    def rule_tensors(self, shared: bool) -> nn.ParameterDict:
        """C, ``(n, n, n)``, or its factors, by their names in files."""
        n = self.dim
        shapes = {"phm_rule": (n, n, n)}
        if self.factorized_rule:
            shapes = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        made = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        for tensor in made.values():
            reach = (
                (1.0 if shared else 0.01) if self.rule == "uniform" else (self.rule_range if shared else 0.01)
            )
            (
                nn.init.uniform_(tensor, -reach, reach)
                if self.rule == "uniform"
                else nn.init.normal_(tensor, std=reach)
            )
        return made

    def weight_tensors(self, inputs: int, outputs: int, prefix: str = "W") -> nn.ParameterDict:
        """W, ``(n, in / n, out / n)``, or its factors, by their names in files.

        Raises:
            ConfigError: a size is no multiple of n.
        """
        n = self.dim
        if inputs % n or outputs % n:
            raise ConfigError(
                f"phm_dim={n} has to divide both sizes of each linear, and one is {inputs} -> {outputs}"
            )
        shapes: dict[str, tuple[int, int, int]] = {prefix: (n, inputs // n, outputs // n)}
        if self.factorized:
            shapes = {
                f"{prefix}_left": (n, inputs // n, self.rank),
                f"{prefix}_right": (n, self.rank, outputs // n),
            }
        made = nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
        for tensor in made.values():
            for one in tensor.data:
                if self.weights == "normal":
                    nn.init.normal_(one, std=self.rule_range)
                else:
                    (nn.init.xavier_uniform_ if self.weights == "glorot-uniform" else nn.init.xavier_normal_)(
                        one
                    )
        return made


def whole(tensors: nn.ParameterDict, name: str) -> Tensor:
    """The tensor ``name``, made from its factors where it has some."""
    if name in tensors:
        one: Tensor = tensors[name]
        return one
    return torch.bmm(tensors[f"{name}_left"], tensors[f"{name}_right"])


class HypercomplexLinear(nn.Module):
    """``y = x H + b`` with ``H = sum_i C_i (x) W_i``.

    Attributes:
        rule: C, or empty where it is shared.
        weight: W, or empty where it is shared.
        b: ``(out,)``, or None.
        shared_rule: whose C is used.
        shared_weight: whose W is used, and its name there.
    """

    def __init__(self, kind: Hypercomplex, inputs: int, outputs: int, rule: bool, weight: bool) -> None:
        super().__init__()
        self.kind = kind
        self.rule = kind.rule_tensors(shared=False) if rule else nn.ParameterDict()
        self.weight = kind.weight_tensors(inputs, outputs) if weight else nn.ParameterDict()
        self.b = nn.Parameter(torch.zeros(outputs)) if kind.bias else None
        self.shared: tuple[nn.ParameterDict, str] | None = None

    def share(self, tensors: nn.ParameterDict, name: str) -> None:
        """Use what is shared wherever there is none of its own; ``name`` is that of W there."""
        self.shared = tensors, name

    def matrix(self) -> Tensor:
        """H, ``(in, out)``."""
        tensors, name = self.shared if self.shared is not None else (self.rule, "W")
        rule = whole(self.rule if len(self.rule) else tensors, "phm_rule")
        weight = whole(self.weight, "W") if len(self.weight) else whole(tensors, name)
        if not self.kind.learn_rule:
            rule = rule.detach()
        return torch.einsum("nab,ncd->acbd", rule, weight).reshape(
            rule.shape[1] * weight.shape[1], rule.shape[2] * weight.shape[2]
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(*batch, in)`` -> ``(*batch, out)``."""
        y = x @ self.matrix().to(x.dtype)
        return y if self.b is None else y + self.b.to(x.dtype)
