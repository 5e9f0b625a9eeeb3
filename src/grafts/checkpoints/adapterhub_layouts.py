"""How AdapterHub names the config and the tensors of each method, and what they are called here."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.methods._registry import Parts
from grafts.methods.bottleneck import BnConfig, BottleneckPart
from grafts.methods.ia3 import IA3Config, IA3Part
from grafts.methods.invertible import CouplingPart
from grafts.methods.lora import LoraConfig, LoraPart
from grafts.methods.prefix_tuning import LOCATIONS, PrefixPart, PrefixTuningConfig
from grafts.methods.prompt_tuning import PromptPart, PromptTuningConfig
from grafts.methods.reft import ReftConfig, ReftPart
from grafts.methods.shared.virtual_tokens import PREFIX, PROMPT
from grafts.modules.patterns import join
from grafts.structure.infer import inferred
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.residual_stream import Stream, StreamLayer, Sublayer
from grafts.structure.roles import FFN_IN, FFN_OUT, FUSED, KEY, QUERY, VALUE, ModelView

OURS = "base_model.model."
# models whose layers that library has written itself, with the adapters in the modules of the output
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra", "bert-generation", "xmod", "camembert")


# and those whose feed-forward's linears it has the other way round: "intermediate" is the one that gives the
# output
_SWAPPED = ("llama", "mistral")


class Model:
    """A model that files are read for or written from.

    Attributes:
        view: how it is built.
        root: the path of its base model.
    """

    def __init__(self, view: ModelView, interface: AdapterModelInterface | None) -> None:
        self.view, self.root, self.model = view, view.base, view.modules[""]
        self._interface = interface

    @cached_property
    def stream(self) -> Stream:
        """Its residual stream, by the interface or what is worked out."""
        return (self._interface or inferred(self.view)).resolve(self.view)

    @property
    def kind(self) -> str | None:
        """What `transformers` calls its type."""
        return getattr(getattr(self.model, "config", None), "model_type", None)

    def here(self, path: str) -> str | None:
        """The path of a module in this model, where the file was saved from the model within it, or one
        around it.
        """
        if path in self.view.modules:
            return path
        inner = [p for p in self.view.modules if p and path.endswith(f".{p}")]
        outer = [p for p in self.view.modules if p.endswith(f".{path}")]
        return max(inner, key=len) if inner else min(outer, key=len) if outer else None

    def layer(self, name: str) -> tuple[StreamLayer, str] | None:
        """The layer that a tensor's name begins with, and the rest of the name."""
        steps = name.split(".")
        layers = {layer.path: layer for layer in self.stream.layers}
        for end in range(len(steps), 0, -1):
            path = self.here(".".join(steps[:end]))
            if path in layers:
                return layers[path], ".".join(steps[end:])
        return None


Values = dict[str, Any]
Read = tuple[AdapterConfig, dict[str, Tensor]]


class Layout(Protocol):
    """One method in that layout."""

    def config(self, values: Mapping[str, Any]) -> AdapterConfig:
        """The config of this library.

        Raises:
            ConfigError: an option cannot be honoured.
        """

    def read(self, config: Any, left: MutableMapping[str, Tensor], there: Model) -> Read:
        """The config and the tensors as this library's own files have them; what is used is taken out of
        ``left``.

        Raises:
            CheckpointError: a tensor lies where this model has nothing.
        """

    def write(self, config: Any, parts: Parts, there: Model, name: str) -> tuple[Values, dict[str, Tensor]]:
        """The config and the tensors of that layout.

        Raises:
            ConfigError: something has no place there.
        """


