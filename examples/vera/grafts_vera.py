"""VeRA: one frozen random projection for all layers, and two trained vectors for each.

Kopiczko, Blankevoort, Asano, "VeRA: Vector-based Random Matrix Adaptation", 2023,
https://arxiv.org/abs/2310.11454. A method from outside of grafts: it imports `grafts.methods` and nothing
else of it, and is found through the entry point in ``pyproject.toml``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from grafts.methods import (
    AdapterConfig,
    FileTarget,
    ModulePart,
    PackedFiles,
    Part,
    Parts,
    Place,
    Reference,
    config,
    method,
    option,
    roles,
)


@config
class VeraConfig(AdapterConfig):
    """What a VeRA adapter is; the names of the fields are those of `peft`'s files.

    >>> VeraConfig(r=64, target_modules=["q_proj", "v_proj"]).d_initial
    0.1
    """

    r: int = option(256, "The rank of the projection; it costs no trained parameters but one vector a layer.")
    projection_prng_key: int = option(0, "The seed that the projection is made from.")
    save_projection: bool = option(
        True, "Write the projection into the file; without it, it is made again from the seed."
    )
    vera_dropout: float = option(0.0, "Dropout on the input of the update, while training.")
    d_initial: float = option(0.1, "What the vector in the rank starts with.")

    peft_type: ClassVar[str] = "VERA"
    # Options of `peft`'s files that this package does not have, with the values that mean "not used".
    elsewhere: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("r", isinstance(self.r, int) and self.r > 0, "a positive number")
        self.require("vera_dropout", 0 <= self.vera_dropout < 1, "at least 0 and below 1")


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random numbers in ``(-b, b)`` with ``b = sqrt(6 / shape[1])``, on the CPU.

    That is Kaiming's uniform distribution for a gain of sqrt(2) (He et al. 2015, equation 10).
    """
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def projections(a_shape: tuple[int, int], b_shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """The two frozen matrices A and B; A is drawn first, so that files without them can be read."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return kaiming_uniform(a_shape, generator), kaiming_uniform(b_shape, generator)


class VeraPart(ModulePart):
    """VeRA beside one linear layer.

    The first part of an adapter owns the projection, large enough for the largest layer; the others refer to
    it and use the rows and columns that they need.

    Attributes:
        vera_lambda_d: the trained vector in the rank, ``(r,)``.
        vera_lambda_b: the trained vector of the outputs, ``(out,)``; zero at first, so nothing changes.
        vera_A: the projection down, ``(r, largest in)``; frozen, of the first part only.
        vera_B: the projection up, ``(largest out, r)``; frozen, of the first part only.
    """

    frozen = frozenset({"vera_A", "vera_B"})

    def __init__(self, config: VeraConfig, place: Place) -> None:
        super().__init__()
        self.out_features, self.in_features = place.layer.out_features, place.layer.in_features
        self.dropout = config.vera_dropout
        self.vera_lambda_d = nn.Parameter(torch.full((config.r,), config.d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features))
        self.first: Reference[VeraPart] = Reference(self)
        if place.path == place.others[0].path:
            a_shape = (config.r, max(other.layer.in_features for other in place.others))
            b_shape = (max(other.layer.out_features for other in place.others), config.r)
            # Empty ones first: parts are also made on the meta device, for a plan.
            self.vera_A = nn.Parameter(torch.empty(a_shape))
            self.vera_B = nn.Parameter(torch.empty(b_shape))
            if not self.vera_A.is_meta:
                drawn_a, drawn_b = projections(a_shape, b_shape, config.projection_prng_key)
                with torch.no_grad():
                    self.vera_A.copy_(drawn_a)
                    self.vera_B.copy_(drawn_b)

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Find the part that owns the projection: the first one."""
        self.first = Reference(cast("VeraPart", next(iter(parts.values()))))

    def projection(self) -> tuple[Tensor, Tensor]:
        """The columns of A and the rows of B that this layer uses: ``(r, in)`` and ``(out, r)``."""
        owner = self.first.module
        return owner.vera_A[:, : self.in_features], owner.vera_B[: self.out_features]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y + l_b * B (l_d * A x)``  (Kopiczko et al. 2023, equation 2).

        Args:
            x: the layer's input, ``(*batch, in)``.
            y: its output, ``(*batch, out)``.
        """
        down, up = self.projection()
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.linear(x, down.to(x.dtype)) * self.vera_lambda_d.to(x.dtype)
        update = F.linear(hidden, up.to(x.dtype)) * self.vera_lambda_b.to(x.dtype)
        return y + update.to(y.dtype)

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``W + diag(l_b) B diag(l_d) A``."""
        weight = tensors["weight"]
        down, up = self.projection()
        scaled_down = self.vera_lambda_d[:, None] * down
        update = self.vera_lambda_b[:, None] * (up @ scaled_down)
        return {"weight": weight + update.to(weight.dtype)}


class VeraFiles(PackedFiles[VeraConfig]):
    """The files of VeRA: two vectors for each layer under its path, and the projection once."""

    def pack(self, config: VeraConfig, parts: Parts) -> Mapping[str, Tensor]:
        """The tensors by their names in the file."""
        tensors = {}
        for path, part in parts.items():
            for name, tensor in part.named_parameters():
                if name not in VeraPart.frozen:
                    tensors[f"base_model.model.{path}.{name}"] = tensor
                elif config.save_projection:
                    tensors[f"base_model.{name}"] = tensor
        return tensors

    def unpack(
        self, config: VeraConfig, tensors: Mapping[str, Tensor], targets: Sequence[FileTarget]
    ) -> Mapping[str, Tensor]:
        """The projection goes to the part that owns it; where the file has none, it is made again."""
        names = {name.removeprefix("base_model.").removeprefix("model."): name for name in tensors}
        by_path = {short: tensors[name] for short, name in names.items() if short not in VeraPart.frozen}
        for target in targets:
            if VeraPart.frozen <= target.tensors.keys():
                drawn = _drawn(config, target.tensors)
                for name in VeraPart.frozen:
                    by_path[f"{target.path}.{name}"] = tensors.get(f"base_model.{name}", drawn[name])
        return by_path


def _drawn(config: VeraConfig, shapes: Mapping[str, Size]) -> dict[str, Tensor]:
    """The projection as its seed gives it."""
    a_shape, b_shape = shapes["vera_A"], shapes["vera_B"]
    drawn_a, drawn_b = projections(
        (a_shape[0], a_shape[1]), (b_shape[0], b_shape[1]), config.projection_prng_key
    )
    return {"vera_A": drawn_a, "vera_B": drawn_b}


@method(
    "vera",
    title="VeRA",
    config=VeraConfig,
    layers={"linear", "transposed-linear"},
    # The query and value projections, as in the paper (section 4.1), by what they are for and not by their
    # names.
    default_roles=({roles.QUERY, roles.FUSED}, {roles.VALUE, roles.KEY_VALUE, roles.FUSED}),
    inert=True,
    mergeable=True,
    source="Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454",
    example=partial(VeraConfig, r=8, target_modules="all-linear"),
    files=VeraFiles(),
)
def vera_part(config: VeraConfig, place: Place) -> Part:
    """The part for one layer."""
    return VeraPart(config, place)
