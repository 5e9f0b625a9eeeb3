"""Prefix tuning: learned keys and values in front of those of every layer (Li & Liang 2021,
arXiv:2101.00190).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafts.config import config, option
from grafts.errors import CheckpointError, ConfigError, StateError
from grafts.methods._registry import Files, FileTarget, Parts, Place, method
from grafts.methods.shared.virtual_tokens import (
    PREFIX,
    PROMPT,
    VirtualTokensConfig,
    encoder_tensors,
    has_encoder,
    split,
)
from grafts.modules.patterns import join
from grafts.sites.arguments import Kind
from grafts.sites.attention import AttendingPart, Attention
from grafts.sites.input import InputPart, embeds_positions
from grafts.sites.site import Part
from grafts.structure.attention_modules import (
    CROSS_ATTENTION,
    DECODER_INPUT,
    ENCODER_ATTENTION,
    ENCODER_INPUT,
    INPUT,
    SELF_ATTENTION,
)

LOCATIONS = {"self": SELF_ATTENTION, "cross": CROSS_ATTENTION, "encoder": ENCODER_ATTENTION}


@config
class PrefixTuningConfig(VirtualTokensConfig):
    """What prefix tuning is: keys and values that every query of a layer attends to as well.

    >>> config = PrefixTuningConfig(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512)
    >>> config.num_virtual_tokens
    30
    """

    prefix_projection: bool = option(
        False, "Make them with an MLP, which makes training easier (section 4.3 of the paper)."
    )
    encoder_hidden_size: int | None = option(
        None, "The hidden size of that MLP; that of the keys if not given."
    )
    init_weights: str | None = option(
        None, "'zero' starts with zeros; otherwise they are normal random numbers."
    )
    attention: tuple[str, ...] = option(
        ("self",),
        "Which attention: self (of a decoder, where there are two stacks), cross, encoder; one or several.",
    )
    count_positions: bool | None = option(
        None,
        "Whether the prefix takes up positions, so that the first token stands at num_virtual_tokens (as in "
        "`peft`) and not at 0 (as in AdapterHub); nothing counts them where the model takes position_ids.",
    )
    use_gating: bool = option(
        False,
        "Scale the keys and the values of each layer by a gate, from the mean of the layer's input; not with "
        "a cache.",
    )

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    own_fields: ClassVar[frozenset[str]] = VirtualTokensConfig.own_fields | {
        "attention",
        "count_positions",
        "use_gating",
    }

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if isinstance(self.attention, str):
            object.__setattr__(self, "attention", (self.attention,))
        super().__post_init__()
        self.require(
            "attention",
            bool(self.attention) and set(self.attention) <= set(LOCATIONS),
            f"some of {', '.join(LOCATIONS)}",
        )
        self.require("init_weights", self.init_weights in (None, "zero"), "'zero' or left out")
        size = self.encoder_hidden_size
        self.require(
            "encoder_hidden_size", size is None or (isinstance(size, int) and size > 0), "a positive number"
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A config from plain data; what `peft` has made for an encoder-decoder is a counted prefix of the
        decoder's.
        """
        if (
            data.get("num_transformer_submodules") == 2 and "attention" not in data
        ):  # `peft`'s for an encoder-decoder
            data = {**data, "attention": ("self",), "count_positions": True}
        return super().from_dict(data)