def layout_for(values: Mapping[str, Any]) -> Layout:
    """The layout of a config of a file.

    Raises:
        ConfigError: it is that of a method that is not known here.
    """
    architecture = values.get("architecture")
    if architecture not in _BY_ARCHITECTURE:
        raise ConfigError(
            f"an adapter of AdapterHub with architecture {architecture!r} cannot be honoured here; of that "
            f"layout this version reads {', '.join(str(name) for name in _BY_ARCHITECTURE if name)}, union "
            "and bottlenecks"
        )
    if architecture == "lora" and values.get("composition_mode") == "scale":
        return _Ia3()
    return _BY_ARCHITECTURE[architecture]


def layout_of(config: AdapterConfig) -> Layout:
    """The layout of a config of this library.

    Raises:
        ConfigError: its method is none of AdapterHub's.
    """
    layout = BY_CONFIG.get(type(config))
    if layout is None:
        raise ConfigError(f"a {type(config).__name__} has no place in the layout of AdapterHub")
    return layout


def _taken(left: MutableMapping[str, Tensor], pattern: str) -> list[tuple[re.Match[str], Tensor]]:
    """The tensors whose names match, taken out."""
    matches = [match for name in list(left) if (match := re.fullmatch(pattern, name))]
    return [(match, left.pop(match.string)) for match in matches]


def _refuse(values: Mapping[str, Any], **may_be: Any) -> None:
    for option, allowed in may_be.items():
        if values.get(option) not in allowed:
            raise ConfigError(f"{option}={values[option]!r} cannot be honoured here")


def _plain(config: AdapterConfig) -> Values:
    """The fields that are the method's own."""
    own = {field.name for field in dataclasses.fields(config)} - {
        field.name for field in dataclasses.fields(AdapterConfig)
    }
    return {name: value for name, value in config.to_dict().items() if name in own}


