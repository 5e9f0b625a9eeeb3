"""Linears whose weight is a sum of Kronecker products (Zhang et al. 2021, eq. 4), for Compacter (Karimi et
al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grafts.errors import ConfigError
from grafts.sites.site import Reference


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
        """C, ``(n, n, n)``, or its factors, by their names in files.

        Args:
            shared: whether all layers use it, which then starts larger.
        """
        n = self.dim
        shapes = {"phm_rule": (n, n, n)}
        if self.factorized_rule:
            shapes = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        tensors = nn.ParameterDict()
        for name, shape in shapes.items():
            tensors[name] = nn.Parameter(torch.empty(shape))
        for tensor in tensors.values():
            if self.rule == "uniform":
                reach = 1.0 if shared else 0.01
                nn.init.uniform_(tensor, -reach, reach)
            else:
                nn.init.normal_(tensor, std=self.rule_range if shared else 0.01)
        return tensors

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
        tensors = nn.ParameterDict()
        for name, shape in shapes.items():
            tensors[name] = nn.Parameter(torch.empty(shape))
        for tensor in tensors.values():
            for matrix in tensor.data:
                if self.weights == "normal":
                    nn.init.normal_(matrix, std=self.rule_range)
                elif self.weights == "glorot-uniform":
                    nn.init.xavier_uniform_(matrix)
                else:
                    nn.init.xavier_normal_(matrix)
        return tensors


def product_of_factors(tensors: nn.ParameterDict, name: str) -> Tensor:
    """The tensor ``name``, made from its factors where it has some."""
    if name in tensors:
        tensor: Tensor = tensors[name]
        return tensor
    return torch.bmm(tensors[f"{name}_left"], tensors[f"{name}_right"])


class HypercomplexLinear(nn.Module):
    """``y = x H + b`` with ``H = sum_i C_i (x) W_i``.

    Attributes:
        rule: C, or empty where it is shared.
        weight: W, or empty where it is shared.
        b: ``(out,)``, or None.
    """

    def __init__(self, kind: Hypercomplex, inputs: int, outputs: int, rule: bool, weight: bool) -> None:
        super().__init__()
        self.kind = kind
        self.rule = kind.rule_tensors(shared=False) if rule else nn.ParameterDict()
        self.weight = kind.weight_tensors(inputs, outputs) if weight else nn.ParameterDict()
        self.b = nn.Parameter(torch.zeros(outputs)) if kind.bias else None
        # What all layers share, and the name of W there.
        self._shared: Reference[nn.ParameterDict] | None = None
        self._shared_name = "W"

    def share(self, tensors: nn.ParameterDict, name: str) -> None:
        """Use what is shared wherever there is none of its own; ``name`` is that of W there."""
        self._shared = Reference(tensors)
        self._shared_name = name

    def matrix(self) -> Tensor:
        """H, ``(in, out)``."""
        rule = self._own_or_shared(self.rule, "phm_rule", "phm_rule")
        weight = self._own_or_shared(self.weight, "W", self._shared_name)
        if not self.kind.learn_rule:
            rule = rule.detach()
        rows, columns = rule.shape[1] * weight.shape[1], rule.shape[2] * weight.shape[2]
        return torch.einsum("nab,ncd->acbd", rule, weight).reshape(rows, columns)

    def _own_or_shared(self, own: nn.ParameterDict, name: str, shared_name: str) -> Tensor:
        """A tensor of this linear, or that of all."""
        if len(own) > 0:
            return product_of_factors(own, name)
        assert self._shared is not None
        return product_of_factors(self._shared.module, shared_name)

    def forward(self, x: Tensor) -> Tensor:
        """``(*batch, in)`` -> ``(*batch, out)``."""
        y = x @ self.matrix().to(x.dtype)
        if self.b is None:
            return y
        return y + self.b.to(x.dtype)
