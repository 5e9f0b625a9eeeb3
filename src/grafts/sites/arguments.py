"""What a call carries: tokens, cache, mask, positions, recognised by what they are and not by one spelling.

The arguments of a model have other names in other versions of `transformers`. So nothing else in this package reads an
argument of a call by its name: it asks for a *kind* of argument, and this module finds it,

1. by name, if the keyword of the call or the parameter of the module's ``forward`` is one of the `SPELLINGS` of that kind;
2. a cache by its protocol too, under any name: it says how many positions it holds (``get_seq_length``).

What is left over may be something that an adapter has to know. `CallArguments.require_known` looks for that by what a value
could be, and refuses it: an adapter that overlooks a cache, a mask or positions gives wrong numbers without a word.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from grafts.errors import StateError

# The kinds of arguments.
TOKENS = "token ids"  # (batch, tokens)
EMBEDDINGS = "embeddings"  # (batch, tokens, size)
MASK = "mask"  # (batch, tokens in the cache and new): which tokens are real
POSITIONS = "positions"  # (batch or 1, tokens)
TOKEN_TYPES = "token types"  # (batch, tokens)
CACHE = "cache"  # keys and values of the tokens before
CACHE_POSITIONS = "positions in the cache"  # (tokens,): where the new tokens go
ENCODER_STATES = "encoder states"  # (batch, tokens of the encoder, size)
ENCODER_MASK = "encoder mask"  # (batch, tokens of the encoder)

PER_LAYER = "per_layer_inputs"  # what Gemma 3n and Gemma 4 make of token ids besides embeddings

SPELLINGS: dict[str, tuple[str, ...]] = {
    TOKENS: ("input_ids",),
    EMBEDDINGS: ("inputs_embeds",),
    MASK: ("attention_mask",),
    POSITIONS: ("position_ids",),
    TOKEN_TYPES: ("token_type_ids",),
    CACHE: (
        "cache",  # transformers 5.24 and later; before, continuous batching only
        "past_key_values",  # to 5.23; later versions warn, and drop it in 5.40
        "past_key_value",  # attention modules to 4.55, and code written after them
        "layer_past",  # GPT-2 and Bloom to 4.5x
        "cache_params",  # Mamba to 5.23
        "state",  # RWKV
        "mems",  # XLNet
        "past_buckets_states",  # Reformer
    ),
    CACHE_POSITIONS: ("cache_position",),  # passed by generate to 5.1, taken by models of remote code still
    ENCODER_STATES: (
        "encoder_hidden_states",  # what stacks and layers call it
        "key_value_states",  # what attention modules call it
    ),
    ENCODER_MASK: ("encoder_attention_mask",),
}
_KINDS = {name: kind for kind, names in SPELLINGS.items() for name in names}

# Arguments that say nothing of single tokens, though their size may be the number of tokens by chance.
_OF_NO_TOKEN = frozenset({"head_mask", "cross_attn_head_mask", "decoder_head_mask", "logits_to_keep", "num_items_in_batch"})
# What the arguments of other inputs than the text begin with: as many images as there are tokens are no accident to refuse.
_OTHER_INPUTS = ("visual_", "image_", "pixel_", "video_", "audio_", "entity_", "encoder_", "cross_")
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, Enum, range, slice, set, frozenset, type(None))
_PLAIN += (torch.dtype, torch.device, torch.Size, torch.Generator)


class CallSignature:
    """The parameters of a module's ``forward``, by what they take.

    Attributes:
        names: of the parameters that can be given by position, in order.
        parameters: the names of all that are written out.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        """Read a signature; decorators that keep the wrapped function are looked through.

        Args:
            forward: a class's ``forward``, whose first parameter is the module.
        """
        written = list(inspect.signature(forward).parameters.values())[1:]
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = tuple(p.name for p in written if p.kind in by_position)
        self.parameters = tuple(p.name for p in written if p.kind in by_position or p.kind is p.KEYWORD_ONLY)
        self._spelled = {_KINDS[name]: name for name in reversed(self.parameters) if name in _KINDS}

    def takes(self, kind: str) -> bool:
        """Whether a parameter is written out for this kind of argument."""
        return kind in self._spelled

    def name_of(self, kind: str) -> str | None:
        """The parameter for this kind of argument, or None."""
        return self._spelled.get(kind)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallArguments:
        """The arguments of one call, given by position and by name."""
        return CallArguments(self, args, kwargs)