class _Bottleneck:
    """Bottlenecks, with an invertible adapter or without."""

    renames: ClassVar = (
        (r"(adapter_(?:down\.\d+|up))\.(W|W_left|W_right)", r"\1.weight.\2"),
        (r"(adapter_(?:down\.\d+|up))\.(phm_rule\w*)", r"\1.rule.\2"),
    )

    def config(self, values: Mapping[str, Any]) -> BnConfig:
        return BnConfig.from_dict({name: value for name, value in values.items() if name != "architecture"})

    def read(self, config: BnConfig, left: MutableMapping[str, Tensor], there: Model) -> Read:
        result: dict[str, Tensor] = {}
        for match, tensor in _taken(left, r"(.*)\.adapters\.[^.]+\.(?!adapter_norm_before)(.+)"):
            path = self._path(match[1], there)
            name = match[2]
            for pattern, by in self.renames:
                name = re.sub(rf"^{pattern}$", by, name)
            result[f"{OURS}{path}.{name}"] = tensor
        _taken(left, r".*\.adapters\.[^.]+\.adapter_norm_before\..+")  # once more what adapter_down holds
        own = [s for s in there.stream.sublayers() if config.takes(s)]
        for match, tensor in _taken(left, r"(?:.*\.)?shared_parameters\.[^.]+\.(.+)"):
            result[f"{OURS}{own[0].out}.shared.{match[1]}"] = tensor
        for match, tensor in _taken(left, r"(?:.*\.)?invertible_adapters\.[^.]+\.(\w+)\.(\d)\.(weight|bias)"):
            network = f"{match[1]}.{'first' if match[2] == '0' else 'last'}.{match[3]}"
            result[f"{OURS}{there.stream.embeddings}.block.{network}"] = tensor
        return config, result

    def _path(self, name: str, there: Model) -> str:
        """The path of the module beside which a bottleneck of that name stands.

        Raises:
            CheckpointError: this model has none there.
        """
        found = there.layer(name)
        if found is None:
            raise CheckpointError(f"{name!r} lies in no layer of this {there.view.name}")
        layer, rest = found
        within = [s for s in layer.sublayers if rest and s.out.startswith(f"{layer.path}.{rest}.")]
        kind = "cross" if "cross" in rest else "self" if "attention" in rest else "ffn"
        chosen = within if len(within) == 1 else [s for s in layer.sublayers if s.kind == kind]
        if not chosen:
            raise CheckpointError(f"layer {layer.number} of this {there.view.name} has no place for {rest!r}")
        return chosen[0].out

    def write(
        self, config: BnConfig, parts: Parts, there: Model, name: str
    ) -> tuple[Values, dict[str, Tensor]]:
        layers = {layer.number: layer.path for layer in there.stream.layers}
        tensors: dict[str, Tensor] = {}
        for part in parts.values():
            if isinstance(part, CouplingPart) and part.block is not None:
                for key, parameter in part.block.named_parameters():
                    network, linear, kind = key.split(".")
                    step = {"first": 0, "last": 2}[linear]
                    tensors[join(there.root, f"invertible_adapters.{name}.{network}.{step}.{kind}")] = (
                        parameter
                    )
            if not isinstance(part, BottleneckPart):
                continue
            layer = layers[part.sublayer.layer]
            place = f"{layer}.{self._place(part.sublayer, there, layer)}.adapters.{name}"
            for key, tensor in part.file_tensors().items():
                if key.startswith("shared."):
                    shared = f"{there.root}.shared_parameters.{name}.{key.removeprefix('shared.')}"
                    tensors[shared.lstrip(".")] = tensor
                    continue
                there_called = re.sub(r"\.(weight|rule)\.(W|phm)", r".\2", key)
                tensors[f"{place}.{there_called}"] = tensor
                if config.ln_before and key.startswith("adapter_down.0."):
                    tensors[f"{place}.adapter_norm_before.{key.rpartition('.')[2]}"] = tensor
        values = _plain(config)
        if isinstance(values["scaling"], int):
            values["scaling"] = float(values["scaling"])  # that library refuses whole numbers
        return values, tensors

    def _place(self, sublayer: Sublayer, there: Model, layer: str) -> str:
        """What an adapter's owner in a layer is called there."""
        if there.kind in _BERT_LIKE:
            return {"self": "attention.output", "cross": "crossattention.output", "ffn": "output"}[
                sublayer.kind
            ]
        if there.kind in ("t5", "mt5"):  # the step of the block, ``layer.2``
            return ".".join(sublayer.out[len(layer) + 1 :].split(".")[:2])
        return {"self": "attention_adapters", "cross": "cross_attention_adapters", "ffn": "output_adapters"}[
            sublayer.kind
        ]


