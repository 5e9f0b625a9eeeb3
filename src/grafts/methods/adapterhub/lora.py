"""LoRA in AdapterHub's layout; the modules are those that the file has tensors for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.methods._files import Parts
from grafts.methods.adapterhub._layout import (
    ATTENTION_MATRICES,
    OURS,
    HubModel,
    Layout,
    Tensors,
    Values,
    layout,
    lora_values,
    take,
)
from grafts.methods.lora import GatedLoraPart, LoraConfig, LoraPart
from grafts.structure.roles import FFN_IN, FFN_OUT, FUSED

# Models whose feed-forward's linears it has the other way round: "intermediate" is the one that gives the
# output.
_SWAPPED = ("llama", "mistral")
# Of queries, keys and values in one linear, which blocks of its output have a factor, by how many factors
# there are.
_BLOCKS = {1: (0,), 2: (0, 2), 3: (0, 1, 2)}


@layout
class LoraLayout(Layout[LoraConfig]):
    """LoRA."""

    architecture: ClassVar[str | None] = "lora"
    config_class: ClassVar[type[AdapterConfig]] = LoraConfig

    def reads(self, values: Mapping[str, Any]) -> bool:
        """In the mode that adds."""
        return super().reads(values) and values.get("composition_mode") != "scale"

    def of_version(self, values: Values, version: Sequence[str]) -> Values:
        """Versions before 1.1 computed without the factor."""
        if version[:1] in (["0"], ["1"]) and list(version) < ["1", "1"]:
            values["alpha"] = values.get("r")
        return values

    def config(self, values: Mapping[str, Any]) -> LoraConfig:
        """The config; which modules are adapted the tensors say."""
        if values.get("use_dora") or values.get("vera_d") is not None or values.get("vera_b") is not None:
            raise ConfigError(
                "DoRA and VeRA of AdapterHub cannot be honoured: its DoRA scales the bias and leaves alpha / "
                "r out of the norm, its VeRA has dense matrices where the paper has vectors"
            )
        return LoraConfig.from_dict(
            {
                "r": int(values["r"]),
                "lora_alpha": values["alpha"],
                "lora_dropout": values.get("dropout") or 0.0,
                "use_gating": bool(values.get("use_gating")),
                "target_modules": [],
            }
        )

    def read(
        self, config: LoraConfig, left: MutableMapping[str, Tensor], model: HubModel
    ) -> tuple[LoraConfig, Tensors]:
        """The factors of each module, and the gates."""
        by_module: dict[str, Tensors] = defaultdict(dict)
        for match, tensor in take(left, r"(.+)\.loras\.[^.]+\.(lora_A|lora_B|gate\.weight|gate\.bias)"):
            path = model.path_of(match[1])
            if path is None or path not in model.view.layers:
                raise CheckpointError(f"{match[1]!r} is no linear of this {model.view.name}")
            by_module[path][match[2]] = tensor
        tensors: Tensors = {}
        ranks, alphas = {}, {}
        for path, of_module in by_module.items():
            a, b = of_module.pop("lora_A"), of_module.pop("lora_B")
            factors = a.shape[0] // config.r
            if factors > 1:  # one for each of queries, keys and values in one linear
                ranks[f"^{re.escape(path)}"] = a.shape[0]
                alphas[f"^{re.escape(path)}"] = config.lora_alpha * factors
                b = _block_diagonal(b, factors, model.view.layers[path].out_features, config.r)
            tensors[f"{OURS}{path}.lora_A.weight"] = a
            tensors[f"{OURS}{path}.lora_B.weight"] = b
            for name, tensor in of_module.items():
                tensors[f"{OURS}{path}.{name}"] = tensor
        targets = tuple(by_module)
        return replace(config, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas), tensors

    def write(self, config: LoraConfig, parts: Parts, model: HubModel, name: str) -> tuple[Values, Tensors]:
        """The factors of each module, and the gates."""
        updates = {path: part for path, part in parts.items() if isinstance(part, LoraPart)}
        _require_plain(config, list(updates.values()))
        roles = {model.view.roles[path] for path in updates}
        strange = roles - {*ATTENTION_MATRICES, FFN_IN, FFN_OUT}
        if strange:
            of_ours = " of ours" if FUSED in strange else ""
            raise ConfigError(f"AdapterHub has no LoRA at {', '.join(sorted(strange))}{of_ours}")
        tensors: Tensors = {}
        for path, part in updates.items():
            a, b = part.factors()
            tensors[f"{path}.loras.{name}.lora_A"] = a
            tensors[f"{path}.loras.{name}.lora_B"] = b
            if isinstance(part, GatedLoraPart):
                for key, tensor in part.gate.named_parameters():
                    tensors[f"{path}.loras.{name}.gate.{key}"] = tensor
        first, last = (FFN_OUT, FFN_IN) if model.model_type in _SWAPPED else (FFN_IN, FFN_OUT)
        values = lora_values(
            roles,
            r=config.r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            use_gating=config.use_gating,
            intermediate_lora=first in roles,
            output_lora=last in roles,
        )
        return values, tensors


def _require_plain(config: LoraConfig, parts: Sequence[LoraPart]) -> None:
    """Refuse what that layout has no place for.

    Raises:
        ConfigError: saying what it has.
    """
    has_patterns = bool(config.rank_pattern or config.alpha_pattern)
    has_variants = config.use_dora or config.use_rslora or config.lora_bias
    has_starts = any(part.start is not None for part in parts)
    if has_patterns or has_variants or has_starts or config.bias != "none":
        raise ConfigError(
            "AdapterHub has LoRA with one rank and one alpha, without biases, rsLoRA, DoRA and starts of "
            "the base's"
        )


def _block_diagonal(b: Tensor, factors: int, out: int, rank: int) -> Tensor:
    """B of a fused linear, block by block: with two of three it serves queries and values.

    Args:
        b: the blocks one below the other, ``(factors * out / 3, rank)``.
        factors: how many there are.
        out: how wide the linear's output is.
        rank: of each.

    Returns:
        ``(out, factors * rank)``.

    Raises:
        CheckpointError: it has another shape.
    """
    third = out // 3
    if b.shape != (third * factors, rank) or factors not in _BLOCKS:
        raise CheckpointError(
            f"lora_B of a fused linear is {tuple(b.shape)}, and {factors} x ({third}, {rank}) was expected"
        )
    result = b.new_zeros(out, rank * factors)
    for index, block in enumerate(_BLOCKS[factors]):
        rows = slice(block * third, (block + 1) * third)
        columns = slice(index * rank, (index + 1) * rank)
        result[rows, columns] = b[index * third : (index + 1) * third]
    return result