class PrefixPart(AttendingPart):
    """The prefix inside one attention module.

    Attributes:
        prefix: keys and values, ``(length, key-value heads * (key size + value size))``; None where an MLP
            makes them.
        encoder: the MLP that makes those of all layers, at the first of them; None at the others.
        gate: makes the gates of keys and values from the module's input, ``(2, hidden)``; None without gates.
    """

    def __init__(self, config: PrefixTuningConfig, place: Place) -> None:
        super().__init__()
        layers = [other.layer for other in place.others if other.layer.kind == "attending"]
        self.heads, self.width = place.layer.heads, place.layer.out_features
        index = [other.path for other in place.others if other.layer.kind == "attending"].index(place.path)
        begin = sum(layer.keys_and_values for layer in layers[:index])
        numbers = place.layer.keys_and_values
        self.columns = begin, begin + numbers
        length = config.num_virtual_tokens
        self.prefix: nn.Parameter | None = None
        self.encoder: PrefixEncoder | None = None
        if not config.prefix_projection:
            start = torch.zeros if config.init_weights == "zero" else torch.randn
            self.prefix = nn.Parameter(start(length, numbers))
        elif index == 0:
            self.encoder = PrefixEncoder(config, self.width, sum(layer.keys_and_values for layer in layers))
        self.gate = nn.Linear(place.layer.in_features, 2) if config.use_gating else None
        self.source: tuple[PrefixPart, ...] = (self,)
        self.counted = bool(config.count_positions)
        self.distances: tuple[
            nn.Module, ...
        ] = ()  # at the first part: the module that knows the bias by distance

    def numbers(self) -> Tensor:
        """Keys and values, ``(length, keys and values)``."""
        if self.prefix is not None:
            return self.prefix
        encoder = self.source[0].encoder
        assert encoder is not None
        made: Tensor = encoder(self.columns)
        return made

    def as_heads(self, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values, ``(1, heads, length, head_dim)`` each."""
        numbers = self.numbers()
        keys, values = numbers[:, : self.width], numbers[:, self.width :]
        return tuple(x.view(x.shape[0], heads, -1).transpose(0, 1)[None] for x in (keys, values))  # type: ignore[return-value]

    def in_front(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """Keys and values in front of the module's own (Li & Liang 2021, section 4), times their gates."""
        head_dim = attention.query.shape[-1]
        if attention.key_heads * head_dim != self.width:
            raise StateError(
                f"a {type(attention.host).__name__} has {attention.key_heads} heads of keys of size "
                f"{head_dim}, and its prefix was made for {self.width} numbers a position"
            )
        keys, values = self.as_heads(attention.key_heads)
        if self.gate is None:
            return keys, values
        if attention.past():
            raise StateError(
                "a gated prefix needs the whole input of each layer at once: generate with use_cache=False"
            )
        gates = F.linear(
            attention.hidden,
            self.gate.weight.to(attention.hidden.dtype),
            self.gate.bias.to(attention.hidden.dtype),
        )
        key, value = torch.sigmoid(gates).mean(1).unbind(-1)
        return keys * key.view(-1, 1, 1, 1), values * value.view(-1, 1, 1, 1)

    def position_bias(self, attention: Attention) -> Tensor | None:
        """For a counted prefix, the bias of T5's scores by their distance (Raffel et al. 2020, section
        2.1).
        """
        host, first = attention.host, self.source[0]
        if getattr(host, "has_relative_attention_bias", False):
            first.distances = (host,)
        if not self.counted or not first.distances or hasattr(host, "is_cross_attention"):
            return None
        knows: Any = first.distances[0]
        numbers = self.numbers()
        # the module makes the bias of all positions up to the last query, as if the prefix were its first
        # tokens
        length, queries = numbers.shape[0], attention.query.shape[2]
        bias: Tensor = knows.compute_bias(length + attention.past() + queries, length)
        return bias[:, :, -queries:]


class PrefixEncoder(nn.Module):
    """The MLP that makes the keys and values of all layers (Li & Liang 2021, section 4.3).

    Attributes:
        embedding: ``(length, width)``.
        transform: two linears with tanh between them; the second one gives the keys and values of all layers.
    """

    def __init__(self, config: PrefixTuningConfig, width: int, total: int) -> None:
        super().__init__()
        hidden = config.encoder_hidden_size or width
        self.embedding = nn.Embedding(config.num_virtual_tokens, width)
        self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, total))
        if config.init_weights == "zero":
            for parameter in self.transform[2].parameters():
                nn.init.zeros_(parameter)

    def forward(self, columns: tuple[int, int]) -> Tensor:
        """Keys and values of one layer, ``(length, columns)``."""
        hidden = self.transform[1](self.transform[0](self.embedding.weight))
        last = cast("nn.Linear", self.transform[2])
        return F.linear(hidden, last.weight[slice(*columns)], last.bias[slice(*columns)])