class _Lora:
    """LoRA; the modules are those that the file has tensors for."""

    def config(self, values: Mapping[str, Any]) -> LoraConfig:
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

    def read(self, config: LoraConfig, left: MutableMapping[str, Tensor], there: Model) -> Read:
        groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for match, tensor in _taken(left, r"(.+)\.loras\.[^.]+\.(lora_A|lora_B|gate\.weight|gate\.bias)"):
            path = there.here(match[1])
            if path is None or path not in there.view.layers:
                raise CheckpointError(f"{match[1]!r} is no linear of this {there.view.name}")
            groups[path][match[2]] = tensor
        result: dict[str, Tensor] = {}
        ranks, alphas = {}, {}
        for path, tensors in groups.items():
            a, b = tensors.pop("lora_A"), tensors.pop("lora_B")
            count = a.shape[0] // config.r
            if count > 1:  # one factor for each of queries, keys and values in one linear
                ranks[f"^{re.escape(path)}"], alphas[f"^{re.escape(path)}"] = (
                    a.shape[0],
                    config.lora_alpha * count,
                )
                b = self._blocks(b, count, there.view.layers[path].out_features, config.r)
            result |= {f"{OURS}{path}.lora_A.weight": a, f"{OURS}{path}.lora_B.weight": b}
            result |= {f"{OURS}{path}.{key}": tensor for key, tensor in tensors.items()}
        made = replace(config, target_modules=tuple(groups), rank_pattern=ranks, alpha_pattern=alphas)
        return made, result

    def _blocks(self, b: Tensor, count: int, out: int, rank: int) -> Tensor:
        """B of a fused linear, block by block: with two of three it serves queries and values."""
        third = out // 3
        wanted = {1: (0,), 2: (0, 2), 3: (0, 1, 2)}.get(count, ())
        if b.shape != (third * count, rank) or not wanted:
            raise CheckpointError(
                f"lora_B of a fused linear is {tuple(b.shape)}, and {count} x ({third}, {rank}) was expected"
            )
        whole = b.new_zeros(out, rank * count)
        for at, place in enumerate(wanted):
            whole[place * third : (place + 1) * third, at * rank : (at + 1) * rank] = b[
                at * third : (at + 1) * third
            ]
        return whole

    def write(
        self, config: LoraConfig, parts: Parts, there: Model, name: str
    ) -> tuple[Values, dict[str, Tensor]]:
        own = {path: part for path, part in parts.items() if isinstance(part, LoraPart)}
        plain = not (
            config.use_dora
            or config.use_rslora
            or config.lora_bias
            or config.rank_pattern
            or config.alpha_pattern
        )
        starts = all(part.start is None for part in own.values())
        if not plain or not starts or config.bias != "none":
            raise ConfigError(
                "AdapterHub has LoRA with one rank and one alpha, without biases, rsLoRA, DoRA and starts of "
                "the base's"
            )
        names = {QUERY: "q", KEY: "k", VALUE: "v"}
        roles = {there.view.roles[path] for path in own}
        if strange := roles - {*names, FFN_IN, FFN_OUT}:
            raise ConfigError(
                f"AdapterHub has no LoRA at {', '.join(sorted(strange))}"
                + (" of ours" if FUSED in strange else "")
            )
        tensors: dict[str, Tensor] = {}
        for path, part in own.items():
            a, b = part.factors()
            tensors |= {f"{path}.loras.{name}.lora_A": a, f"{path}.loras.{name}.lora_B": b}
            gate = getattr(part, "gate", None)
            for key, tensor in gate.named_parameters() if gate is not None else ():
                tensors[f"{path}.loras.{name}.gate.{key}"] = tensor
        values = _lora_values(
            config.r, config.lora_alpha, config.lora_dropout, roles, names, use_gating=config.use_gating
        )
        if there.kind in _SWAPPED:
            values |= {"intermediate_lora": FFN_OUT in roles, "output_lora": FFN_IN in roles}
        return values, tensors


def _lora_values(
    r: int, alpha: float, dropout: float, roles: set[str], names: Mapping[str, str], **more: Any
) -> Values:
    attention = [short for role, short in names.items() if role in roles]
    values: Values = {
        "architecture": "lora",
        "selfattn_lora": bool(attention),
        "intermediate_lora": FFN_IN in roles,
        "output_lora": FFN_OUT in roles,
        "leave_out": [],
        "r": r,
        "alpha": alpha,
        "dropout": dropout,
        "attn_matrices": attention,
        "composition_mode": "add",
        "init_weights": "lora",
        "init_weights_seed": None,
        "use_gating": False,
        "use_dora": False,
        "vera_d": None,
        "vera_b": None,
        "dtype": None,
    }
    return values | more


