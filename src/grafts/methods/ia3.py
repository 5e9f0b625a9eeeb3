"""(IA)3: activations scaled by learned vectors (Liu et al. 2022, https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, Names, config, option
from grafts.errors import ConfigError, UnmatchedTargetError
from grafts.methods._registry import Parts, Place, method
from grafts.methods._tensor_merging import TensorMerging
from grafts.methods.shared.rescale import scaled
from grafts.modules.layers import Layer
from grafts.modules.patterns import join, matches, nearest_modules, unmatched
from grafts.sites.module import ModulePart
from grafts.sites.site import Part
from grafts.structure.roles import FFN_OUT, FUSED, KEY, KEY_VALUE, VALUE


@config
class IA3Config(AdapterConfig):
    """What an (IA)3 adapter is: one learned vector a target, which multiplies its output, or its input in a
    feed-forward.

    Without ``target_modules`` the targets are the key and value projections and the feed-forward output of
    every layer, as in the paper (section 3.3).

    >>> config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    >>> config.feedforward_modules
    ('down_proj',)
    """

    feedforward_modules: Names = option(
        None,
        "Which targets have their input scaled and not their output: a list or a regular expression like "
        "target_modules; nothing takes the targets that are the output projection of a feed-forward.",
    )
    fan_in_fan_out: bool = option(
        False, "Written for other libraries; here the layout of a weight is found out."
    )
    init_ia3_weights: bool = option(
        True,
        "Start with ones, at which nothing changes; False starts with normal random numbers, which no "
        "training needs.",
    )

    peft_type: ClassVar[str] = "IA3"

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        names = self.feedforward_modules
        valid = names is None or isinstance(names, str) or all(isinstance(name, str) for name in names)
        self.require("feedforward_modules", valid, "a list of module names or a string")
        self.require("init_ia3_weights", isinstance(self.init_ia3_weights, bool), "True or False")

    def is_feedforward(self, place: Place) -> bool:
        """Whether the target there has its input scaled."""
        if self.feedforward_modules is None:
            return place.role == FFN_OUT
        return matches(place.path, self.feedforward_modules)


class IA3Part(ModulePart):
    """(IA)3 beside one layer.

    Attributes:
        ia3_l: the vector, ``(out, 1)`` for the output of a linear, ``(1, in)`` for its input,
            ``(1, channels, 1, ...)`` beside a convolution.
        layer: what it stands beside.
    """

    def __init__(self, config: IA3Config, place: Place) -> None:
        super().__init__()
        self.layer: Layer = place.layer
        before = config.is_feedforward(place)
        self.when = "before" if before else "after"
        size = self.layer.in_features if before else self.layer.out_features
        if self.layer.kind == "convolution":
            shape: tuple[int, ...] = (1, size, *[1] * len(self.layer.kernel_size))
        else:
            shape = (1, size) if before else (size, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape) if config.init_ia3_weights else torch.randn(shape))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Scale the input of a feed-forward, or the output of another target, bias included.

        Args:
            x: the input, ``(*batch, in)``; beside a convolution ``(batch, channels, *space)``.
            y: the output, ``(*batch, out)``; not given for a feed-forward.

        Returns:
            ``l * x`` or ``l * y``  (Liu et al. 2022, section 3.3).
        """
        vector = self.ia3_l[0] if self.layer.kind == "convolution" else self.ia3_l.flatten()
        return scaled(x if y is None else y, vector)

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The rows of the weight and the bias times l; for a feed-forward the columns of the weight."""
        weight = tensors["weight"]
        vector = self.ia3_l.flatten().to(weight.dtype)
        ones = [1] * (weight.dim() - 2)
        if self.when == "before":
            groups = self.layer.groups
            grouped = weight.view(groups, -1, *weight.shape[1:]) * vector.view(groups, 1, -1, *ones)
            return {"weight": grouped.view(weight.shape)}
        result = {"weight": weight * vector.view(-1, 1, *ones)}
        return {**result, "bias": tensors["bias"] * vector} if "bias" in tensors else result


def feedforwards_among_targets(config: IA3Config, places: Sequence[Place]) -> None:
    """Refuse a feed-forward module that is no target.

    Raises:
        UnmatchedTargetError: naming it.
    """
    paths = [place.path for place in places]
    if stray := unmatched(paths, config.feedforward_modules or ()):
        raise UnmatchedTargetError(
            f"feedforward_modules={stray[0]!r} matches none of the targets, so nothing would be scaled "
            f"there\n"
            f"  targets: {nearest_modules(stray[0], paths)}"
        )


def file_values(values: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The feed-forward modules where the structure of the model has told them, as some of the names of the
    targets.
    """
    if values["feedforward_modules"] is not None:
        return {}
    before = [path for path, part in parts.items() if part.when == "before"]
    names = values["target_modules"]
    if not isinstance(names, str):
        some = [name for name in names if all(path in before for path in parts if matches(path, [name]))]
        if all(matches(path, some) for path in before):
            return {"feedforward_modules": some}
    return {"target_modules": list(parts), "feedforward_modules": before}


def combined(
    sources: Sequence[tuple[IA3Config, Parts, float]], blend: TensorMerging
) -> tuple[IA3Config, dict[str, Tensor]]:
    """One (IA)3 adapter made from several.

    - ``"linear"``: the weighted sum of the vectors;
    - ``"geometric"``: the product of the vectors, each to the power of its weight, which is what scaling with
      one after the other means. Signs multiply as they are.
    """
    tensors: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for _, parts, _ in sources for path in parts):
        here = [(cast("IA3Part", parts[path]), weight) for _, parts, weight in sources if path in parts]
        if len({part.when for part, _ in here}) > 1:
            raise ConfigError(
                f"{path!r} has its input scaled by one of the adapters and its output by another"
            )
        vectors = torch.stack([part.ia3_l for part, _ in here])
        weights = (
            torch.tensor([weight for _, weight in here]).to(vectors).view(-1, *[1] * (vectors.dim() - 1))
        )
        if blend.method == "linear":
            tensors[join(path, "ia3_l")] = (vectors * weights).sum(0)
        else:
            tensors[join(path, "ia3_l")] = vectors.sign().prod(0) * vectors.abs().pow(weights).prod(0)
    return sources[0][0], tensors


@method(
    "ia3",
    title="(IA)3",
    config=IA3Config,
    layers={"linear", "transposed-linear", "convolution"},
    default_roles=({KEY, VALUE, KEY_VALUE, FUSED}, {FFN_OUT}),
    inert=True,
    mergeable=True,
    source="Liu et al. 2022, https://arxiv.org/abs/2205.05638",
    combinations=("linear", "geometric"),
    combine=combined,
    check=feedforwards_among_targets,
    file_values=file_values,
    swaps=frozenset({"init_ia3_weights"}),
)
def ia3_part(config: IA3Config, place: Place) -> Part:
    """The part for one layer."""
    return IA3Part(config, place)