class CountedPrefix(InputPart):
    """Moves the positions of the tokens behind the prefix."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.shift = length


def link(config: PrefixTuningConfig, parts: Parts) -> None:
    """Let all layers find the MLP of the first."""
    own = [part for part in parts.values() if isinstance(part, PrefixPart)]
    for part in own:
        part.source = (own[0],)


def counted(config: PrefixTuningConfig, places: Sequence[Place], candidates: Sequence[Place]) -> list[Place]:
    """The attention modules that were selected, and what takes the positions if the prefix is counted."""
    attending = [place for place in places if place.layer.kind == "attending"]
    inputs = [place for place in candidates if place.layer.kind == "input"]
    heard = {INPUT, DECODER_INPUT if {"self", "cross"} & set(config.attention) else ENCODER_INPUT}
    taking = [place for place in inputs if place.role in heard and place.takes(Kind.POSITIONS)]
    if config.count_positions:
        taking = taking or [place for place in inputs if place.role in heard and embeds_positions(place.host)]
    by_distance = any(getattr(place.host, "has_relative_attention_bias", False) for place in attending)
    if config.count_positions and not taking and not by_distance:
        raise ConfigError(
            "count_positions: this model takes no position_ids, so its tokens cannot be moved behind the "
            "prefix"
        )
    return [*attending, *([] if config.count_positions is False else taking)]


def file_values(values: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """The sizes, as `peft` completes them from the model."""
    own = [part for part in parts.values() if isinstance(part, PrefixPart)]
    sizes = {"num_layers": len(own), "token_dim": own[0].width, "num_attention_heads": own[0].heads}
    hidden = values["encoder_hidden_size"] or own[0].width
    shifts = any(isinstance(part, CountedPrefix) for part in parts.values())
    shifts = shifts or own[0].counted
    counts = {} if shifts else {"count_positions": False}
    return {**sizes, **counts, "encoder_hidden_size": hidden, "num_transformer_submodules": 1}


def packed(config: PrefixTuningConfig, parts: Parts) -> dict[str, Tensor]:
    """The tensors of the file."""
    own = {path: part for path, part in parts.items() if isinstance(part, PrefixPart)}
    with torch.no_grad():
        tensors = {PROMPT: torch.cat([part.numbers() for part in own.values()], 1)}
    first = next(iter(own.values()))
    if first.encoder is not None:
        tensors |= encoder_tensors(first.encoder)
    gates = {path: part.gate for path, part in own.items() if part.gate is not None}
    return tensors | {
        f"{PREFIX}{path}.gate.{n}": t for path, gate in gates.items() for n, t in gate.named_parameters()
    }


def unpacked(
    config: PrefixTuningConfig, tensors: Mapping[str, Tensor], targets: Sequence[FileTarget]
) -> dict[str, Tensor]:
    """The parts' tensors by path and name."""
    result = {
        name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)
    }
    if config.prefix_projection:
        path = next(path for path, names, _ in targets if any(name.startswith("encoder.") for name in names))
        encoder = {name: t for name, t in tensors.items() if name.startswith("prompt_encoder.")}
        return result | {f"{path}.{name.removeprefix('prompt_')}": tensor for name, tensor in encoder.items()}
    everything = [(path, names["prefix"], role) for path, names, role in targets if "prefix" in names]
    groups = {PROMPT: everything}
    if config.num_transformer_submodules == 2 and PROMPT in tensors:
        return result | _of_peft(config, tensors[PROMPT], [(path, shape) for path, shape, _ in everything])
    if PROMPT not in tensors and any(name.startswith(f"{PROMPT}.") for name in tensors):
        groups = {
            f"{PROMPT}.{name}": [t for t in everything if t[2] == role] for name, role in LOCATIONS.items()
        }
    for name, own in groups.items():
        widths = [shape[1] for _, shape, _ in own]
        pieces = split(tensors, widths, 1, (config.num_virtual_tokens, sum(widths)), name) if own else []
        result |= {join(path, "prefix"): piece for (path, _, _), piece in zip(own, pieces, strict=True)}
    return result


def _of_peft(
    config: PrefixTuningConfig, numbers: Tensor, own: Sequence[tuple[str, Any]]
) -> dict[str, Tensor]:
    """`peft`'s numbers for an encoder-decoder: those of layer 2 i, counted in a circle, serve layer i of the
    decoder.

    It lays them out for self- and cross-attention in turns, and then leaves those of cross-attention out.

    Raises:
        CheckpointError: they are not those of so many layers of this size.
    """
    layers, shape = config.num_layers or len(own), own[0][1]
    if tuple(numbers.shape) != (shape[0], layers * shape[1]) or len(own) > layers:
        wanted = (shape[0], layers * shape[1])
        raise CheckpointError(
            f"{PROMPT!r} is {tuple(numbers.shape)} in the file and {wanted} for {layers} layers here"
        )
    pieces = torch.split(numbers, shape[1], 1)
    return {join(path, "prefix"): pieces[2 * index % layers] for index, (path, _) in enumerate(own)}


def from_file(config: PrefixTuningConfig, tensors: Mapping[str, Tensor]) -> PrefixTuningConfig:
    """Without the MLP where the file holds only what it gave; for the attention that has a prefix of its own
    in the file.
    """
    there = tuple(name for name in LOCATIONS if f"{PROMPT}.{name}" in tensors)
    return replace(
        config,
        prefix_projection=config.prefix_projection and has_encoder(tensors),
        attention=there or config.attention,
    )


@method(
    "prefix_tuning",
    title="Prefix tuning",
    config=PrefixTuningConfig,
    layers={"attending", "input"},
    default_roles=lambda config: ({LOCATIONS[name] for name in config.attention},),
    inert=False,
    mergeable=False,
    source="Li & Liang 2021, https://arxiv.org/abs/2101.00190",
    narrow=counted,
    file_values=file_values,
    attached=link,
    files=Files(PREFIX, packed, unpacked, from_file),
)
def prefix_part(config: PrefixTuningConfig, place: Place) -> Part:
    """The part for one attention module, or for what takes the input."""
    return (
        PrefixPart(config, place)
        if place.layer.kind == "attending"
        else CountedPrefix(config.num_virtual_tokens)
    )
