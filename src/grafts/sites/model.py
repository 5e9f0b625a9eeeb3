"""The model site: at the base model's own call, where virtual tokens come in front of the input and go from the output.

They are put in when a sequence begins (at an empty cache). Mask, positions and token types follow; their positions are cut
off what the model gives, so that heads, labels and ``generate`` need to know nothing of them. A cache that holds them says
its length without them to everyone but the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.errors import StateError
from grafts.sites.site import Part, Site


class ModelPart(Part):
    """What one adapter holds at a module that takes the tokens' embeddings.

    Attributes:
        length: how many virtual tokens it puts in.
        shift: by how much it moves the positions of the tokens besides.
        after_first: its virtual tokens come after the first token of each row (BOS, CLS) and not before it.
        kept: their positions stay in the output (of an encoder, whose decoder attends to them).
        encoder_length: how many positions the encoder's output has more than its mask, for a decoder.
    """

    length: int = 0
    shift: int = 0
    after_first: bool = False
    kept: bool = False
    encoder_length: int = 0

    def virtual(self) -> Tensor:
        """The embeddings of the virtual tokens, ``(length, embedding size)``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Room:
    """What virtual tokens take up at the beginning of a batch of sequences.

    Rows that have fewer of them than others have empty positions, which nothing attends to.

    Attributes:
        count: how many positions.
        own: how many tokens each row has of its own at the beginning.
        lengths: how many virtual tokens each row has, ``(batch, 1)``; None where all have ``count``.
        after_first: they stand after the first token of each row.
        snug: they stand right before a row's first token that is no padding, where distances count (windows, relative
            positions); elsewhere before the padding, which comes to the same.
        gap_last: a row's empty positions come after its tokens (for a pooler that reads the first one), and not before.
    """

    count: int
    own: int
    lengths: Tensor | None
    after_first: bool
    snug: bool
    gap_last: bool

    @property
    def even(self) -> bool:
        """Whether the virtual tokens of all rows simply come first."""
        return self.lengths is None and not self.after_first and not self.snug

    def first(self, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Before which of a row's own tokens the virtual ones stand, ``(batch, 1)``."""
        if mask is None or not (self.after_first or self.snug):
            return torch.full((batch, 1), int(self.after_first), device=device)
        return mask[:, : self.own].ne(0).to(torch.long).argmax(1, keepdim=True) + int(self.after_first)

    def _lead(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many virtual tokens each row has, and how many empty positions come first, ``(batch, 1)`` each."""
        lengths = torch.full((batch, 1), self.count, device=device) if self.lengths is None else self.lengths.to(device)
        return lengths, torch.zeros_like(lengths) if self.gap_last else self.count - lengths

    def inserted(self, own: Tensor, new: Tensor | None, first: Tensor) -> Tensor:
        """``own`` with what belongs to the virtual tokens among it.

        Args:
            own: what belongs to the tokens, ``(batch, tokens, ...)``; those after the beginning stay where they are.
            new: what belongs to the virtual tokens, ``(batch, count, ...)``, those of a row first; ones if not given.
            first: before which of a row's own tokens they stand, ``(batch, 1)``.

        Returns:
            ``(batch, count + tokens, ...)``, zeros at empty positions.
        """
        if new is None:
            new = torch.ones(own.shape[0], self.count, *own.shape[2:], dtype=own.dtype, device=own.device)
        if self.even:
            return torch.cat([new, own], 1)
        lengths, gap = self._lead(own.shape[0], own.device)
        place = torch.arange(self.count + self.own, device=own.device)[None] - gap
        empty = self.count + self.own
        index = torch.where(place < first, self.count + place, place - first)  # own tokens, or virtual ones
        index = torch.where(place >= first + lengths, self.count + place - lengths, index)
        index = torch.where((place < 0) | (place >= lengths + self.own), empty, index)
        both = torch.cat([new, own[:, : self.own], torch.zeros_like(own[:, :1])], 1)
        return torch.cat([_taken(both, index), own[:, self.own :]], 1)

    def tokens(self, first: Tensor) -> Tensor:
        """Where a row's own tokens have gone, ``(batch, own)``."""
        lengths, gap = self._lead(first.shape[0], first.device)
        place = torch.arange(self.own, device=first.device)[None]
        return gap + torch.where(place < first, place, place + lengths)


def _taken(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """The positions ``index`` ``(batch, n)`` of ``x`` along ``dim``."""
    shape = [index.shape[0], *[1] * (x.dim() - 1)]
    shape[dim] = index.shape[1]
    full = [index.shape[0], *x.shape[1:]]
    full[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(full))


class CacheView:
    """What a cache says of its length: with virtual tokens to the model, while it runs, and without them to everyone else.

    It answers for two of the cache's methods, as attributes of the cache, and is copied and pickled with it.
    """

    def __init__(self, cache: Any, room: Room) -> None:
        self.room, self.inside = room, True
        cache.__dict__.update(get_seq_length=_Length(cache, self), crop=_Crop(cache, self))

    @staticmethod
    def of(cache: Any) -> CacheView | None:
        """The view of a cache, or None where it holds no virtual tokens."""
        answers = None if cache is None else getattr(cache, "__dict__", {}).get("get_seq_length")
        return answers.view if isinstance(answers, _Length) else None


class _Length:
    """A cache's ``get_seq_length``."""

    def __init__(self, cache: Any, view: CacheView) -> None:
        self.cache, self.view = cache, view

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The number of tokens in the cache."""
        length = type(self.cache).get_seq_length(self.cache, *args, **kwargs)
        if self.view.inside:
            return length
        less = length - self.view.room.count
        return less.clamp_min(0) if isinstance(less, Tensor) else max(less, 0)


class _Crop:
    """A cache's ``crop``."""

    def __init__(self, cache: Any, view: CacheView) -> None:
        self.cache, self.view = cache, view

    def __call__(self, max_length: int) -> Any:
        """Forget the last ``-max_length`` tokens; in older versions, where it may be positive, all but the first."""
        return type(self.cache).crop(self.cache, max_length + self.view.room.count if max_length > 0 else max_length)


def _forget_view(cache: Any) -> None:
    """Let a cache answer for itself again."""
    for name in ("get_seq_length", "crop"):
        cache.__dict__.pop(name, None)


class ModelSite(Site):
    """All adapters at one module that takes the tokens' embeddings."""

    child = "grafts_model"
    _room: Room | None = None
    _shift: int | Tensor = 0
    _own: Tensor | int = 0  # where the tokens are in the output, or how many positions come before them

    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Act before and after the module."""
        self.names = tuple(inspect.signature(type(host).forward).parameters)[1:]
        handles = (
            host.register_forward_pre_hook(self._before, with_kwargs=True),
            host.register_forward_hook(self._after, with_kwargs=True),
        )
        if "position_ids" in self.names or not embeds_positions(host):
            return handles
        positions = host.get_submodule("embed_positions")
        self.position_names = tuple(inspect.signature(type(positions).forward).parameters)[1:]
        return (*handles, positions.register_forward_pre_hook(self._positions, with_kwargs=True))

    def _positions(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Move the positions of a model that makes them itself."""
        shift = self._shift
        if isinstance(shift, int) and shift == 0:
            return None
        if isinstance(shift, Tensor):
            if bool((shift != shift[:1]).any()):
                raise StateError(
                    "adapter_names: this model makes its positions itself, so its rows cannot count other prefixes"
                )
            shift = int(shift[0])
        given = {**dict(zip(self.position_names, args, strict=False)), **kwargs}
        if given.get("position_ids") is not None:
            return (), given | {"position_ids": given["position_ids"] + shift}
        return (), given | {"past_key_values_length": given.get("past_key_values_length", 0) + shift}

    def acts(self) -> bool:
        """Whether some adapter may act here now."""
        keys = self.setup.running if self.setup.rows is None else self.setup.rows.keys
        return any(key in self.children_of for key in keys)

    def _before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        view = CacheView.of(cache)
        self._room = None
        if view is None and not self.acts():
            return None
        if view is not None:
            view.inside = True
        past = _past(cache, given.get("cache_position"), view)
        embeds = given.get("inputs_embeds")
        tokens = given.get("input_ids") if embeds is None else embeds
        if tokens is None:
            return None
        batch = tokens.shape[0]
        shift, encoder = self._numbers("shift", batch, tokens), self._numbers("encoder_length", batch, tokens)
        self._shift = shift
        if past == 0:
            if view is not None:
                _forget_view(cache)
            room = self._begin(given, host, batch, tokens)
        else:
            room = None if view is None else view.room
            if room is not None and not room.count:
                room = None
        self._room = room
        self._move(given, host, room, past, tokens, shift)
        if "encoder_attention_mask" in self.names:
            after_first = any(part.after_first for _, parts in self._parts_by_row() for part in parts)
            _lengthen_encoder_mask(given, encoder, batch, after_first=after_first, snug=_counts_distances(host))
        return (), given

    def _parts_by_row(self) -> list[tuple[str | None, list[ModelPart]]]:
        """The parts that act now; by the key of their adapter where rows choose."""
        rows = self.setup.rows
        if rows is None:
            return [(None, cast(list[ModelPart], self.running()))]
        result: dict[str, list[ModelPart]] = {key: [] for key in rows.keys}
        for key, part in self.routed(rows):
            result[key].append(cast(ModelPart, part))
        return list(result.items())

    def _numbers(self, name: str, batch: int, like: Tensor) -> int | Tensor:
        """The sum of an attribute of the parts: one number, or one for each row, ``(batch, 1)``."""
        groups = self._parts_by_row()
        if self.setup.rows is None:
            return sum(int(getattr(part, name)) for part in groups[0][1])
        result = torch.zeros(batch, 1, dtype=torch.long, device=like.device)
        for key, parts in groups:
            assert key is not None
            where = self.setup.rows.of(key, batch, like.device)
            result[where] = sum(getattr(part, name) for part in parts)
        return result

    def _begin(self, given: dict[str, Any], host: nn.Module, batch: int, tokens: Tensor) -> Room | None:
        """Put virtual tokens among ``inputs_embeds``; returns the room that they take."""
        groups = [(key, [part for part in parts if part.length]) for key, parts in self._parts_by_row()]
        parts = [part for _, some in groups for part in some]
        if not parts:
            return None
        if len({part.after_first for part in parts}) > 1:
            raise StateError("adapters whose virtual tokens come before and after the first token cannot act together")
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = host.get_input_embeddings()(given["input_ids"])  # type: ignore[operator]
        pooled = getattr(host, "pooler", None) is not None
        snug = given.get("attention_mask") is not None and _counts_distances(host)
        if self.setup.rows is None:
            virtual = torch.cat([part.virtual() for part in parts]).to(embeds.dtype)
            room = Room(virtual.shape[0], tokens.shape[1], None, parts[0].after_first, snug, pooled)
            virtual = virtual.expand(batch, -1, -1)
        else:
            count = max(sum(part.length for part in some) for _, some in groups)
            virtual = embeds.new_zeros(batch, count, embeds.shape[-1])
            lengths = torch.zeros(batch, 1, dtype=torch.long, device=embeds.device)
            for key, some in groups:
                if some:
                    assert key is not None
                    where = self.setup.rows.of(key, batch, embeds.device)
                    own = torch.cat([part.virtual() for part in some]).to(embeds.dtype)
                    padded = nn.functional.pad(own, (0, 0, 0, count - own.shape[0])).expand(where.shape[0], -1, -1)
                    virtual = virtual.index_copy(0, where, padded)
                    lengths[where] = own.shape[0]
            even = None not in self.setup.rows.names and len({sum(part.length for part in some) for _, some in groups}) == 1
            room = Room(count, tokens.shape[1], None if even else lengths, parts[0].after_first, snug, pooled)
        first = room.first(given.get("attention_mask"), batch, embeds.device)
        given["inputs_embeds"] = room.inserted(embeds, virtual, first)
        if "input_ids" in given:
            given["input_ids"] = None
        if (types := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = room.inserted(types, types.new_zeros(batch, room.count), first)
        if any(part.kept for part in parts):
            self._own = 0
        else:
            self._own = room.count if room.even else room.tokens(first)
        _make_room(given.get("past_key_values"), room.count, getattr(getattr(host, "config", None), "sliding_window", None))
        return room

    def _move(
        self, given: dict[str, Any], host: nn.Module, room: Room | None, past: int, tokens: Tensor, shift: int | Tensor
    ) -> None:
        """Let mask and positions follow the virtual tokens.

        Args:
            given: the call's arguments, to be changed.
            host: the module.
            room: what the virtual tokens take up, in this call or in the cache, or None.
            past: how many positions the cache holds.
            tokens: what comes new, ``(batch, tokens, ...)``.
            shift: how much further the tokens' positions are moved.
        """
        (batch, new), device = tokens.shape[:2], tokens.device
        count = 0 if room is None else room.count
        first = None
        if room is not None:
            first = self._masked(given, room, past, batch, new, device)
        if given.get("cache_position") is not None:
            given["cache_position"] = torch.arange(past, past + new + (0 if past else count), device=device)
        uneven = room is not None and room.lengths is not None
        positions = given.get("position_ids")
        if positions is None and not uneven and not (room and room.snug) and not isinstance(shift, Tensor) and shift == 0:
            return
        if "position_ids" not in self.names:
            relative = hasattr(getattr(host, "config", None), "relative_attention_num_buckets")
            if uneven and not relative and (past or not cast(Room, room).gap_last):
                raise StateError(
                    f"adapter_names: a {type(host).__name__} takes no position_ids, so its rows cannot have different "
                    "numbers of virtual tokens"
                )
            return
        if positions is None:
            begin = past - count if past else 0
            positions = torch.arange(begin, begin + new, device=device)[None]
        if room is None:
            given["position_ids"] = positions + shift
            return
        lengths = count if room.lengths is None else room.lengths
        if past:
            given["position_ids"] = positions + shift + lengths
            return
        assert first is not None
        positions = positions.expand(batch, -1)
        start = positions.gather(1, first - 1) + 1 if room.after_first else torch.zeros_like(first)
        virtual = start + torch.arange(count, device=device)[None]
        moved = torch.where(torch.arange(new, device=device)[None] >= first, positions + lengths, positions)
        given["position_ids"] = room.inserted(moved + shift, virtual + shift, first)

    def _masked(self, given: dict[str, Any], room: Room, past: int, batch: int, new: int, device: torch.device) -> Tensor:
        """Let the mask follow; returns before which of a row's own tokens the virtual ones stand, ``(batch, 1)``."""
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise StateError("virtual tokens need a mask of the shape (batch, tokens), or none")
        first = room.first(mask, batch, device)
        if mask is None and room.lengths is not None:
            mask = torch.ones(batch, past + new - (room.count if past else 0), dtype=torch.long, device=device)
        if mask is not None:
            given["attention_mask"] = room.inserted(mask, None, first)
        return first

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = kwargs.get("past_key_values")
        view = CacheView.of(given)
        room, self._room, self._shift = self._room, None, 0
        if room is not None:
            cache = given if given is not None else _cache_in(output)
            if view is None and hasattr(cache, "get_seq_length"):
                view = CacheView(cache, room)
        if view is not None:
            view.inside = False
        own, self._own = self._own, 0
        if room is None or (isinstance(own, int) and own == 0):
            return output
        return _cut(output, own, room.count + room.own)


ModelPart.site = ModelSite


def embeds_positions(host: nn.Module) -> bool:
    """Whether a module makes positions itself and embeds them in a child that can be told of others (BART's decoder)."""
    child = getattr(host, "embed_positions", None)
    return isinstance(child, nn.Module) and "past_key_values_length" in inspect.signature(type(child).forward).parameters


def _past(cache: Any, position: Tensor | None, view: CacheView | None) -> int:
    """How many positions a cache holds, virtual tokens too."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    if position is None:
        return int(cache.get_seq_length())
    begin = int(position[0])  # older static caches cannot count padding; callers count tokens
    return begin + view.room.count if begin and view is not None else begin


def _cache_in(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("past_key_values")
    return next((value for value in output if hasattr(value, "get_seq_length")), None) if isinstance(output, tuple) else None


def _cut(value: Any, own: Tensor | int, length: int) -> Any:
    """An output, or several, with the tokens' own positions only: hidden states ``(batch, positions, size)`` and what
    attention has done from them, ``(batch, heads, positions, keys)``.

    Args:
        value: the output.
        own: the tokens' positions, ``(batch, tokens)``, or how many positions come before them.
        length: how many positions there are.
    """
    if isinstance(value, Mapping):
        for name in list(value):
            value[name] = _cut(value[name], own, length)  # type: ignore[index]
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(item, own, length) for item in value)
    dim = {3: 1, 4: 2}.get(value.dim(), 0) if isinstance(value, Tensor) else 0
    if not dim or value.shape[dim] != length:
        return value
    return value.narrow(dim, own, length - own) if isinstance(own, int) else _taken(value, own, dim)


def _counts_distances(host: nn.Module) -> bool:
    """Whether it matters to a model how many positions, padding too, lie between two tokens."""
    config = getattr(host, "config", None)
    return any(getattr(config, name, None) is not None for name in ("sliding_window", "relative_attention_num_buckets"))


def _lengthen_encoder_mask(given: dict[str, Any], lengths: int | Tensor, batch: int, *, after_first: bool, snug: bool) -> None:
    """Let a decoder see the virtual tokens of its encoder.

    Args:
        given: the decoder's arguments, to be changed.
        lengths: how many there are, or how many each row has, ``(batch, 1)``.
        batch: how many rows.
        after_first: whether they stand after the first token.
        snug: whether they stand after padding.
    """
    states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    if states is None or (isinstance(lengths, int) and lengths == 0):
        return
    count = lengths if isinstance(lengths, int) else int(lengths.max())
    own = states.shape[1] - count
    if mask is None and isinstance(lengths, Tensor):
        mask = torch.ones(batch, own, dtype=torch.long, device=states.device)
    if mask is not None and mask.dim() == 2 and mask.shape[1] == own:
        room = Room(count, own, None if isinstance(lengths, int) else lengths, after_first, snug, False)
        given["encoder_attention_mask"] = room.inserted(mask, None, room.first(mask, batch, mask.device))


def _make_room(cache: Any, count: int, window: int | None) -> None:
    """Enlarge an empty static cache, which was made for the tokens alone, by ``count`` positions.

    Args:
        cache: the cache, or None.
        count: how many virtual tokens come.
        window: of the model's attention, beyond which layers that slide need no room.
    """
    one = getattr(cache, "self_attention_cache", cache)
    layers = [layer for layer in getattr(one, "layers", ()) if hasattr(layer, "max_cache_len")]
    more = count - getattr(cache, "__dict__", {}).get("grafts_room", 0)
    if not layers or more <= 0:
        return
    for layer in layers:
        slides = getattr(layer, "is_sliding", False) and window is not None
        layer.max_cache_len = (
            min(layer.max_cache_len + more, max(window, layer.max_cache_len)) if slides else layer.max_cache_len + more
        )
        layer.is_initialized = False
    cache.__dict__["grafts_room"] = count
