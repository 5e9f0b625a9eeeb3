"""One call of a stack with adapters in front of its input: what becomes of its tokens, mask, positions and
cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from grafts.errors import StateError
from grafts.sites.arguments import PER_LAYER_INPUTS, CallArguments, Kind, says_length, versions
from grafts.sites.cache_view import CacheView, enlarge_cache, forget_view, past_of
from grafts.sites.prompt_layout import PromptLayout
from grafts.sites.setup import Rows
from grafts.sites.site import Part


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
        """The embeddings of the virtual tokens, ``(length, embedding size)``; asked for once a call that
        begins a sequence, and differentiable.
        """
        raise NotImplementedError

    def embed(self, host: nn.Module) -> nn.Module:
        """What makes embeddings of tokens in ``host``; by default what the model itself says that it is, as
        `transformers` does.
        """
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


# The parts that act on some rows of a batch: of one adapter, by its key; of all adapters and on all rows
# under None.
PartsOfRows = tuple[str | None, list[InputPart]]

# Beginnings of messages: who cannot do with what a call carries.
_PLACED = "virtual tokens need"
_COUNTED = "an adapter that counts tokens needs"


class InputCall:
    """One call of a stack.

    Attributes:
        host: the stack.
        arguments: the call's, which follow the virtual tokens.
        view: of the call's cache, where that holds virtual tokens.
        layout: what virtual tokens take up, in this call or in the cache; None where there are none.
        first: in the call with which a sequence begins, before which of a row's own tokens the virtual ones
            stand, ``(batch, 1)``.
        shift: how much further the tokens' positions are moved: one number, or one for each row,
            ``(batch, 1)``.
        waiting: virtual tokens that come in behind the embeddings, ``(batch, count, size)``; else None.
        tokens_at: where the tokens are in the output, ``(batch, tokens)``, or how many positions come before
            them; None where all positions stay in it.
        counted: how many positions the cache has to hold after this call, where that is to be checked: once a
            sequence, when it begins, and only where the call does not say itself how many tokens came before.
    """

    def __init__(
        self,
        host: nn.Module,
        arguments: CallArguments,
        parts_of_rows: list[PartsOfRows],
        rows: Rows | None,
        view: CacheView | None,
    ) -> None:
        self.host = host
        self.arguments = arguments
        self.view = view
        self.layout: PromptLayout | None = None
        self.first: Tensor | None = None
        self.shift: int | Tensor = 0
        self.waiting: Tensor | None = None
        self.tokens_at: Tensor | int | None = None
        self.counted: int | None = None

        self._parts_of_rows = parts_of_rows
        self._rows = rows
        self._parts: list[InputPart] = []
        for _, parts in parts_of_rows:
            self._parts += parts
        self._puts_tokens = False
        self._has_observers = False
        for part in self._parts:
            self._puts_tokens = self._puts_tokens or part.length > 0
            self._has_observers = self._has_observers or isinstance(part, TokenObserver)
        embeddings = arguments.get(Kind.EMBEDDINGS)
        self._tokens: Tensor = arguments.get(Kind.TOKENS) if embeddings is None else embeddings
        self._batch, self._new = self._tokens.shape[0], self._tokens.shape[1]
        self._device = self._tokens.device
        # How many positions came before, virtual tokens too.
        self._past = 0

    def begin(self) -> None:
        """Let the call's arguments follow what the adapters do.

        Raises:
            StateError: something that they have to know is not recognised, or cannot follow.
        """
        asks_cache = self._has_to_ask_cache()
        if asks_cache:
            self._past = self._count_past()
        self.shift = self._total(lambda part: part.shift)
        self._place_prompt()
        if asks_cache:
            self._expect_count()
        if self._has_observers:
            self._tell_observers()
        if self.layout is not None:
            self._extend_mask(self.layout)
        self._move_positions()
        if self.arguments.signature.takes(Kind.ENCODER_MASK):
            self._extend_encoder_mask()
        if self.view is not None:
            self.view.inside = True  # from now on the model asks the cache

    def _has_to_ask_cache(self) -> bool:
        """Whether it matters how many tokens came before.

        Where positions are given and nothing is put in, the cache need not be asked, which on a GPU takes
        time.
        """
        if self._puts_tokens or self._has_observers or self.view is not None:
            return True
        return self.arguments.get(Kind.POSITIONS) is None

    def _count_past(self) -> int:
        """How many positions came before, virtual tokens too, of a call that carries nothing that is not
        known.

        Raises:
            StateError: something that an acting part has to know is not recognised.
        """
        arguments = self.arguments
        if self._puts_tokens:
            _refuse_packed_by_argument(arguments, _PLACED)
        elif self._has_observers:
            _refuse_packed_by_argument(arguments, _COUNTED)
        arguments.refuse_unknown_cache(self.host)
        past = self._asked_past()
        # A cache that was emptied since holds virtual tokens no more, whatever its view says.
        holds_virtual = self.view is not None and past > 0
        if self._puts_tokens or holds_virtual:
            arguments.refuse_unknown_of_tokens(self.host, past)
        if self._has_observers:
            arguments.refuse_unknown_mask(self.host, past)
        return past

    def _asked_past(self) -> int:
        """How many positions the cache holds, virtual tokens too, which its view else hides."""
        cache, positions = self.arguments.get(Kind.CACHE), self.arguments.get(Kind.CACHE_POSITIONS)
        if self.view is None:
            return past_of(cache, positions, None)
        self.view.inside = True
        past = past_of(cache, positions, self.view)
        self.view.inside = False
        return past

    def _place_prompt(self) -> None:
        """Put virtual tokens in where a sequence begins, or take up the layout of those that the cache holds.

        Raises:
            StateError: the cache holds tokens, and not the virtual tokens of the acting adapters.
        """
        if self._past > 0:
            self._take_up_layout()
            return
        # A view of a sequence that ended: the cache was emptied, and begins another.
        if self.view is not None:
            forget_view(self.arguments.get(Kind.CACHE))
        if self._puts_tokens:
            self._put_in()

    def _take_up_layout(self) -> None:
        """Go on with the virtual tokens that the cache holds.

        Raises:
            StateError: the cache holds tokens, and not the virtual tokens of the acting adapters.
        """
        if self._puts_tokens and self.view is None:
            raise StateError(
                f"the cache holds {self._past} tokens and no virtual tokens in front of them, which the "
                "acting adapters put in where a sequence begins: begin with an empty cache, or go on "
                "with the adapters that it was made with"
            )
        if self.view is not None and self.view.layout.count > 0:
            self.layout = self.view.layout

    def _expect_count(self) -> None:
        """Note how many positions the cache has to hold after a call that begins a sequence."""
        # Where the call says itself how many tokens came before, there is nothing to doubt.
        says_itself = self.arguments.get(Kind.CACHE_POSITIONS) is not None
        if self._past > 0 or says_itself or torch.compiler.is_compiling():
            return
        self.counted = self._new
        if self.layout is not None:
            self.counted += self.layout.count

    def _total(self, number: Callable[[InputPart], int]) -> int | Tensor:
        """The sum of a number of the parts: one for all rows, or one for each row, ``(batch, 1)``."""
        if self._rows is None:
            total = 0
            for part in self._parts:
                total += number(part)
            return total
        totals = torch.zeros(self._batch, 1, dtype=torch.long, device=self._device)
        for key, parts in self._parts_of_rows:
            total = 0
            for part in parts:
                total += number(part)
            totals[self._rows_of(key)] = total
        return totals

    def _rows_of(self, key: str | None) -> Tensor:
        """The indices of the rows that chose an adapter."""
        assert key is not None
        assert self._rows is not None
        return self._rows.of(key, self._batch, self._device)

    # Virtual tokens

    def _put_in(self) -> None:
        """Put virtual tokens among the embeddings, where a part has some."""
        parts = [part for part in self._parts if part.length > 0]
        arguments = self.arguments
        _refuse_packed_by_positions(arguments, _PLACED)
        _require_together(parts)
        embeddings = arguments.get(Kind.EMBEDDINGS)
        if embeddings is None:
            self._require_replaceable()
            embeddings = parts[0].embed(self.host)(arguments.get(Kind.TOKENS))
        mask = arguments.get(Kind.MASK)
        if parts[0].after_first:
            self._require_first_tokens(mask)

        # What they take up, in this call and as long as the cache holds them.
        virtual, lengths = self._virtual_tokens(embeddings)
        layout = PromptLayout(
            count=virtual.shape[1],
            tokens=self._new,
            lengths=lengths,
            after_first=parts[0].after_first,
            before_text=mask is not None and _counts_distances(self.host),
            pads_after=getattr(self.host, "pooler", None) is not None,
            embedded=parts[0].after_embeddings,
        )
        self.layout = layout
        first = self.first = layout.first(mask, self._batch, embeddings.device)
        if layout.embedded:
            self.waiting = virtual
        else:
            self._insert(layout, embeddings, virtual, first)
        self.tokens_at = self._tokens_in_output(parts, layout, first)
        # A cache of a fixed size was made for the tokens alone.
        window = getattr(getattr(self.host, "config", None), "sliding_window", None)
        enlarge_cache(arguments.get(Kind.CACHE), layout.count, window)

    @staticmethod
    def _tokens_in_output(parts: list[InputPart], layout: PromptLayout, first: Tensor) -> Tensor | int | None:
        """Where the tokens are in the output, or how many positions come before them; None where the
        positions of the virtual tokens stay.

        Args:
            parts: those that put virtual tokens in.
            layout: what these take up.
            first: before which of a row's own tokens they stand, ``(batch, 1)``.
        """
        for part in parts:
            if part.kept:
                return None
        if layout.is_even:
            return layout.count
        return layout.token_positions(first)

    def _insert(self, layout: PromptLayout, embeddings: Tensor, virtual: Tensor, first: Tensor) -> None:
        """Give the call embeddings in place of token ids, with the virtual tokens among them; types follow.

        Args:
            layout: what the virtual tokens take up.
            embeddings: of the tokens, ``(batch, tokens, size)``.
            virtual: of the virtual tokens, ``(batch, count, size)``.
            first: before which of a row's own tokens they stand, ``(batch, 1)``.
        """
        arguments = self.arguments
        if arguments.get(Kind.TOKENS) is not None:
            arguments.set(Kind.TOKENS, None)
        arguments.set(Kind.EMBEDDINGS, layout.insert(embeddings, virtual, first))
        types = arguments.get(Kind.TOKEN_TYPES)
        if types is not None:
            of_virtual = types.new_zeros(self._batch, layout.count, *types.shape[2:])
            arguments.set(Kind.TOKEN_TYPES, layout.insert(types, of_virtual, first))

    def _virtual_tokens(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """The virtual tokens of each row, ``(batch, count, size)``, zeros behind those of rows that have
        fewer, and how many each row has, ``(batch, 1)``, or None where all have as many.

        Args:
            embeddings: of the tokens, ``(batch, tokens, size)``.
        """
        if self._rows is None:
            virtual = self._joined(self._parts, embeddings)
            return virtual.expand(self._batch, -1, -1), None
        counts = [sum(part.length for part in parts) for _, parts in self._parts_of_rows]
        most = max(counts)
        virtual = embeddings.new_zeros(self._batch, most, embeddings.shape[-1])
        lengths = torch.zeros(self._batch, 1, dtype=torch.long, device=embeddings.device)
        for count, (key, parts) in zip(counts, self._parts_of_rows, strict=True):
            if count == 0:
                continue
            rows = self._rows_of(key)
            padded = nn.functional.pad(self._joined(parts, embeddings), (0, 0, 0, most - count))
            virtual = virtual.index_copy(0, rows, padded.expand(rows.shape[0], -1, -1))
            lengths[rows] = count
        # A row of the bare base (None) has no virtual tokens.
        is_even = None not in self._rows.names and len(set(counts)) == 1
        return virtual, None if is_even else lengths

    @staticmethod
    def _joined(parts: list[InputPart], like: Tensor) -> Tensor:
        """The virtual tokens of several parts one after the other, ``(length, size)``."""
        tokens = []
        for part in parts:
            if part.length > 0:
                tokens.append(part.virtual_tokens())
        return torch.cat(tokens).to(like.device, like.dtype)

    def _require_replaceable(self) -> None:
        """Refuse to give embeddings in place of token ids to a model that makes more of the ids (Gemma 3n,
        4).

        Raises:
            StateError: naming what it makes.
        """
        if PER_LAYER_INPUTS in self.arguments.signature.parameters:
            raise StateError(
                f"a {type(self.host).__name__} makes {PER_LAYER_INPUTS} of its token ids, which virtual "
                "tokens do not have and which embeddings in place of the ids would lose: choose a method "
                "without virtual tokens"
            )

    def _require_first_tokens(self, mask: Any) -> None:
        """Refuse a beginning in which a row has no token yet, behind which virtual tokens could stand.

        Raises:
            StateError: saying so.
        """
        if mask is None or torch.compiler.is_compiling():
            return
        if not bool(mask[:, : self._new].ne(0).any(1).all()):
            raise StateError(
                "virtual tokens that come after the first token need it in the call with which a sequence "
                "begins, and a row has nothing but padding there: pad on the right, or take longer chunks"
            )

    # Observers

    def _tell_observers(self) -> None:
        """Tell the parts that observe tokens which there are; before mask and positions follow virtual
        tokens.
        """
        arguments, layout = self.arguments, self.layout
        _refuse_packed_by_positions(arguments, _COUNTED)
        before = self._past
        if layout is not None and self._past > 0:
            before = self._past - layout.count
        mask = arguments.get(Kind.MASK)
        number, left = self._counted_tokens(mask, before)
        if layout is not None and self._past == 0:
            first = layout.first(mask, self._batch, self._device)
            none = number.new_zeros(self._batch, layout.count)
            # Counted from 1, so that virtual tokens and empty positions, which are 0, come out as -1.
            number = layout.insert(number + 1, none, first) - 1
            left = layout.insert(left + 1, none, first) - 1
        for key, parts in self._parts_of_rows:
            rows = None if key is None else self._rows_of(key)
            for part in parts:
                if not isinstance(part, TokenObserver):
                    continue
                if rows is None:
                    part.observe(number, left, before)
                else:
                    part.observe(number.index_select(0, rows), left.index_select(0, rows), before)

    def _counted_tokens(self, mask: Tensor | None, before: int) -> tuple[Tensor, Tensor]:
        """The number of each of this call's tokens among the real ones of its row, and how many of them come
        after it; both ``(batch, tokens)``, and -1 for padding.

        Args:
            mask: which tokens are real, those of earlier calls too, ``(batch, before + tokens)``; None for
                all.
            before: how many tokens came in earlier calls.
        """
        if mask is None:
            real = torch.ones(self._batch, before + self._new, dtype=torch.long, device=self._device)
        else:
            real = mask[:, : before + self._new].ne(0).to(torch.long)
        count = real.cumsum(1)
        absent = torch.full_like(count, -1)
        number = torch.where(real.bool(), count - 1, absent)
        left = torch.where(real.bool(), count[:, -1:] - count, absent)
        return number[:, -self._new :], left[:, -self._new :]

    # Mask and positions

    def _extend_mask(self, layout: PromptLayout) -> None:
        """Let the mask follow the virtual tokens."""
        arguments = self.arguments
        mask = arguments.get(Kind.MASK)
        _require_mask_of_tokens(mask, _PLACED)
        first = self.first
        if first is None:  # of a later call, whose mask begins with that of the first
            first = layout.first(mask, self._batch, self._device)
        # Rows with fewer virtual tokens than others have empty positions, which only a mask can hide.
        if mask is None and layout.lengths is not None:
            tokens = self._new
            if self._past > 0:
                tokens += self._past - layout.count
            mask = torch.ones(self._batch, tokens, dtype=torch.long, device=self._device)
        if mask is not None:
            mask = layout.insert(mask, None, first)
            arguments.set(Kind.MASK, mask)
        if layout.embedded and _extends_mask_itself(self.host):
            self._square_mask(mask, layout)

    def _square_mask(self, mask: Tensor | None, layout: PromptLayout) -> None:
        """Give the mask for every query, to models before `transformers` 5, which else make it for as many
        queries as there are tokens.
        """
        length = layout.count + self._new
        if mask is None:
            mask = torch.ones(self._batch, length, dtype=torch.long, device=self._device)
        self.arguments.set(Kind.MASK, mask[:, None].expand(self._batch, length, length))

    def _move_positions(self) -> None:
        """Let the positions follow the virtual tokens, and move them by what the parts ask for besides."""
        arguments, layout = self.arguments, self.layout
        # Tokens that come in behind the embeddings have no positions, and the others keep theirs.
        if layout is not None and layout.embedded:
            return
        if layout is not None and arguments.get(Kind.CACHE_POSITIONS) is not None:
            self._move_cache_positions(layout)

        positions = arguments.get(Kind.POSITIONS)
        if positions is None:
            if not self._has_to_move():
                return
            if not arguments.signature.takes(Kind.POSITIONS):
                self._require_even_rows()
                return
            positions = self._own_positions()
        arguments.set(Kind.POSITIONS, self._moved(positions))

    def _move_cache_positions(self, layout: PromptLayout) -> None:
        """Say where in the cache this call's keys and values go: behind all that is in it."""
        end = self._past + self._new
        if self._past == 0:
            end += layout.count
        self.arguments.set(Kind.CACHE_POSITIONS, torch.arange(self._past, end, device=self._device))

    def _own_positions(self) -> Tensor:
        """The positions that the model would give the tokens itself without adapters, ``(1, tokens)``."""
        begin = self._past
        if self.layout is not None and self._past > 0:
            begin = self._past - self.layout.count
        return torch.arange(begin, begin + self._new, device=self._device)[None]

    def _moved(self, positions: Tensor) -> Tensor:
        """Positions as they are with the virtual tokens.

        Args:
            positions: of the tokens, ``(batch or 1, tokens)``, or several kinds of them,
                ``(kinds, batch or 1, tokens)``.
        """
        layout = self.layout
        if layout is None:
            return positions + self.shift
        if self._past > 0:
            return positions + self.shift + layout.row_lengths
        if positions.dim() == 3:
            # Several for each token: of time, height and width.
            return torch.stack([self._with_virtual_positions(kind, layout) for kind in positions])
        return self._with_virtual_positions(positions, layout)

    def _has_to_move(self) -> bool:
        """Whether positions that the model would make itself are not right."""
        if isinstance(self.shift, Tensor) or self.shift != 0:
            return True
        layout = self.layout
        return layout is not None and (layout.lengths is not None or layout.before_text)

    def _require_even_rows(self) -> None:
        """Refuse rows with different numbers of virtual tokens where the positions cannot be said.

        Raises:
            StateError: saying so.
        """
        layout = self.layout
        if layout is None or layout.lengths is None:
            return
        # Scores that count distances need no positions; with the empty ones behind, a row's own stand as they
        # should.
        counts_distances = hasattr(getattr(self.host, "config", None), "relative_attention_num_buckets")
        stand_right = self._past == 0 and layout.pads_after
        if not counts_distances and not stand_right:
            raise StateError(
                f"adapter_names: a {type(self.host).__name__} takes no position_ids, so its rows cannot have "
                "different numbers of virtual tokens"
            )

    def _with_virtual_positions(self, positions: Tensor, layout: PromptLayout) -> Tensor:
        """The positions of the tokens with those of the virtual tokens among them,
        ``(batch, count + tokens)``.

        Args:
            positions: of the tokens, ``(batch or 1, tokens)``.
            layout: what the virtual tokens take up.
        """
        first = self.first
        assert first is not None
        positions = positions.expand(self._batch, -1)
        device = positions.device
        if layout.after_first:
            start = positions.gather(1, first - 1) + 1
        else:
            start = torch.zeros_like(first)
        virtual = start + torch.arange(layout.count, device=device)[None]
        is_behind = torch.arange(positions.shape[1], device=device)[None] >= first
        moved = torch.where(is_behind, positions + layout.row_lengths, positions)
        return layout.insert(moved + self.shift, virtual + self.shift, first)

    def _extend_encoder_mask(self) -> None:
        """Let a decoder see the virtual tokens of its encoder."""
        arguments = self.arguments
        total = self._total(lambda part: part.encoder_length)
        states, mask = arguments.get(Kind.ENCODER_STATES), arguments.get(Kind.ENCODER_MASK)
        if isinstance(total, int):
            count, lengths = total, None
        else:
            count, lengths = int(total.max()), total
        if states is None or (lengths is None and count == 0):
            return

        # The mask is that of the text; the encoder's output has the virtual tokens as well.
        tokens = states.shape[1] - count
        if mask is None and lengths is not None:
            mask = torch.ones(self._batch, tokens, dtype=torch.long, device=states.device)
        if mask is None or mask.shape != (mask.shape[0], tokens):
            return
        layout = PromptLayout(
            count=count,
            tokens=tokens,
            lengths=lengths,
            after_first=any(part.after_first for part in self._parts),
            before_text=_counts_distances(self.host),
            pads_after=False,
        )
        first = layout.first(mask, self._batch, mask.device)
        arguments.set(Kind.ENCODER_MASK, layout.insert(mask, None, first))