class _Ia3:
    """(IA)3: what LoRA is there in the mode that multiplies."""

    def config(self, values: Mapping[str, Any]) -> IA3Config:
        _refuse(values, use_gating=(False, None), alpha=(1, None), r=(1, None))
        return IA3Config.from_dict({"target_modules": [], "feedforward_modules": []})

    def read(self, config: IA3Config, left: MutableMapping[str, Tensor], there: Model) -> Read:
        result, paths = {}, []
        for match, tensor in _taken(left, r"(.+)\.loras\.[^.]+\.lora_B"):
            path = there.here(match[1])
            if path is None:
                raise CheckpointError(f"{match[1]!r} is no linear of this {there.view.name}")
            paths.append(path)
            result[f"{OURS}{path}.ia3_l"] = tensor
        return replace(config, target_modules=tuple(paths)), result

    def write(
        self, config: IA3Config, parts: Parts, there: Model, name: str
    ) -> tuple[Values, dict[str, Tensor]]:
        own = {path: part for path, part in parts.items() if isinstance(part, IA3Part)}
        names = {QUERY: "q", KEY: "k", VALUE: "v"}
        roles = {there.view.roles[path] for path in own}
        if any(part.when == "before" for part in own.values()) or roles - {*names, FFN_IN, FFN_OUT}:
            raise ConfigError(
                "AdapterHub's (IA)3 scales outputs, of queries, keys, values and the feed-forward's linears "
                "only"
            )
        tensors: dict[str, Tensor] = {f"{path}.loras.{name}.lora_B": part.ia3_l for path, part in own.items()}
        return _lora_values(1, 1, 0.0, roles, names, composition_mode="scale", init_weights="ia3"), tensors


class _Reft:
    """ReFT."""

    def config(self, values: Mapping[str, Any]) -> ReftConfig:
        _refuse(values, output_reft=(True, None))
        known = {n: v for n, v in values.items() if n not in ("architecture", "output_reft", "dtype")}
        return ReftConfig.from_dict(known)

    def read(self, config: ReftConfig, left: MutableMapping[str, Tensor], there: Model) -> Read:
        result: dict[str, Tensor] = {}
        rotations: dict[str, dict[str, Tensor]] = defaultdict(dict)
        names = {0: "both" if config.tied_weights else "prefix", 1: "suffix"}
        for match, tensor in _taken(left, r"(.+)\.reft_layer\.refts\.[^.]+\.units\.(\d)\.(.+)"):
            found = there.layer(match[1])
            if found is None:
                raise CheckpointError(f"{match[1]!r} is no layer of this {there.view.name}")
            unit = names.get(int(match[2]), "")
            if unit != "both" and not getattr(config, f"{unit}_positions"):
                continue  # made, and never used
            base = f"{OURS}{found[0].path}.units.{unit}"
            if match[3].startswith("projection."):
                rotations[base][match[3].removeprefix("projection.")] = tensor
            else:
                result[f"{base}.{match[3]}"] = tensor
        for base, tensors in rotations.items():
            rotation = tensors["weight"] if "weight" in tensors else _rotation(tensors)
            if config.orthogonality and not torch.allclose(
                rotation @ rotation.T, torch.eye(config.r), atol=1e-4
            ):
                raise CheckpointError(
                    f"the projection of {base.removeprefix(OURS)!r} is not orthonormal (that library's is "
                    "rounded to zero when weight decay touches it), so the adapter does nothing there"
                )
            result[f"{base}.projection"] = rotation
        return config, result

    def write(
        self, config: ReftConfig, parts: Parts, there: Model, name: str
    ) -> tuple[Values, dict[str, Tensor]]:
        if not config.subtract_projection:
            raise ConfigError(
                "AdapterHub's files do not say that R h is left out (DiReFT): it would read a NoReFT"
            )
        tensors: dict[str, Tensor] = {}
        for path, part in parts.items():
            if not isinstance(part, ReftPart):
                continue
            units = part.units
            each = (
                [units["both"]]
                if config.tied_weights
                else [units[k if k in units else next(iter(units))] for k in ("prefix", "suffix")]
            )
            for at, unit in enumerate(each):
                place = f"{path}.reft_layer.refts.{name}.units.{at}"
                tensors[f"{place}.learned_source.weight"] = unit.learned_source.weight  # type: ignore[union-attr, assignment]
                tensors[f"{place}.learned_source.bias"] = unit.learned_source.bias  # type: ignore[union-attr, assignment]
                rotation = unit.rotation()  # type: ignore[operator]
                for key, tensor in (
                    _parametrised(rotation) if config.orthogonality else {"weight": rotation}
                ).items():
                    tensors[f"{place}.projection.{key}"] = tensor
        values = {n: v for n, v in _plain(config).items() if n != "subtract_projection"}
        return {**values, "architecture": "reft", "output_reft": True, "dtype": None}, tensors


