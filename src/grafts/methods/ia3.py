"""(IA)3: activations scaled by learned vectors (Liu et al. 2022, https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig, Names, config, option
from grafts.errors import ConfigError, UnmatchedTargetError
from grafts.methods._files import MethodFiles, Parts
from grafts.methods._registry import Place, Source, method
from grafts.methods._tensor_merging import TensorMerging
from grafts.methods.shared.low_rank import is_transposed
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
        are_names = names is None or isinstance(names, str) or all(isinstance(name, str) for name in names)
        self.require("feedforward_modules", are_names, "a list of module names or a string")
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
        # The shapes are those of `peft`'s files: a row for inputs, a column for outputs.
        shape: tuple[int, ...]
        if config.is_feedforward(place):
            self.when = "before"
            size = self.layer.in_features
            shape = (1, size)
        else:
            self.when = "after"
            size = self.layer.out_features
            shape = (size, 1)
        if self.layer.kind == "convolution":
            shape = (1, size, *[1] * len(self.layer.kernel_size))
        start = torch.ones if config.init_ia3_weights else torch.randn
        self.ia3_l = nn.Parameter(start(shape))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Scale the input of a feed-forward, or the output of another target, bias included.

        Args:
            x: the input, ``(*batch, in)``; beside a convolution ``(batch, channels, *space)``.
            y: the output, ``(*batch, out)``; not given for a feed-forward.

        Returns:
            ``l * x`` or ``l * y``  (Liu et al. 2022, section 3.3).
        """
        if self.layer.kind == "convolution":
            vector = self.ia3_l[0]
        else:
            vector = self.ia3_l.flatten()
        return scaled(x if y is None else y, vector)

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The rows of the weight and the bias times l; for a feed-forward the columns of the weight."""
        weight = tensors["weight"]
        vector = self.ia3_l.flatten().to(weight.dtype)
        kernel = [1] * (weight.dim() - 2)
        if self.when == "before":
            # Each group of a convolution's outputs sees its own part of the inputs.
            groups = self.layer.groups
            grouped = weight.view(groups, -1, *weight.shape[1:]) * vector.view(groups, 1, -1, *kernel)
            return {"weight": grouped.view(weight.shape)}
        result = {"weight": weight * vector.view(-1, 1, *kernel)}
        if "bias" in tensors:
            result["bias"] = tensors["bias"] * vector
        return result


def feedforwards_among_targets(config: IA3Config, places: Sequence[Place]) -> None:
    """Refuse a feed-forward module that is no target.

    Raises:
        UnmatchedTargetError: naming it.
    """
    paths = [place.path for place in places]
    strays = unmatched(paths, config.feedforward_modules or ())
    if strays:
        raise UnmatchedTargetError(
            f"feedforward_modules={strays[0]!r} matches none of the targets, so nothing would be scaled "
            f"there\n"
            f"  targets: {nearest_modules(strays[0], paths)}"
        )


class IA3Files(MethodFiles[IA3Config]):
    """The files of (IA)3, which name the feed-forward modules where the model's structure has told them."""

    def config_values(
        self, config: IA3Config, values: Mapping[str, Any], parts: Parts, layers: Mapping[str, Layer]
    ) -> Mapping[str, Any]:
        """The feed-forward modules as some of the names of the targets, and the layout of the weights; the
        arguments are those of `MethodFiles`.
        """
        changed: dict[str, Any] = {"fan_in_fan_out": is_transposed(layers)}
        if values["feedforward_modules"] is not None or not parts:
            return changed
        feedforwards = [path for path, part in parts.items() if cast("IA3Part", part).when == "before"]
        # By the short names of the targets, where these tell the two kinds apart; else by all paths.
        targets = values["target_modules"]
        if targets is not None and not isinstance(targets, str):
            names = [name for name in targets if _names_only(name, feedforwards, parts)]
            if all(matches(path, names) for path in feedforwards):
                return changed | {"feedforward_modules": names}
        return changed | {"target_modules": list(parts), "feedforward_modules": feedforwards}


def _names_only(name: str, feedforwards: Sequence[str], parts: Parts) -> bool:
    """Whether every target of that name is a feed-forward module."""
    return all(path in feedforwards for path in parts if matches(path, [name]))


def combined(
    sources: Sequence[Source[IA3Config]], merging: TensorMerging
) -> tuple[IA3Config, dict[str, Tensor]]:
    """One (IA)3 adapter made from several.

    - ``"linear"``: the weighted sum of the vectors;
    - ``"geometric"``: the product of the vectors, each to the power of its weight, which is what scaling with
      one after the other means. Signs multiply as they are.

    Args:
        sources: the adapters.
        merging: the way.

    Raises:
        ConfigError: one of them scales the input of a module of which another scales the output.
    """
    # By target, of those adapters that have it.
    vectors: dict[str, list[Tensor]] = {}
    weights: dict[str, list[float]] = {}
    when: dict[str, str] = {}
    for source in sources:
        for path, part in source.parts.items():
            scaling = cast("IA3Part", part)
            if when.setdefault(path, scaling.when) != scaling.when:
                raise ConfigError(
                    f"{path!r} has its input scaled by one of the adapters and its output by another"
                )
            vectors.setdefault(path, []).append(scaling.ia3_l)
            weights.setdefault(path, []).append(source.weight)
    tensors = {}
    for path, of_path in vectors.items():
        stack = torch.stack(of_path)
        powers = torch.tensor(weights[path]).to(stack).view(-1, *[1] * (stack.dim() - 1))
        if merging.method == "linear":
            result = (stack * powers).sum(0)
        else:
            # A negative number has no power of a fraction: signs are multiplied by themselves.
            result = stack.sign().prod(0) * stack.abs().pow(powers).prod(0)
        tensors[join(path, "ia3_l")] = result
    return sources[0].config, tensors


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
    files=IA3Files(replaceable=frozenset({"init_ia3_weights"})),
)
def ia3_part(config: IA3Config, place: Place) -> Part:
    """The part for one layer."""
    return IA3Part(config, place)