def require_counted(host: nn.Module, cache: Any, counted: int) -> None:
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


def _refuse_packed_by_argument(arguments: CallArguments, who: str) -> None:
    """Refuse what says at first sight that sequences lie packed in one row.

    Raises:
        StateError: saying so.
    """
    _require_mask_of_tokens(arguments.get(Kind.MASK), who)
    if arguments.get(Kind.PACKED) is not None:
        raise _packed(who)


def _refuse_packed_by_positions(arguments: CallArguments, who: str) -> None:
    """Refuse sequences that lie packed in one row, as positions that begin again show, of a call without a
    mask.

    Raises:
        StateError: saying so.
    """
    positions = arguments.get(Kind.POSITIONS)
    if arguments.get(Kind.MASK) is not None or not isinstance(positions, Tensor):
        return
    if torch.compiler.is_compiling():  # values cannot be looked at there
        return
    if positions.dim() == 3:  # several kinds of positions, of which those in time only rise in a sequence
        positions = positions[0]
    if positions.dim() == 2 and positions.shape[0] == 1 and bool((positions.diff() < 0).any()):
        raise _packed(who)


def _require_together(parts: list[InputPart]) -> None:
    """Refuse parts whose virtual tokens would have to stand at two places of one row.

    Raises:
        StateError: saying which.
    """
    if len({part.after_first for part in parts}) > 1:
        raise StateError(
            "adapters whose virtual tokens come before and after the first token cannot act together"
        )
    if len({part.after_embeddings for part in parts}) > 1:
        raise StateError(
            "adapters whose virtual tokens come before and after the embeddings cannot act together"
        )


def _packed(who: str) -> StateError:
    return StateError(f"{who} one sequence a row, and these lie packed in one row: pad them instead")


def _require_mask_of_tokens(mask: Any, who: str) -> None:
    """Refuse a mask that does not say of each token whether it is there.

    Raises:
        StateError: saying so.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise StateError(
            f"{who} a mask of the shape (batch, tokens), or none; it cannot be had for sequences packed into "
            f"one row"
        )


def _counts_distances(host: nn.Module) -> bool:
    """Whether it matters to a model how many positions, padding too, lie between two tokens."""
    config = getattr(host, "config", None)
    for name in ("sliding_window", "relative_attention_num_buckets"):
        if getattr(config, name, None) is not None:
            return True
    return False


def _extends_mask_itself(host: nn.Module) -> bool:
    """Whether a model makes its mask with the method that `transformers` had for that before version 5."""
    forward = inspect.unwrap(type(host).forward)
    return "get_extended_attention_mask" in forward.__code__.co_names
