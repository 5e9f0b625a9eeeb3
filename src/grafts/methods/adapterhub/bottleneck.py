"""Bottlenecks in AdapterHub's layout, with an invertible adapter or without."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

from torch import Tensor

from grafts.config import AdapterConfig
from grafts.errors import CheckpointError
from grafts.methods._files import Parts
from grafts.methods.adapterhub._layout import (
    OURS,
    HubModel,
    Layout,
    Tensors,
    Values,
    layout,
    own_fields,
    take,
)
from grafts.methods.bottleneck import BnConfig, BottleneckPart
from grafts.methods.invertible import CouplingPart
from grafts.modules.patterns import join
from grafts.structure.residual_stream import Sublayer

# Models whose layers that library has written itself, with the adapters in the modules of the output.
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra", "bert-generation", "xmod", "camembert")
# Where hypercomplex linears keep their tensors here: regular expression for the name there -> the name.
_RENAMED = {
    r"(adapter_(?:down\.\d+|up))\.(W|W_left|W_right)": r"\1.weight.\2",
    r"(adapter_(?:down\.\d+|up))\.(phm_rule\w*)": r"\1.rule.\2",
}
# The linears of a coupling's networks: their names here -> their places in the sequence there.
_STEPS = {"first": "0", "last": "2"}


@layout
class BottleneckLayout(Layout[BnConfig]):
    """Bottlenecks; a file names no architecture for them."""

    architecture: ClassVar[str | None] = None
    config_class: ClassVar[type[AdapterConfig]] = BnConfig

    def config(self, values: Mapping[str, Any]) -> BnConfig:
        """The config, whose fields are the same."""
        return BnConfig.from_dict({name: value for name, value in values.items() if name != "architecture"})

    def read(
        self, config: BnConfig, left: MutableMapping[str, Tensor], model: HubModel
    ) -> tuple[BnConfig, Tensors]:
        """The tensors of the bottlenecks, of what they share, and of the invertible adapter."""
        tensors: Tensors = {}
        for match, tensor in take(left, r"(.*)\.adapters\.[^.]+\.(?!adapter_norm_before)(.+)"):
            name = match[2]
            for pattern, renamed in _RENAMED.items():
                name = re.sub(rf"^{pattern}$", renamed, name)
            tensors[f"{OURS}{_module_beside(match[1], model)}.{name}"] = tensor
        take(left, r".*\.adapters\.[^.]+\.adapter_norm_before\..+")  # once more what adapter_down holds
        # What all share belongs to the first of them.
        sublayers = []
        for sublayer in model.stream.sublayers():
            if config.takes(sublayer):
                sublayers.append(sublayer)
        for match, tensor in take(left, r"(?:.*\.)?shared_parameters\.[^.]+\.(.+)"):
            tensors[f"{OURS}{sublayers[0].out}.shared.{match[1]}"] = tensor
        for match, tensor in take(left, r"(?:.*\.)?invertible_adapters\.[^.]+\.(\w+)\.(\d)\.(weight|bias)"):
            if match[2] == _STEPS["first"]:
                linear = "first"
            else:
                linear = "last"
            tensors[f"{OURS}{model.stream.embeddings}.block.{match[1]}.{linear}.{match[3]}"] = tensor
        return config, tensors

    def write(self, config: BnConfig, parts: Parts, model: HubModel, name: str) -> tuple[Values, Tensors]:
        """The tensors of the bottlenecks, of what they share, and of the invertible adapter."""
        tensors: Tensors = {}
        for part in parts.values():
            if isinstance(part, CouplingPart) and part.block is not None:
                for key, parameter in part.block.named_parameters():
                    network, linear, kind = key.split(".")
                    path = f"invertible_adapters.{name}.{network}.{_STEPS[linear]}.{kind}"
                    tensors[join(model.root, path)] = parameter
            elif isinstance(part, BottleneckPart):
                tensors |= _written(part, config, model, name)
        values = own_fields(config)
        if isinstance(values["scaling"], int):
            values["scaling"] = float(values["scaling"])  # that library refuses whole numbers
        return values, tensors


def _module_beside(name: str, model: HubModel) -> str:
    """The path of the module beside which a bottleneck of that name stands.

    Raises:
        CheckpointError: this model has none there.
    """
    found = model.layer(name)
    if found is None:
        raise CheckpointError(f"{name!r} lies in no layer of this {model.view.name}")
    layer, rest = found
    if rest:
        inside = [step for step in layer.sublayers if step.out.startswith(f"{layer.path}.{rest}.")]
        if len(inside) == 1:
            return inside[0].out
    kind = "ffn"
    if "cross" in rest:
        kind = "cross"
    elif "attention" in rest:
        kind = "self"
    for step in layer.sublayers:
        if step.kind == kind:
            return step.out
    raise CheckpointError(f"layer {layer.number} of this {model.view.name} has no place for {rest!r}")


def _written(part: BottleneckPart, config: BnConfig, model: HubModel, name: str) -> Tensors:
    """The tensors of one bottleneck by the names that they have there."""
    layers = {layer.number: layer.path for layer in model.stream.layers}
    layer = layers[part.sublayer.layer]
    owner = f"{layer}.{_owner_in_layer(part.sublayer, model, layer)}.adapters.{name}"
    tensors: Tensors = {}
    for key, tensor in part.file_tensors().items():
        if key.startswith("shared."):
            shared = f"shared_parameters.{name}.{key.removeprefix('shared.')}"
            tensors[join(model.root, shared)] = tensor
            continue
        renamed = re.sub(r"\.(weight|rule)\.(W|phm)", r".\2", key)
        tensors[f"{owner}.{renamed}"] = tensor
        if config.ln_before and key.startswith("adapter_down.0."):
            tensors[f"{owner}.adapter_norm_before.{key.rpartition('.')[2]}"] = tensor
    return tensors


def _owner_in_layer(sublayer: Sublayer, model: HubModel, layer: str) -> str:
    """What an adapter's owner in a layer is called there."""
    if model.model_type in _BERT_LIKE:
        owners = {"self": "attention.output", "cross": "crossattention.output", "ffn": "output"}
        return owners[sublayer.kind]
    if model.model_type in ("t5", "mt5"):  # the step of the block, ``layer.2``
        return ".".join(sublayer.out[len(layer) + 1 :].split(".")[:2])
    owners = {
        "self": "attention_adapters",
        "cross": "cross_attention_adapters",
        "ffn": "output_adapters",
    }
    return owners[sublayer.kind]
