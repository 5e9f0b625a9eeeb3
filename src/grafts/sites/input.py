"""The model site: at the base model's own call, where virtual tokens come in front of the input and go from
the output.

They are put in when a sequence begins (at an empty cache). Mask, positions and token types follow; their
positions are cut off what the model gives, so that heads, labels and ``generate`` need to know nothing of
them. A cache that holds them says its length without them to everyone but the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.errors import StateError
from grafts.sites.arguments import (
    PER_LAYER_INPUTS,
    CallArguments,
    CallSignature,
    Kind,
    cache_in,
    is_cache,
    offset_parameter,
    says_length,
    versions,
)
from grafts.sites.cache_view import CacheView, enlarge_cache, forget_view, past_of
from grafts.sites.site import Part, Site
from grafts.sites.virtual_positions import PromptLayout, at_positions


class InputPart(Part):
    """What one adapter holds at a module that takes the tokens' embeddings.

    Attributes:
        length: how many virtual tokens it puts in.
        shift: by how much it moves the positions of the tokens besides.
        after_first: its virtual tokens come after the first token of each row (BOS, CLS) and not before it.
        after_embeddings: they come among what the module's child ``embeddings`` gives, so without positions
            and norms of their own.
        kept: their positions stay in the output (of an encoder, whose decoder attends to them).
        encoder_length: how many positions the encoder's output has more than its mask, for a decoder.
    """

    length: int = 0
    shift: int = 0
    after_first: bool = False
    after_embeddings: bool = False
    kept: bool = False
    encoder_length: int = 0

    def virtual_tokens(self) -> Tensor:
        """The embeddings of the virtual tokens, ``(length, embedding size)``."""
        raise NotImplementedError

    def embed(self, host: nn.Module) -> nn.Module:
        """What makes embeddings of tokens in ``host``."""
        return cast("nn.Module", host.get_input_embeddings())  # type: ignore[operator]


class TokenObserver(InputPart):
    """A part that puts nothing in, and is told of the tokens of each call."""

    def observe(self, number: Tensor, left: Tensor, past: int) -> None:
        """A call begins.

        Args:
            number: of each position among the real tokens of its row, those before this call too,
                ``(batch, positions)``; -1 where there is padding or a virtual token.
            left: how many real tokens of the row come after it, ``(batch, positions)``; -1 likewise.
            past: how many tokens the cache holds.
        """
        raise NotImplementedError


_Groups = list[
    tuple[str | None, list[InputPart]]
]  # the parts that act, by the key of their adapter where rows choose


class InputSite(Site):
    """All adapters at one module that takes the tokens' embeddings."""

    child = "grafts_model"
    _room: PromptLayout | None = None
    _shift: int | Tensor = 0
    _pending: tuple[PromptLayout, Tensor, Tensor] | None = None  # what the embeddings are to be given
    _own: Tensor | int = 0  # where the tokens are in the output, or how many positions come before them
    _counted: int | None = (
        None  # how many positions the cache has to hold after the present call, which begins a sequence
    )

    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Act before and after the module."""
        self.signature = CallSignature(type(host).forward)
        handles: tuple[RemovableHandle, ...] = (
            host.register_forward_pre_hook(self._before, with_kwargs=True),
            host.register_forward_hook(self._after, with_kwargs=True),
        )
        if isinstance(embeddings := getattr(host, "embeddings", None), nn.Module):
            handles = (*handles, embeddings.register_forward_hook(self._embedded))
        if self.signature.takes(Kind.POSITIONS) or not embeds_positions(host):
            return handles
        positions = host.get_submodule("embed_positions")
        self.embedded_signature = CallSignature(type(positions).forward)
        self.offset = offset_parameter(type(positions))
        return (*handles, positions.register_forward_pre_hook(self._positions, with_kwargs=True))

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put virtual tokens among what the embeddings have become."""
        if self._pending is None:
            return output
        (room, virtual, first), self._pending = self._pending, None
        return room.inserted(output, virtual.to(output.dtype), first)

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
                    "adapter_names: this model makes its positions itself, so its rows cannot count other "
                    "prefixes"
                )
            shift = int(shift[0])
        given = self.embedded_signature.bind(args, kwargs)
        positions = given.get(Kind.POSITIONS)
        if positions is not None:
            given.set(Kind.POSITIONS, positions + shift)
        else:
            assert self.offset is not None
            given.values[self.offset] = given.values.get(self.offset, 0) + shift
        return given.passed_on()

    def _before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = self.signature.bind(args, kwargs)
        self._room, self._counted = None, None
        # A cache that holds virtual tokens has to be known also where nothing acts any more.
        cache = given.get(Kind.CACHE)
        view = CacheView.of(cache)
        if view is None and not self.acts():
            return None
        given.refuse_unknown_tokens(host)
        embeds = given.get(Kind.EMBEDDINGS)
        tokens = given.get(Kind.TOKENS) if embeds is None else embeds
        groups = self._parts_by_row()
        acting = [part for _, parts in groups for part in parts]
        puts = any(part.length for part in acting)
        placed = puts or view is not None
        listens = any(isinstance(part, TokenObserver) for part in acting)
        # Where positions are given and nothing is put in, the cache need not be asked, which on a GPU takes
        # time.
        asks = placed or listens or given.get(Kind.POSITIONS) is None
        past = self._past(host, given, view, puts=puts, listens=listens) if asks else 0
        batch = tokens.shape[0]
        if puts and past > 0 and view is None:
            raise StateError(
                f"the cache holds {past} tokens and no virtual tokens in front of them, which the acting "
                "adapters put in where a sequence begins: begin with an empty cache, or go on with the "
                "adapters that it was made with"
            )
        shift = self._shift = self._numbers(groups, "shift", batch, tokens)
        if past == 0 and placed:
            if view is not None:
                forget_view(cache)
            room = self._begin(groups, given, host, batch, tokens)
        else:
            room = None if view is None else view.room
            if room is not None and not room.count:
                room = None
        self._room = room
        # Where the call says itself how many tokens came before, there is nothing to doubt.
        if (
            asks
            and past == 0
            and given.get(Kind.CACHE_POSITIONS) is None
            and not torch.compiler.is_compiling()
        ):
            self._counted = tokens.shape[1] + (0 if room is None else room.count)
        if listens:
            self._tell(groups, given, room, past, tokens)
        self._move(given, host, room, past, tokens, shift)
        if self.signature.takes(Kind.ENCODER_MASK):
            encoder = self._numbers(groups, "encoder_length", batch, tokens)
            after_first = any(part.after_first for part in acting)
            _lengthen_encoder_mask(
                given, encoder, batch, after_first=after_first, before_text=_counts_distances(host)
            )
        if view is not None:
            view.inside = True
        return given.passed_on()

    def _past(
        self, host: nn.Module, given: CallArguments, view: CacheView | None, *, puts: bool, listens: bool
    ) -> int:
        """How many positions came before, virtual tokens too, of a call that carries nothing that is not
        known.

        Args:
            host: the module.
            given: the call's arguments.
            view: of the cache, where it holds virtual tokens.
            puts: a part acts that puts virtual tokens in, if this call begins a sequence.
            listens: a part acts that counts tokens.

        Raises:
            StateError: something that an acting part has to know is not recognised.
        """
        if puts or listens:
            _require_padded(given, _PLACED if puts else _COUNTED)
        given.refuse_unknown_cache(host)
        if view is not None:
            view.inside = True
        past = past_of(given.get(Kind.CACHE), given.get(Kind.CACHE_POSITIONS), view)
        if view is not None:
            view.inside = False
        # A cache that was emptied since holds virtual tokens no more, whatever its view says.
        if puts or (view is not None and past > 0):
            given.refuse_unknown_of_tokens(host, past)
        if listens:
            given.refuse_unknown_mask(host, past)
        return past

    def _tell(
        self, groups: _Groups, given: CallArguments, room: PromptLayout | None, past: int, tokens: Tensor
    ) -> None:
        """Tell the parts that listen which tokens there are.

        Args:
            groups: the parts that act now.
            given: the call's arguments, before they follow virtual tokens.
            room: what virtual tokens take up, in this call or in the cache.
            past: how many positions the cache holds.
            tokens: what comes new, ``(batch, tokens, ...)``.
        """
        (batch, new), mask = tokens.shape[:2], given.get(Kind.MASK)
        before = past - room.count if room is not None and past else past
        _require_rows(given, _COUNTED)
        real = torch.ones(batch, before + new, dtype=torch.long, device=tokens.device)
        if mask is not None:
            real = mask[:, : before + new].ne(0).to(torch.long)
        count = real.cumsum(1)
        absent = torch.full_like(count, -1)
        number = torch.where(real.bool(), count - 1, absent)[:, -new:]
        left = torch.where(real.bool(), count[:, -1:] - count, absent)[:, -new:]
        if room is not None and not past:
            first = room.first(mask, batch, tokens.device)
            number, left = (
                room.inserted(x + 1, x.new_zeros(batch, room.count), first) - 1 for x in (number, left)
            )
        for key, parts in groups:
            where = (
                None
                if key is None or self.setup.rows is None
                else self.setup.rows.of(key, batch, tokens.device)
            )
            for part in (x for x in parts if isinstance(x, TokenObserver)):
                heard, behind = ((x if where is None else x.index_select(0, where)) for x in (number, left))
                part.observe(heard, behind, before)

    def _parts_by_row(self) -> _Groups:
        """The parts that act now; by the key of their adapter where rows choose."""
        rows = self.setup.rows
        if rows is None:
            return [(None, cast("list[InputPart]", self.running()))]
        result: dict[str, list[InputPart]] = {key: [] for key in rows.keys}
        for key, part in self.routed(rows):
            result[key].append(cast("InputPart", part))
        return list(result.items())

    def _numbers(self, groups: _Groups, name: str, batch: int, like: Tensor) -> int | Tensor:
        """The sum of an attribute of the parts: one number, or one for each row, ``(batch, 1)``."""
        if self.setup.rows is None:
            return sum(int(getattr(part, name)) for part in groups[0][1])
        result = torch.zeros(batch, 1, dtype=torch.long, device=like.device)
        for key, parts in groups:
            assert key is not None
            where = self.setup.rows.of(key, batch, like.device)
            result[where] = sum(getattr(part, name) for part in parts)
        return result

    def _require_replaceable(self, host: nn.Module) -> None:
        """Refuse to give embeddings in place of token ids to a model that makes more of the ids (Gemma 3n,
        Gemma 4).

        Raises:
            StateError: naming what it makes.
        """
        if PER_LAYER_INPUTS in self.signature.parameters:
            raise StateError(
                f"a {type(host).__name__} makes {PER_LAYER_INPUTS} of its token ids, which virtual tokens do "
                "not have and which embeddings in place of the ids would lose: choose a method without "
                "virtual tokens"
            )

    def _begin(
        self, groups: _Groups, given: CallArguments, host: nn.Module, batch: int, tokens: Tensor
    ) -> PromptLayout | None:
        """Put virtual tokens among ``inputs_embeds``; returns the room that they take."""
        groups = [(key, [part for part in parts if part.length]) for key, parts in groups]
        parts = [part for _, some in groups for part in some]
        if not parts:
            return None
        _require_rows(given, _PLACED)
        if len({part.after_first for part in parts}) > 1:
            raise StateError(
                "adapters whose virtual tokens come before and after the first token cannot act together"
            )
        if len({part.after_embeddings for part in parts}) > 1:
            raise StateError(
                "adapters whose virtual tokens come before and after the embeddings cannot act together"
            )
        embeds, mask = given.get(Kind.EMBEDDINGS), given.get(Kind.MASK)
        if embeds is None:
            self._require_replaceable(host)
            embeds = parts[0].embed(host)(given.get(Kind.TOKENS))
        masked = parts[0].after_first and mask is not None and not torch.compiler.is_compiling()
        if masked and not bool(mask[:, : tokens.shape[1]].ne(0).any(1).all()):
            raise StateError(
                "virtual tokens that come after the first token need it in the call with which a sequence "
                "begins, and a row has nothing but padding there: pad on the right, or take longer chunks"
            )
        pooled, embedded = getattr(host, "pooler", None) is not None, parts[0].after_embeddings
        before_text = mask is not None and _counts_distances(host)
        if self.setup.rows is None:
            virtual = torch.cat([part.virtual_tokens() for part in parts]).to(embeds.device, embeds.dtype)
            room = PromptLayout(
                virtual.shape[0], tokens.shape[1], None, parts[0].after_first, before_text, pooled, embedded
            )
            virtual = virtual.expand(batch, -1, -1)
        else:
            count = max(sum(part.length for part in some) for _, some in groups)
            virtual = embeds.new_zeros(batch, count, embeds.shape[-1])
            lengths = torch.zeros(batch, 1, dtype=torch.long, device=embeds.device)
            for key, some in groups:
                if some:
                    assert key is not None
                    where = self.setup.rows.of(key, batch, embeds.device)
                    own = torch.cat([part.virtual_tokens() for part in some]).to(embeds.device, embeds.dtype)
                    padded = nn.functional.pad(own, (0, 0, 0, count - own.shape[0])).expand(
                        where.shape[0], -1, -1
                    )
                    virtual = virtual.index_copy(0, where, padded)
                    lengths[where] = own.shape[0]
            even = (
                None not in self.setup.rows.names
                and len({sum(part.length for part in some) for _, some in groups}) == 1
            )
            room = PromptLayout(
                count,
                tokens.shape[1],
                None if even else lengths,
                parts[0].after_first,
                before_text,
                pooled,
                embedded,
            )
        first = room.first(mask, batch, embeds.device)
        if embedded:
            self._pending = room, virtual, first
        else:
            if given.get(Kind.TOKENS) is not None:
                given.set(Kind.TOKENS, None)
            given.set(Kind.EMBEDDINGS, room.inserted(embeds, virtual, first))
            types = given.get(Kind.TOKEN_TYPES)
            if types is not None:
                given.set(
                    Kind.TOKEN_TYPES,
                    room.inserted(types, types.new_zeros(batch, room.count, *types.shape[2:]), first),
                )
        if any(part.kept for part in parts):
            self._own = 0
        else:
            self._own = room.count if room.even else room.tokens(first)
        enlarge_cache(
            given.get(Kind.CACHE), room.count, getattr(getattr(host, "config", None), "sliding_window", None)
        )
        return room

    def _move(
        self,
        given: CallArguments,
        host: nn.Module,
        room: PromptLayout | None,
        past: int,
        tokens: Tensor,
        shift: int | Tensor,
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
        if room is not None and room.embedded:  # its tokens have no positions, and the others keep theirs
            if "get_extended_attention_mask" in inspect.unwrap(type(host).forward).__code__.co_names:
                _square(given, batch, count + new, device)
            return
        if room is not None and given.get(Kind.CACHE_POSITIONS) is not None:
            given.set(
                Kind.CACHE_POSITIONS, torch.arange(past, past + new + (0 if past else count), device=device)
            )
        uneven = room is not None and room.lengths is not None
        positions = given.get(Kind.POSITIONS)
        if (
            positions is None
            and not uneven
            and not (room and room.before_text)
            and not isinstance(shift, Tensor)
            and shift == 0
        ):
            return
        if positions is None and not self.signature.takes(Kind.POSITIONS):
            relative = hasattr(getattr(host, "config", None), "relative_attention_num_buckets")
            if uneven and not relative and (past or not cast("PromptLayout", room).pads_after):
                raise StateError(
                    f"adapter_names: a {type(host).__name__} takes no position_ids, so its rows cannot have "
                    "different numbers of virtual tokens"
                )
            return
        if positions is None:
            begin = past - count if past else 0
            positions = torch.arange(begin, begin + new, device=device)[None]
        if room is None:
            given.set(Kind.POSITIONS, positions + shift)
            return
        lengths = count if room.lengths is None else room.lengths
        if past:
            given.set(Kind.POSITIONS, positions + shift + lengths)
            return
        assert first is not None
        if (
            positions.dim() == 3
        ):  # several for each token, of time, height and width: (kinds, batch or 1, tokens)
            several = [self._positioned(kind.expand(batch, -1), room, first, shift) for kind in positions]
            given.set(Kind.POSITIONS, torch.stack(several))
        else:
            given.set(Kind.POSITIONS, self._positioned(positions.expand(batch, -1), room, first, shift))

    @staticmethod
    def _positioned(positions: Tensor, room: PromptLayout, first: Tensor, shift: int | Tensor) -> Tensor:
        """The positions of the tokens, ``(batch, tokens)``, with those of the virtual tokens among them."""
        device = positions.device
        lengths = room.count if room.lengths is None else room.lengths
        start = positions.gather(1, first - 1) + 1 if room.after_first else torch.zeros_like(first)
        virtual = start + torch.arange(room.count, device=device)[None]
        moved = torch.where(
            torch.arange(positions.shape[1], device=device)[None] >= first, positions + lengths, positions
        )
        return room.inserted(moved + shift, virtual + shift, first)

    def _masked(
        self, given: CallArguments, room: PromptLayout, past: int, batch: int, new: int, device: torch.device
    ) -> Tensor:
        """Let the mask follow; returns before which of a row's own tokens the virtual ones stand,
        ``(batch, 1)``.
        """
        mask = given.get(Kind.MASK)
        _require_plain(mask, _PLACED)
        first = room.first(mask, batch, device)
        if mask is None and room.lengths is not None:
            mask = torch.ones(
                batch, past + new - (room.count if past else 0), dtype=torch.long, device=device
            )
        if mask is not None:
            given.set(Kind.MASK, room.inserted(mask, None, first))
        return first

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        room, self._room, self._shift = self._room, None, 0
        cache = self.signature.bind(args, kwargs).get(Kind.CACHE)
        counted, self._counted = self._counted, None
        view = CacheView.of(cache)
        if cache is None and (room is not None or counted is not None):
            cache = cache_in(output)  # the model has made one
        if counted is not None:
            _require_counted(host, cache, counted)
        if room is not None and view is None and is_cache(cache):
            view = CacheView(cache, room)
        if view is not None:
            view.inside = False
        own, self._own = self._own, 0
        if room is None or (isinstance(own, int) and own == 0):
            return output
        _require_positions(host, output, room.count + room.own)
        return _cut(output, own, room.count + room.own)


InputPart.site = InputSite

_PLACED, _COUNTED = "virtual tokens need", "an adapter that counts tokens needs"
_PACKED = "{} one sequence a row, and these lie packed in one row: pad them instead"


def _require_positions(host: nn.Module, output: Any, length: int) -> None:
    """Refuse an output of which nobody knows where the tokens are in it: of a module that changes how many
    there are.

    Raises:
        StateError: its hidden states have another number of positions than went in.
    """
    values = [output]
    if isinstance(output, Mapping):
        values = list(output.values())
    elif isinstance(output, tuple):
        values = list(output)
    for states in values:
        if not isinstance(states, Tensor) or states.dim() != 3:
            continue
        if states.shape[1] == length:
            return
        raise StateError(
            f"a {type(host).__name__} gives {states.shape[1]} positions for {length} that went in, so those "
            "of the virtual tokens cannot be told from the others: choose a method without virtual tokens"
        )


def _require_counted(host: nn.Module, cache: Any, counted: int) -> None:
    """Refuse to go on from a cache that holds something else than what was counted, once a sequence, when it
    begins.

    A cache that reached the model by a way that is not known makes every later call look like the beginning
    of another sequence. Where the model gives it back, as all of `transformers` do, this says so at the first
    such call.

    Args:
        host: the module that was called.
        cache: what it has put keys and values in, or None.
        counted: how many positions have to be in it.

    Raises:
        StateError: naming the versions.
    """
    if not says_length(cache):
        return
    held = int(cache.get_seq_length())
    if held != counted:
        raise StateError(
            f"the cache of a {type(host).__name__} holds {held} positions after a call in which its adapters "
            f"counted {counted}, so the next tokens would be wrong: call it with use_cache=False, and report "
            f"this with {versions()}"
        )


def _require_padded(given: CallArguments, who: str) -> None:
    """Refuse what says at first sight that sequences lie packed in one row.

    Raises:
        StateError: saying so.
    """
    _require_plain(given.get(Kind.MASK), who)
    if given.get(Kind.PACKED) is not None:
        raise StateError(_PACKED.format(who))


def _require_rows(given: CallArguments, who: str) -> None:
    """Refuse sequences that lie packed in one row, whose beginnings nobody would find.

    Raises:
        StateError: saying so.
    """
    _require_padded(given, who)
    positions = given.get(Kind.POSITIONS)
    if given.get(Kind.MASK) is not None or not isinstance(positions, Tensor) or torch.compiler.is_compiling():
        return
    if positions.dim() == 3:  # several kinds of positions, of which those in time only rise in a sequence
        positions = positions[0]
    if positions.dim() == 2 and positions.shape[0] == 1 and bool((positions.diff() < 0).any()):
        raise StateError(_PACKED.format(who))


def _require_plain(mask: Any, who: str) -> None:
    """Refuse a mask that does not say of each token whether it is there.

    Raises:
        StateError: saying so.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise StateError(
            f"{who} a mask of the shape (batch, tokens), or none; it cannot be had for sequences packed into "
            f"one row"
        )


def embeds_positions(host: nn.Module) -> bool:
    """Whether a module makes positions itself and embeds them in a child that can be told of others (BART's
    decoder).
    """
    child = getattr(host, "embed_positions", None)
    return isinstance(child, nn.Module) and offset_parameter(type(child)) is not None


def _cut(value: Any, own: Tensor | int, length: int) -> Any:
    """An output, or several, with the tokens' own positions only: hidden states ``(batch, positions, size)``
    and what attention has done from them, ``(batch, heads, positions, keys)``.

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
    return value.narrow(dim, own, length - own) if isinstance(own, int) else at_positions(value, own, dim)


def _square(given: CallArguments, batch: int, length: int, device: torch.device) -> None:
    """Give the mask for every query, to models before `transformers` 5, which else make it for as many as
    there are tokens.
    """
    mask = given.get(Kind.MASK)
    mask = torch.ones(batch, length, dtype=torch.long, device=device) if mask is None else mask
    given.set(Kind.MASK, mask[:, None].expand(batch, length, length))


def _counts_distances(host: nn.Module) -> bool:
    """Whether it matters to a model how many positions, padding too, lie between two tokens."""
    config = getattr(host, "config", None)
    return any(
        getattr(config, name, None) is not None
        for name in ("sliding_window", "relative_attention_num_buckets")
    )


def _lengthen_encoder_mask(
    given: CallArguments, lengths: int | Tensor, batch: int, *, after_first: bool, before_text: bool
) -> None:
    """Let a decoder see the virtual tokens of its encoder.

    Args:
        given: the decoder's arguments, to be changed.
        lengths: how many there are, or how many each row has, ``(batch, 1)``.
        batch: how many rows.
        after_first: whether they stand after the first token.
        before_text: whether they stand after padding.
    """
    states, mask = given.get(Kind.ENCODER_STATES), given.get(Kind.ENCODER_MASK)
    if states is None or (isinstance(lengths, int) and lengths == 0):
        return
    count = lengths if isinstance(lengths, int) else int(lengths.max())
    own = states.shape[1] - count
    if mask is None and isinstance(lengths, Tensor):
        mask = torch.ones(batch, own, dtype=torch.long, device=states.device)
    if mask is not None and mask.dim() == 2 and mask.shape[1] == own:
        room = PromptLayout(
            count, own, None if isinstance(lengths, int) else lengths, after_first, before_text, False
        )
        given.set(Kind.ENCODER_MASK, room.inserted(mask, None, room.first(mask, batch, mask.device)))