def _orthogonal(shape: torch.Size) -> Any:
    return nn.utils.parametrizations.orthogonal(nn.Linear(shape[1], shape[0], bias=False))


def _rotation(tensors: Mapping[str, Tensor]) -> Tensor:
    """R of PyTorch's orthogonal parametrisation, which keeps a hidden x hidden matrix beside it."""
    linear = _orthogonal(tensors["parametrizations.weight.original"].shape)
    linear.load_state_dict(dict(tensors))
    rotation: Tensor = linear.weight.detach().clone()
    return rotation


def _parametrised(rotation: Tensor) -> dict[str, Tensor]:
    linear = _orthogonal(rotation.shape)
    linear.weight = rotation.detach().cpu().float()
    return {key: tensor.detach().clone() for key, tensor in linear.state_dict().items()}


class _Prefix:
    """Prefix tuning; of the copies of a prefix at every layer only that of the pool is needed."""

    def config(self, values: Mapping[str, Any]) -> PrefixTuningConfig:
        _refuse(values, leave_out=([], None), non_linearity=("tanh", None))
        return PrefixTuningConfig.from_dict(
            {
                "num_virtual_tokens": values.get("prefix_length"),
                "use_gating": bool(values.get("use_gating", False)),
                "count_positions": False,
                "attention": tuple(LOCATIONS),
            }
        )

    def read(self, config: PrefixTuningConfig, left: MutableMapping[str, Tensor], there: Model) -> Read:
        refuse_relative(there.model)
        _taken(left, r".*\.pool\..*")
        pools: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for match, tensor in _taken(
            left, r"(?:.*\.)?prefix_tuning\.prefix_tunings\.[^.]+\.(\w+)_prefix\.(.+)"
        ):
            pools[match[1]][match[2]] = tensor
        result: dict[str, Tensor] = {}
        for match, tensor in _taken(left, r"(.+)\.prefix_tuning\.prefix_gates\.[^.]+\.(weight|bias)"):
            path = self._attending(match[1], there)
            result[f"{PREFIX}{path}.gate.{match[2]}"] = tensor.expand(2, *tensor.shape[1:])  # one for both
        for location, pool in pools.items():
            result[f"{PROMPT}.{location}"] = self._numbers(pool, config.num_virtual_tokens)
        return config, result

    def _attending(self, path: str, there: Model) -> str:
        here = there.here(path)
        if here is None:
            raise CheckpointError(f"{path!r} is no attention of this {there.view.name}")
        return here

    def _numbers(self, pool: Mapping[str, Tensor], length: int) -> Tensor:
        """Keys and values of all layers; one that an MLP makes is read as the prefix that it has made."""
        if "control_trans" in pool:
            flat = pool["control_trans"]
            if flat.numel() % length:
                raise CheckpointError(f"a prefix of {flat.numel()} numbers is none of {length} tokens")
            return flat.view(length, -1)
        weights = (pool[f"control_trans.{layer}.{kind}"] for layer in (0, 2) for kind in ("weight", "bias"))
        first, first_bias, last, last_bias = weights
        return torch.tanh(pool["wte.weight"] @ first.T + first_bias) @ last.T + last_bias

    def write(
        self, config: PrefixTuningConfig, parts: Parts, there: Model, name: str
    ) -> tuple[Values, dict[str, Tensor]]:
        refuse_relative(there.model)
        own = {path: part for path, part in parts.items() if isinstance(part, PrefixPart)}
        if len(own) < len(parts):
            raise ConfigError(
                "it counts positions or has parts of its own elsewhere, which AdapterHub does not"
            )
        pool = join(there.root, f"prefix_tuning.prefix_tunings.{name}")
        numbers: dict[str, list[Tensor]] = defaultdict(list)
        tensors: dict[str, Tensor] = {}
        for path, part in own.items():
            location = next(
                location for location, role in LOCATIONS.items() if role == there.view.roles[path]
            )
            numbers[location].append(part.numbers())
            for kind, gate in part.gate.named_parameters() if part.gate is not None else ():
                tensors[f"{path}.prefix_tuning.prefix_gates.{name}.{kind}"] = gate
        for location, some in numbers.items():
            tensors[f"{pool}.{location}_prefix.control_trans"] = torch.cat(some, 1).flatten()
        values = {
            "architecture": "prefix_tuning",
            "bottleneck_size": config.encoder_hidden_size or 512,
            "cross_prefix": "cross" in numbers,
            "dropout": 0.0,
            "encoder_prefix": "encoder" in numbers,
            "flat": True,
            "init_weights_seed": None,
            "leave_out": [],
            "non_linearity": "tanh",
            "prefix_length": config.num_virtual_tokens,
            "shared_gating": False,
            "use_gating": config.use_gating,
        }
        return values, tensors


