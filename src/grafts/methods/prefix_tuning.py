"""Prefix tuning: learned keys and values in front of those of every layer (Li & Liang 2021,
arXiv:2101.00190).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from grafts.config import config, option
from grafts.errors import CheckpointError, ConfigError, StateError
from grafts.methods._files import FileTarget, PackedFiles, Parts
from grafts.methods._registry import Place, method
from grafts.methods.shared.virtual_tokens import (
    PROMPT,
    VirtualTokensConfig,
    encoder_by_path,
    encoder_tensors,
    has_encoder,
    has_encoder_tensors,
    split,
    without_prefix,
)
from grafts.modules.layers import Layer
from grafts.modules.patterns import join
from grafts.sites.arguments import Kind
from grafts.sites.attention import AttendingPart, Attention
from grafts.sites.input import InputPart, embeds_positions
from grafts.sites.site import Part, Reference
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
        is_from_peft = data.get("num_transformer_submodules") == 2 and "attention" not in data
        if is_from_peft:
            data = {**data, "attention": ("self",), "count_positions": True}
        return super().from_dict(data)


class PrefixPart(AttendingPart):
    """The prefix inside one attention module.

    Attributes:
        prefix: keys and values, ``(length, key-value heads * (key size + value size))``; None where an MLP
            makes them.
        encoder: the MLP that makes those of all layers, at the first of them; None at the others.
        gate: makes the gates of keys and values from the module's input, ``(2, hidden)``; None without gates.
        heads: how many heads of keys the module has.
        width: how wide the keys of all heads are.
        columns: where the numbers of this layer begin and end among those that the MLP makes.
        is_counted: the prefix takes up positions.
    """

    def __init__(self, config: PrefixTuningConfig, place: Place) -> None:
        super().__init__()
        # Which columns are this layer's, of the numbers of all layers side by side.
        attending = [other for other in place.others if other.layer.kind == "attending"]
        index = [other.path for other in attending].index(place.path)
        sizes = [other.layer.keys_and_values for other in attending]
        self.heads = place.layer.heads
        self.width = place.layer.out_features
        self.columns = sum(sizes[:index]), sum(sizes[: index + 1])
        self.is_counted = bool(config.count_positions)
        self.prefix: nn.Parameter | None = None
        self.encoder: PrefixEncoder | None = None
        if not config.prefix_projection:
            start = torch.zeros if config.init_weights == "zero" else torch.randn
            self.prefix = nn.Parameter(start(config.num_virtual_tokens, place.layer.keys_and_values))
        elif index == 0:
            self.encoder = PrefixEncoder(config, self.width, sum(sizes))
        self.gate = nn.Linear(place.layer.in_features, 2) if config.use_gating else None
        # The part at the first layer: it has the MLP of all layers, and what it comes to know of the model.
        self._first: Reference[PrefixPart] = Reference(self)
        # At the first part: the module of the base that knows the bias of scores by their distance (T5).
        self._knows_distances: Reference[nn.Module] | None = None

    def connect(self, parts: Mapping[str, Part]) -> None:
        """Find the part at the first layer, which may have the network that makes all prefixes.

        Args:
            parts: those of the adapter, by path.
        """
        first = next(iter(_prefixes(parts).values()))
        self._first = Reference(first)

    def numbers(self) -> Tensor:
        """Keys and values of this layer side by side, ``(length, keys and values)``: the trained ones, or
        what the network makes.
        """
        if self.prefix is not None:
            return self.prefix
        encoder = self._first.module.encoder
        assert encoder is not None
        numbers: Tensor = encoder(self.columns)
        return numbers

    def as_heads(self, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values, ``(1, heads, length, head_dim)`` each.

        Args:
            heads: how many heads of keys the module has, which share the numbers of a position in order.
        """
        numbers = self.numbers()
        length = numbers.shape[0]
        keys = numbers[:, : self.width].view(length, heads, -1).transpose(0, 1)[None]
        values = numbers[:, self.width :].view(length, heads, -1).transpose(0, 1)[None]
        return keys, values

    def in_front(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """Keys and values in front of the module's own (Li & Liang 2021, section 4), times their gates.

        Args:
            attention: the present call.

        Raises:
            StateError: the module attends with other heads than planned, or a gate sees only a part of the
                input.
        """
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
        # One gate for the keys and one for the values of each row, the mean over its tokens.
        hidden = attention.hidden
        gates = F.linear(hidden, self.gate.weight.to(hidden.dtype), self.gate.bias.to(hidden.dtype))
        key_gate, value_gate = torch.sigmoid(gates).mean(1).unbind(-1)
        return keys * key_gate.view(-1, 1, 1, 1), values * value_gate.view(-1, 1, 1, 1)

    def position_bias(self, attention: Attention) -> Tensor | None:
        """For a counted prefix, the bias of T5's scores by their distance (Raffel et al. 2020, section
        2.1).

        Args:
            attention: the present call.

        Returns:
            ``(1, heads, queries, length)``; None where scores do not depend on distances.
        """
        self._look_for_distances(attention.host)
        known = self._first.module._knows_distances
        is_cross = hasattr(attention.host, "is_cross_attention")
        if not self.is_counted or known is None or is_cross:
            return None
        module: Any = known.module
        # It makes the bias of all positions up to the last query, as if the prefix were its first tokens.
        length, queries = self.numbers().shape[0], attention.query.shape[2]
        bias: Tensor = module.compute_bias(length + attention.past() + queries, length)
        return bias[:, :, -queries:]

    def _look_for_distances(self, host: nn.Module) -> None:
        """Note the module that has the table of biases: of all layers only the first; the others get what it
        made.
        """
        if not getattr(host, "has_relative_attention_bias", False):
            return
        first = self._first.module
        known = first._knows_distances
        if known is None or known.module is not host:
            first._knows_distances = Reference(host)


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
        """Keys and values of one layer, ``(length, columns)``; only the columns of that layer are computed.

        Args:
            columns: where they begin and end among those of all layers.
        """
        hidden = self.transform[1](self.transform[0](self.embedding.weight))
        last = cast("nn.Linear", self.transform[2])
        return F.linear(hidden, last.weight[slice(*columns)], last.bias[slice(*columns)])


class CountedPrefix(InputPart):
    """Moves the positions of the tokens behind the prefix."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.shift = length


def narrow(config: PrefixTuningConfig, places: Sequence[Place], candidates: Sequence[Place]) -> list[Place]:
    """The attention modules that were selected, and what takes the positions if the prefix is counted.

    Args:
        config: the adapter's.
        places: those that were selected.
        candidates: all that the model has.

    Raises:
        ConfigError: the prefix is to be counted, and nothing takes positions.
    """
    attending = [place for place in places if place.layer.kind == "attending"]
    if config.count_positions is False:
        return attending
    taking = _taking_positions(config, candidates)
    counts_distances = any(getattr(place.host, "has_relative_attention_bias", False) for place in attending)
    if config.count_positions and not taking and not counts_distances:
        raise ConfigError(
            "count_positions: this model takes no position_ids, so its tokens cannot be moved behind the "
            "prefix"
        )
    return [*attending, *taking]


def _taking_positions(config: PrefixTuningConfig, candidates: Sequence[Place]) -> list[Place]:
    """The inputs whose tokens can be moved behind the prefix.

    Where the config asks for that, also those that make positions themselves and can be told of others; by
    default only those that are given positions.
    """
    of_decoder = "self" in config.attention or "cross" in config.attention
    roles = (INPUT, DECODER_INPUT if of_decoder else ENCODER_INPUT)
    inputs = [place for place in candidates if place.layer.kind == "input" and place.role in roles]
    taking = [place for place in inputs if place.takes(Kind.POSITIONS)]
    if config.count_positions and not taking:
        return [place for place in inputs if embeds_positions(place.host)]
    return taking


class PrefixFiles(PackedFiles[PrefixTuningConfig]):
    """The files of prefix tuning: keys and values of all layers side by side in one tensor."""

    def config_values(
        self,
        config: PrefixTuningConfig,
        values: Mapping[str, Any],
        parts: Parts,
        layers: Mapping[str, Layer],
    ) -> Mapping[str, Any]:
        """The sizes, as `peft` completes them from the model, and whether positions are counted; the
        arguments are those of `MethodFiles`.
        """
        prefixes = _prefixes(parts)
        if not prefixes:
            return {}
        first = next(iter(prefixes.values()))
        changed: dict[str, Any] = {
            "num_layers": len(prefixes),
            "token_dim": first.width,
            "num_attention_heads": first.heads,
            "encoder_hidden_size": values["encoder_hidden_size"] or first.width,
            "num_transformer_submodules": 1,
        }
        shifts_positions = any(isinstance(part, CountedPrefix) for part in parts.values())
        if not shifts_positions and not first.is_counted:
            changed["count_positions"] = False
        return changed

    def config_of(self, config: PrefixTuningConfig, tensors: Mapping[str, Tensor]) -> PrefixTuningConfig:
        """Without the MLP where the file holds only what it gave; for the attention that has a prefix of its
        own in the file.

        Args:
            config: as the file has it.
            tensors: by their names in the file.
        """
        attention = tuple(name for name in LOCATIONS if f"{PROMPT}.{name}" in tensors)
        return replace(
            config,
            prefix_projection=config.prefix_projection and has_encoder(tensors),
            attention=attention or config.attention,
        )

    def pack(self, config: PrefixTuningConfig, parts: Parts) -> Mapping[str, Tensor]:
        """Keys and values of all layers, the MLP that makes them, and the gates, by their names in the file.

        Args:
            config: the adapter's.
            parts: its parts, by path.
        """
        prefixes = _prefixes(parts)
        with torch.no_grad():
            tensors = {PROMPT: torch.cat([part.numbers() for part in prefixes.values()], 1)}
        for path, part in prefixes.items():
            if part.encoder is not None:
                tensors |= encoder_tensors(part.encoder)
            if part.gate is not None:
                for name, tensor in part.gate.named_parameters():
                    tensors[f"{self.prefix}{path}.gate.{name}"] = tensor
        return tensors

    def unpack(
        self,
        config: PrefixTuningConfig,
        tensors: Mapping[str, Tensor],
        targets: Sequence[FileTarget],
    ) -> Mapping[str, Tensor]:
        """The MLP for the first layer, else the keys and values of each; the arguments are those of
        `PackedFiles`.

        Raises:
            CheckpointError: something is missing or misshapen.
        """
        by_path = without_prefix(tensors, self.prefix)
        if config.prefix_projection:
            for target in targets:
                if has_encoder_tensors(target):
                    return by_path | encoder_by_path(tensors, target.path)
        prefixes = [target for target in targets if "prefix" in target.tensors]
        # `peft` counts the two stacks of an encoder-decoder as two, and lays the numbers out for both.
        if config.num_transformer_submodules == 2 and PROMPT in tensors:
            return by_path | _from_peft(config, tensors[PROMPT], prefixes)
        for name, group in _by_location(tensors, prefixes).items():
            if not group:
                continue
            widths = [target.tensors["prefix"][1] for target in group]
            shape = (config.num_virtual_tokens, sum(widths))
            prefix_of_each = split(tensors, widths, 1, shape, name)
            for target, prefix in zip(group, prefix_of_each, strict=True):
                by_path[join(target.path, "prefix")] = prefix
        return by_path


def _by_location(
    tensors: Mapping[str, Tensor], prefixes: Sequence[FileTarget]
) -> dict[str, list[FileTarget]]:
    """The targets whose keys and values lie in one tensor of a file, by its name there.

    That is one tensor for all attention, or one for each location of it.
    """
    if PROMPT in tensors or not any(name.startswith(f"{PROMPT}.") for name in tensors):
        return {PROMPT: list(prefixes)}
    groups = {}
    for location, role in LOCATIONS.items():
        groups[f"{PROMPT}.{location}"] = [target for target in prefixes if target.role == role]
    return groups


def _prefixes(parts: Parts) -> dict[str, PrefixPart]:
    """The prefixes among the parts of an adapter, by path."""
    result = {}
    for path, part in parts.items():
        if isinstance(part, PrefixPart):
            result[path] = part
    return result


def _from_peft(
    config: PrefixTuningConfig, numbers: Tensor, targets: Sequence[FileTarget]
) -> dict[str, Tensor]:
    """`peft`'s numbers for an encoder-decoder: those of layer 2 i, counted in a circle, serve layer i of the
    decoder.

    It lays them out for self- and cross-attention in turns, and then leaves those of cross-attention out.

    Raises:
        CheckpointError: they are not those of so many layers of this size.
    """
    layers = config.num_layers or len(targets)
    shape: Size = targets[0].tensors["prefix"]
    wanted = (shape[0], layers * shape[1])
    if tuple(numbers.shape) != wanted or len(targets) > layers:
        raise CheckpointError(
            f"{PROMPT!r} is {tuple(numbers.shape)} in the file and {wanted} for {layers} layers here"
        )
    # Side by side, layer by layer.
    of_layers = torch.split(numbers, shape[1], 1)
    by_path = {}
    for index, target in enumerate(targets):
        by_path[join(target.path, "prefix")] = of_layers[2 * index % layers]
    return by_path


@method(
    "prefix_tuning",
    title="Prefix tuning",
    config=PrefixTuningConfig,
    layers={"attending", "input"},
    default_roles=lambda config: ({LOCATIONS[name] for name in config.attention},),
    inert=False,
    mergeable=False,
    source="Li & Liang 2021, https://arxiv.org/abs/2101.00190",
    example=partial(PrefixTuningConfig, num_virtual_tokens=5),
    narrow=narrow,
    files=PrefixFiles(),
)
def prefix_part(config: PrefixTuningConfig, place: Place) -> Part:
    """The part for one attention module, or for what takes the input.

    Args:
        config: the adapter's.
        place: of those that `narrow` gives.
    """
    if place.layer.kind == "attending":
        return PrefixPart(config, place)
    return CountedPrefix(config.num_virtual_tokens)
