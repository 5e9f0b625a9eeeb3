"""Merging several tensors of one shape into one: sums, and what must be dropped or agreed on before summing.

Task arithmetic (Ilharco et al. 2022), TIES (Yadav et al. 2023), DARE (Yu et al. 2023). Pure functions over
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grafts.errors import ConfigError

SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
SUMS = ("linear", *SPARSE)


@dataclass(frozen=True)
class TensorMerging:
    """How adapters are made into one.

    Attributes:
        method: its name, ``"linear"``, ``"cat"``, ``"svd"``, ``"ties"``, ``"ties_svd"`` ...
        rank: the rank of the result of the ``svd`` forms; None for the largest of the adapters'.
        density: the share of the values that the sparse forms keep, above 0 and at most 1.
        majority_sign: what the sign of the majority is told by in TIES: their ``"total"`` or their
            ``"frequency"``.
        generator: where the random choice of DARE comes from; None for PyTorch's own.
    """

    method: str
    rank: int | None = None
    density: float | None = None
    majority_sign: str = "total"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be.

        Raises:
            ConfigError: naming the option.
        """
        is_sparse = self.method.removesuffix("_svd") in SPARSE
        if self.density is None:
            if is_sparse:
                raise ConfigError(
                    f"{self.method!r} keeps a share of the values: give density, above 0 and at most 1"
                )
        elif not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density!r}; it must be above 0 and at most 1")
        elif not is_sparse:
            raise ConfigError(f"density has no meaning for {self.method!r}")
        if self.majority_sign not in ("total", "frequency"):
            raise ConfigError(f"majority_sign is {self.majority_sign!r}; it must be 'total' or 'frequency'")
        self._check_rank()

    def _check_rank(self) -> None:
        """Refuse a rank below 1, or for a way that has none.

        Raises:
            ConfigError: saying so.
        """
        if self.rank is None:
            return
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank!r}; it must be above 0")
        if not self.method.endswith("svd"):
            raise ConfigError(f"rank has no meaning for {self.method!r}")

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum of ``tensors`` in the way that the method has before its ``_svd``.

        Args:
            tensors: of one shape.
            weights: one for each.
        """
        way = self.method.removesuffix("_svd")
        if way in ("ties", "magnitude_prune"):
            tensors = [self._largest(tensor) for tensor in tensors]
        elif way in ("dare_linear", "dare_ties"):
            tensors = [self._dropped(tensor) for tensor in tensors]
        stack = torch.stack(list(tensors))
        factors = torch.tensor(weights, dtype=stack.dtype, device=stack.device)
        weighted = stack * factors.view(-1, *[1] * (stack.dim() - 1))
        if way not in ("ties", "dare_ties"):
            return weighted.sum(0)
        agreed = stack.sign() == self._majority(stack)
        return (weighted * agreed).sum(0) / agreed.sum(0).clamp_min(1)

    def _largest(self, tensor: Tensor) -> Tensor:
        """The values of largest magnitude (Yadav et al. 2023, section 3.1, "trim"); the others zero."""
        assert self.density is not None
        keep = int(self.density * tensor.numel())
        mask = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
        mask[tensor.abs().flatten().topk(keep).indices] = True
        return tensor * mask.view(tensor.shape)

    def _dropped(self, tensor: Tensor) -> Tensor:
        """Values dropped at random and the rest scaled up, so that nothing changes on average (Yu et al.
        2023, eq. 2).
        """
        assert self.density is not None
        chances = torch.full(tensor.shape, self.density, dtype=torch.float32)
        return tensor * torch.bernoulli(chances, generator=self.generator).to(tensor) / self.density

    def _majority(self, stack: Tensor) -> Tensor:
        """The sign that most of the mass, or most of the tensors, have at each place ("elect")."""
        if self.majority_sign == "total":
            votes = stack
        else:
            votes = stack.sign()
        total = votes.sum(0)
        return torch.where(total >= 0, 1.0, -1.0).to(stack)