class _Prompt:
    """Prompt tuning, behind the embeddings' positions and norm."""

    def config(self, values: Mapping[str, Any]) -> PromptTuningConfig:
        _refuse(values, combine=("prefix", "prefix_after_bos"))
        return PromptTuningConfig.from_dict(
            {
                "num_virtual_tokens": values.get("prompt_length"),
                "after_first": values["combine"] == "prefix_after_bos",
                "after_embeddings": True,
            }
        )

    def read(self, config: PromptTuningConfig, left: MutableMapping[str, Tensor], there: Model) -> Read:
        found = _taken(left, r"(?:.*\.)?prompt_tuning\.prompt_tunings\.[^.]+\.prompt_embedding\.weight")
        return config, dict.fromkeys([PROMPT], found[0][1]) if found else {}

    def write(
        self, config: PromptTuningConfig, parts: Parts, there: Model, name: str
    ) -> tuple[Values, dict[str, Tensor]]:
        if not config.after_embeddings:
            raise ConfigError("AdapterHub puts virtual tokens behind the embeddings: after_embeddings=True")
        [part] = [part for part in parts.values() if isinstance(part, PromptPart) and part.prompt is not None]
        values = {
            "architecture": "prompt_tuning",
            "combine": "prefix_after_bos" if config.after_first else "prefix",
            "init_weights_seed": None,
            "prompt_init": "random_uniform",
            "prompt_init_text": None,
            "prompt_length": config.num_virtual_tokens,
        }
        key = join(there.root, f"prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight")
        return values, {key: part.virtual_tokens()}


def refuse_relative(model: nn.Module) -> None:
    """Refuse a model whose attention counts distances (T5).

    Raises:
        ConfigError: saying why.
    """
    if getattr(getattr(model, "config", None), "relative_attention_num_buckets", None) is not None:
        raise ConfigError(
            f"AdapterHub moves the distances between the tokens of a {type(model).__name__} by the length of "
            "the prefix, so its prefixes mean something else there: this layout is not exchanged for such "
            "models"
        )


_BY_ARCHITECTURE: dict[Any, Layout] = {
    None: _Bottleneck(),
    "lora": _Lora(),
    "prefix_tuning": _Prefix(),
    "prompt_tuning": _Prompt(),
    "reft": _Reft(),
}
BY_CONFIG: dict[type[AdapterConfig], Layout] = {
    BnConfig: _Bottleneck(),
    LoraConfig: _Lora(),
    IA3Config: _Ia3(),
    PrefixTuningConfig: _Prefix(),
    PromptTuningConfig: _Prompt(),
    ReftConfig: _Reft(),
}