class CallArguments:
    """The arguments of one call of a module, to be read and changed by kind.

    Attributes:
        signature: of the module that is called.
        values: the arguments by name.
        unnamed: those given by position for which the signature has no name.
    """

    def __init__(self, signature: CallSignature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.signature = signature
        self.values: dict[str, Any] = {}
        for name, value in zip(signature.names[: len(args)], args[: len(signature.names)], strict=True):
            self.values[name] = value
        self.values.update(kwargs)
        self.unnamed = args[len(signature.names) :]

    def get(self, kind: str) -> Any:
        """The argument of this kind, or None."""
        name = self._name(kind)
        return None if name is None else self.values[name]

    def set(self, kind: str, value: Any) -> None:
        """Give the call an argument of this kind, under the name that it had or that the signature says.

        Raises:
            StateError: the module takes none.
        """
        name = self._name(kind)
        for spelling in SPELLINGS[kind]:
            if name is None and spelling in self.values:  # given as None
                name = spelling
        name = name or self.signature.name_of(kind)
        if name is None:
            raise StateError(f"the acting adapters have to change the {kind} of this call, and the module takes no {kind}")
        self.values[name] = value

    def first(self) -> Any:
        """The first argument, which for most modules is the tensor that they work on."""
        for name in self.signature.names:
            if name in self.values:
                return self.values[name]
        return self.unnamed[0] if self.unnamed else next(iter(self.values.values()))

    def passed_on(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the module gets them."""
        if not self.unnamed:
            return (), self.values
        # what has no name can only follow all that have one, in their order
        named = [self.values[name] for name in self.signature.names]
        rest = {name: value for name, value in self.values.items() if name not in self.signature.names}
        return (*named, *self.unnamed), rest

    def _name(self, kind: str) -> str | None:
        for name in SPELLINGS[kind]:
            if self.values.get(name) is not None:
                return name
        if kind == CACHE:
            caches = [name for name, value in self.values.items() if name not in _KINDS and is_cache(value)]
            if len(caches) > 1:
                raise StateError(
                    f"the call carries several caches ({', '.join(caches)}), and none by a name that says which it is"
                )
            return caches[0] if caches else None
        return None

    def _unknown(self) -> Iterator[tuple[str, Any]]:
        """The arguments of no known kind, but for those that cannot matter."""
        for name, value in self.values.items():
            if name not in _KINDS and name not in _OF_NO_TOKEN and not isinstance(value, _PLAIN) and not is_cache(value):
                yield name, value
        for number, value in enumerate(self.unnamed):
            yield f"argument {len(self.signature.names) + number}", value

    def require_readable(self, host: nn.Module) -> None:
        """Refuse a call of which the acting adapters cannot tell how many tokens there are, and how many there were before.

        Args:
            host: the module that is called.

        Raises:
            StateError: naming the argument, or what was looked for.
        """
        if self.get(TOKENS) is None and self.get(EMBEDDINGS) is None:
            raise StateError(
                f"a {type(host).__name__} was called with {', '.join(self.values) or 'nothing'}, and its adapters "
                f"look for {' or '.join((*SPELLINGS[TOKENS], *SPELLINGS[EMBEDDINGS]))} ({versions()})"
            )
        name = self._name(CACHE)
        if name is not None and not says_length(self.values[name]):
            raise StateError(
                f"a {type(host).__name__} was called with {name!r} (a {type(self.values[name]).__name__}), which does not say "
                f"how many tokens it holds, and its adapters have to know: call it without (most models: use_cache=False; "
                f"{versions()})"
            )

    def require_known(self, host: nn.Module, past: int, *, placed: bool) -> None:
        """Refuse a call that carries something which the acting adapters have to know and which is not recognised.

        Args:
            host: the module that is called.
            past: how many positions the cache holds.
            placed: virtual tokens are among the tokens, so whatever there is for each token has to be known; else only what
                could be a cache or, where no mask is taken by a name that is known, a mask.

        Raises:
            StateError: naming the argument.
        """
        embeddings = self.get(EMBEDDINGS)
        tokens = self.get(TOKENS) if embeddings is None else embeddings
        masks = self.signature.takes(MASK)
        # By its shape, anything could belong to one token alone; what belongs to tokens is there when a sequence begins, too.
        single = past > 0 and tokens.shape[1] == 1
        for name, value in self._unknown():
            if could_be_cache(name, value):
                raise self._refused(host, name, "may be a cache that holds tokens")
            if single:
                continue
            tensors = [tensor for tensor in tensors_in(value) if is_for_each_token(tensor, tokens, past)]
            if not placed:
                if not masks and "label" not in name and any(could_be_mask(tensor) for tensor in tensors):
                    raise self._refused(host, name, "has something for each token, and may be a mask")
            elif "position" in name:
                raise self._refused(host, name, "may say positions of tokens, which virtual tokens move")
            elif tensors and not name.startswith(_OTHER_INPUTS):
                raise self._refused(host, name, "has something for each token")

    def require_no_other_states(self, hidden: Tensor) -> None:
        """Refuse a call of attention that may attend to other states than its input, by a name that is not known.

        Args:
            hidden: its input, ``(batch, tokens, size)``.

        Raises:
            StateError: naming the argument.
        """
        for name, value in self.values.items():
            if name in _KINDS or not isinstance(value, Tensor) or value.dim() != 3 or value is hidden:
                continue
            batch, tokens, size = value.shape
            if batch == hidden.shape[0] and tokens != hidden.shape[1] and size == hidden.shape[2]:
                raise StateError(
                    f"attention was called with {name!r}, {tuple(value.shape)}, which may be what it attends to and which its "
                    f"adapters do not know; they know {' and '.join(SPELLINGS[ENCODER_STATES])} ({versions()})"
                )

    def _refused(self, host: nn.Module, name: str, what: str) -> StateError:
        kind = type(self.values[name]).__name__ if name in self.values else "value"
        known = ", ".join(name for names in SPELLINGS.values() for name in names if name in self.signature.parameters)
        return StateError(
            f"a {type(host).__name__} was called with {name!r} (a {kind}), which {what} and which the adapters "
            f"that act there do not know; of its arguments they know {known or 'none'} ({versions()})"
        )


def is_cache(value: Any) -> bool:
    """Whether a value keeps keys and values and says of how many positions, as every cache of `transformers` does."""
    return callable(getattr(value, "get_seq_length", None))


def says_length(cache: Any) -> bool:
    """Whether a cache can say how many positions it holds: one of nothing but recurrent states (Mamba) cannot."""
    layers = getattr(cache, "layers", None) or ()
    return is_cache(cache) and (not layers or any(is_cache(layer) for layer in layers))


def could_be_cache(name: str, value: Any) -> bool:
    """Whether a value of no known kind may hold the tokens of calls before.

    That is an object that is neither plain data nor made of tensors, and the tuples that were caches before there was a
    class for them: of a pair of tensors for each layer.

    >>> could_be_cache("memory", object()), could_be_cache("scale", 2.0), could_be_cache("rotary", (torch.ones(1, 7, 4),) * 2)
    (True, False, False)
    >>> could_be_cache("memory", ((torch.ones(1, 2, 7, 4),) * 2,) * 3)
    True
    """
    if isinstance(value, (Tensor, *_PLAIN)) or hasattr(value, "__array__"):
        return False
    if isinstance(value, Mapping):
        return any(could_be_cache(name, item) for item in value.values())
    if isinstance(value, (tuple, list)):
        pairs = [item for item in value if isinstance(item, (tuple, list)) and any(isinstance(x, Tensor) for x in item)]
        return len(pairs) > 0 or any(could_be_cache(name, item) for item in value)
    return not callable(value) or "cache" in type(value).__name__.lower()


def could_be_mask(value: Tensor) -> bool:
    """Whether a tensor says no more than yes or no of each token.

    >>> could_be_mask(torch.tensor([[1, 0]])), could_be_mask(torch.tensor([[True]])), could_be_mask(torch.tensor([[1, 7]]))
    (True, True, False)
    """
    return value.dim() == 2 and (value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all()))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that an argument is or holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def is_for_each_token(value: Tensor, tokens: Tensor, past: int) -> bool:
    """Whether a tensor has the shape of something that belongs to the tokens one by one.

    Args:
        value: the tensor.
        tokens: ``(batch, tokens, ...)``.
        past: how many positions came before.

    >>> ids = torch.ones(2, 7)
    >>> [is_for_each_token(torch.ones(shape), ids, 0) for shape in ((2, 7), (1, 7, 4), (2, 1, 7, 9), (3, 2, 7))]
    [True, True, True, True]
    >>> [is_for_each_token(torch.ones(shape), ids, 0) for shape in ((2, 4), (7,), (5, 7))]
    [False, False, False]
    """
    batch, new = tokens.shape[:2]
    lengths = (new, new + past)
    if value.dim() == 4 and value.shape[0] in (1, batch) and value.shape[2] in lengths:  # a mask of queries and keys
        return True
    if value.dim() == 3 and value.shape[1] == batch and value.shape[2] in lengths:  # positions in several dimensions
        return True
    return value.dim() in (2, 3, 4) and value.shape[0] in (1, batch) and value.shape[1] in lengths


def cache_in(output: Any) -> Any:
    """The cache that a model gives back in its output, or None."""
    if isinstance(output, Mapping):
        values = list(output.values())
    else:
        values = list(output) if isinstance(output, (tuple, list)) else []
    return next((value for value in values if is_cache(value)), None)


def offset_parameter(positions: type[nn.Module]) -> str | None:
    """The parameter of a module that embeds positions which says how many positions came before, or None.

    It is the one that is the number 0 where it is not given: ``cache_length`` from `transformers` 5.24 on, before
    ``past_key_values_length``.
    """
    parameters = list(inspect.signature(positions.forward).parameters.values())[1:]
    return next((p.name for p in parameters if type(p.default) is int and p.default == 0), None)


def versions() -> str:
    """The versions that a report of a fault has to name."""
    names = [name for name in ("grafts", "torch", "transformers") if name == "grafts" or name in sys.modules]
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # used from its folder, without being installed
            found.append(name)
    return ", ".join(found)
