"""What a call carries: tokens, cache, mask, positions, recognised by what they are and not by one spelling.

The arguments of a model have other names in other versions of `transformers`. So sites do not read an
argument of a call by its name: they ask for a `Kind`, and this module finds it,

1. by name, if the keyword of the call or the parameter of the module's ``forward`` is one of the `SPELLINGS`
of that kind; 2. a cache by its protocol too, under any name: it says how many positions it holds
(``get_seq_length``).

What is left over may be something that an acting adapter has to know. The ``refuse_...`` methods of
`CallArguments` look for that by what a value could be: an adapter that overlooks a cache, a mask or positions
gives wrong numbers without a word.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from grafts.errors import StateError


class Kind(Enum):
    """The kinds of arguments that adapters have to know; the value is the kind in words."""

    TOKENS = "token ids"  # (batch, tokens)
    EMBEDDINGS = "embeddings"  # (batch, tokens, size)
    MASK = "mask"  # (batch, tokens in the cache and new): which of them are real
    POSITIONS = "positions"  # (batch or 1, tokens), or (kinds of positions, batch or 1, tokens)
    TOKEN_TYPES = "token types"  # (batch, tokens), or (batch, tokens, kinds of types)
    CACHE = "cache"  # keys and values of the tokens before
    CACHE_POSITIONS = "positions in the cache"  # (tokens,): where the new tokens go
    PACKED = "lengths of packed sequences"  # (sequences + 1,)
    ENCODER_STATES = "encoder states"  # (batch, tokens of the encoder, size)
    ENCODER_MASK = "encoder mask"  # (batch, tokens of the encoder)


SPELLINGS: dict[Kind, tuple[str, ...]] = {
    Kind.TOKENS: ("input_ids",),
    Kind.EMBEDDINGS: ("inputs_embeds",),
    Kind.MASK: ("attention_mask",),
    Kind.POSITIONS: ("position_ids",),
    Kind.TOKEN_TYPES: ("token_type_ids",),
    Kind.CACHE: (
        "cache",  # transformers 5.24 and later; before, continuous batching only
        "past_key_values",  # to 5.23; later versions warn, and drop it in 5.40
        "past_key_value",  # attention modules to 4.55, and code written after them
        "layer_past",  # GPT-2 and Bloom to 4.5x
        "cache_params",  # Mamba to 5.23
        "state",  # RWKV
        "mems",  # XLNet
        "past_buckets_states",  # Reformer
    ),
    Kind.CACHE_POSITIONS: ("cache_position",),  # passed by generate to 5.1; remote code takes it still
    Kind.PACKED: ("cu_seq_lens_q",),
    Kind.ENCODER_STATES: (
        "encoder_hidden_states",  # what stacks and layers call it
        "key_value_states",  # what attention modules call it
    ),
    Kind.ENCODER_MASK: ("encoder_attention_mask",),
}
KIND_OF = {name: kind for kind, names in SPELLINGS.items() for name in names}

# What Gemma 3n and Gemma 4 make of token ids besides embeddings.
PER_LAYER_INPUTS = "per_layer_inputs"

# By the size of a dimension, these could be taken for something that belongs to tokens, and never do.
_OF_NO_TOKEN = frozenset({"head_mask", "cross_attn_head_mask", "decoder_head_mask"})
# What the arguments of other inputs than the text begin with: there may be as many images as tokens.
_OTHER_INPUTS = ("visual_", "image_", "pixel_", "video_", "audio_", "entity_", "encoder_", "cross_")
# Values of these types hold no tokens of calls before.
_PLAIN: tuple[type, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    range,
    slice,
    set,
    frozenset,
    type(None),
)
_PLAIN += (torch.dtype, torch.device, torch.Size, torch.Generator)


class CallSignature:
    """The parameters of a module's ``forward``, by what they take.

    Attributes:
        names: of the parameters that can be given by position, in order.
        only_by_position: how many of them, the first ones, cannot be given by name.
        parameters: the names of all that are written out.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        """Read a signature; decorators that keep the wrapped function are looked through.

        Args:
            forward: a class's ``forward``, whose first parameter is the module.
        """
        written = list(inspect.signature(forward).parameters.values())[1:]
        only = [p.name for p in written if p.kind is p.POSITIONAL_ONLY]
        either = [p.name for p in written if p.kind is p.POSITIONAL_OR_KEYWORD]
        by_name = [p.name for p in written if p.kind is p.KEYWORD_ONLY]
        self.names: tuple[str, ...] = (*only, *either)
        self.only_by_position: int = len(only)
        self.parameters: tuple[str, ...] = (*self.names, *by_name)
        self._parameter_of: dict[Kind, str] = {}
        for name in self.parameters:
            if name in KIND_OF:
                self._parameter_of.setdefault(KIND_OF[name], name)

    def takes(self, kind: Kind) -> bool:
        """Whether a parameter is written out for this kind of argument, under any of its spellings."""
        return kind in self._parameter_of

    def parameter(self, kind: Kind) -> str | None:
        """The name of the parameter for this kind of argument, in this model's spelling; None where it has
        none.
        """
        return self._parameter_of.get(kind)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallArguments:
        """The arguments of one call.

        Args:
            args: those given by position, as a hook gets them.
            kwargs: those given by name.
        """
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
        # The compiler of torch 2.6 follows no zip of different lengths.
        named = min(len(args), len(signature.names))
        for index in range(named):
            self.values[signature.names[index]] = args[index]
        self.values.update(kwargs)
        self.unnamed: tuple[Any, ...] = args[named:]

    def get(self, kind: Kind) -> Any:
        """The argument of this kind, or None.

        Raises:
            StateError: the call carries several caches, and none can be told to be the one that is meant.
        """
        name = self._name(kind)
        if name is None:
            return None
        return self.values[name]

    def set(self, kind: Kind, value: Any) -> None:
        """Give the call an argument of this kind, under the name that it had or that the signature says.

        Raises:
            StateError: the module takes none.
        """
        name = self._name(kind)
        if name is None:  # it may have been given as None
            for spelling in SPELLINGS[kind]:
                if spelling in self.values:
                    name = spelling
        if name is None:
            name = self.signature.parameter(kind)
        if name is None:
            raise StateError(
                f"the acting adapters have to change the {kind.value} of this call, and the module takes no "
                f"{kind.value}"
            )
        self.values[name] = value

    def first(self) -> Any:
        """The first argument, which for most modules is the tensor that they work on, however it was
        given.
        """
        name = self.first_name()
        if name is None:
            return self.unnamed[0]
        return self.values[name]

    def first_name(self) -> str | None:
        """The name of the first argument, or None where it was given by position and the signature has no
        name for it.
        """
        for name in self.signature.names:
            if name in self.values:
                return name
        if self.unnamed:
            return None
        return next(iter(self.values))

    def passed_on(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the module gets them: by name, but for what cannot be.

        Returns:
            Those given by position and those given by name, as a pre-hook returns them.
        """
        # What has no name can only follow all that have one, in their order.
        if self.unnamed:
            count = len(self.signature.names)
        else:
            count = self.signature.only_by_position
        if count == 0:
            return (), self.values
        first = self.signature.names[:count]
        by_position = [self.values[name] for name in first if name in self.values]
        by_name = {name: value for name, value in self.values.items() if name not in first}
        return (*by_position, *self.unnamed), by_name

    def _name(self, kind: Kind) -> str | None:
        """The name under which the call carries an argument of this kind, or None."""
        names = [name for name in SPELLINGS[kind] if self.values.get(name) is not None]
        if kind is Kind.CACHE:
            # A cache is known by what it can do as well, under whatever name it comes.
            names = names or self._unknown_caches()
            self._require_one_cache(names)
        if names:
            return names[0]
        return None

    def _unknown_caches(self) -> list[str]:
        """The names that are not known under which the call carries a cache."""
        return [name for name, value in self.values.items() if name not in KIND_OF and is_cache(value)]

    def _require_one_cache(self, names: Sequence[str]) -> None:
        """Refuse names under which different caches come.

        Raises:
            StateError: naming them.
        """
        if any(self.values[name] is not self.values[names[0]] for name in names):
            raise StateError(
                f"the call carries several caches, {', '.join(names)}, and nothing says which one is meant"
            )

    def _unknown(self) -> Iterator[tuple[str, Any]]:
        """The arguments of no known kind, but for those that cannot matter."""
        for name, value in self.values.items():
            if (
                name not in KIND_OF
                and name not in _OF_NO_TOKEN
                and not isinstance(value, _PLAIN)
                and not is_cache(value)
            ):
                yield name, value
        for number, value in enumerate(self.unnamed):
            yield f"argument {len(self.signature.names) + number}", value

    def refuse_unknown_tokens(self, host: nn.Module) -> None:
        """Refuse a call whose tokens come under a name that is not known.

        Args:
            host: the module that is called, for the message, here and below.

        Raises:
            StateError: saying what was looked for.
        """
        if self.get(Kind.TOKENS) is None and self.get(Kind.EMBEDDINGS) is None:
            wanted = " or ".join((*SPELLINGS[Kind.TOKENS], *SPELLINGS[Kind.EMBEDDINGS]))
            raise StateError(
                f"a {type(host).__name__} was called with {', '.join(self.values) or 'nothing'}, and its "
                f"adapters look for {wanted} ({versions()})"
            )

    def refuse_unknown_cache(self, host: nn.Module) -> None:
        """Refuse a cache that does not say how many tokens it holds, and what may be a cache under a name
        that is not known.

        Raises:
            StateError: naming the argument.
        """
        name = self._name(Kind.CACHE)
        if name is not None and not says_length(self.values[name]):
            raise StateError(
                f"a {type(host).__name__} was called with {name!r} (a {type(self.values[name]).__name__}), "
                "which does not say how many tokens it holds (recurrent states count none), and its "
                f"adapters have to know: call it without, in generate with use_cache=False ({versions()})"
            )
        for name, value in self._unknown():
            if could_be_cache(value):
                raise self._refused(host, name, "may be a cache that holds tokens")

    def refuse_unknown_mask(self, host: nn.Module, past: int) -> None:
        """Refuse what may be a mask, of a module that takes none by a name that is known.

        Args:
            host: the module that is called.
            past: how many positions the cache holds.

        Raises:
            StateError: naming the argument.
        """
        if self.signature.takes(Kind.MASK):
            return
        for name, tensor in self._unknown_for_each_token(past):
            if "label" not in name and could_be_mask(tensor):
                raise self._refused(host, name, "has something for each token, and may be a mask")

    def refuse_unknown_of_tokens(self, host: nn.Module, past: int) -> None:
        """Refuse what else there is for each token: where virtual tokens are put in, it would have to follow
        them.

        Args:
            host: the module that is called.
            past: how many positions the cache holds.

        Raises:
            StateError: naming the argument.
        """
        for name, _ in self._unknown():
            if "position" in name:
                raise self._refused(host, name, "may say positions of tokens, which virtual tokens move")
        for name, _ in self._unknown_for_each_token(past):
            if not name.startswith(_OTHER_INPUTS):
                raise self._refused(host, name, "has something for each token")

    def _unknown_for_each_token(self, past: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of no known kind that have the shape of something for each token."""
        embeddings = self.get(Kind.EMBEDDINGS)
        if embeddings is None:
            tokens = self.get(Kind.TOKENS)
        else:
            tokens = embeddings
        # In a step of one token any (batch, 1) has that shape; what really is for each token was refused at
        # the beginning.
        if past > 0 and tokens.shape[1] == 1:
            return
        for name, value in self._unknown():
            for tensor in tensors_in(value):
                if is_for_each_token(tensor, tokens, past):
                    yield name, tensor

    def refuse_unknown_states(self, hidden: Tensor) -> None:
        """Refuse a call of attention that may attend to other states than its input, by a name that is not
        known.

        Only states of another length can be told from what else belongs to the input (embeddings of its
        positions).

        Args:
            hidden: its input, ``(batch, tokens, size)``.

        Raises:
            StateError: naming the argument.
        """
        batch, tokens, size = hidden.shape
        for name, value in self.values.items():
            if name in KIND_OF or not isinstance(value, Tensor) or value.dim() != 3:
                continue
            is_like_input = value.shape[0] == batch and value.shape[2] == size
            if is_like_input and value.shape[1] != tokens:
                raise StateError(
                    f"attention was called with {name!r}, {tuple(value.shape)}, which may be what it attends "
                    "to and which its adapters do not know; they know "
                    f"{' and '.join(SPELLINGS[Kind.ENCODER_STATES])} ({versions()})"
                )

    def _refused(self, host: nn.Module, name: str, what: str) -> StateError:
        if name in self.values:
            cls = type(self.values[name]).__name__
        else:
            cls = "value"
        known = ", ".join(name for name in self.signature.parameters if name in KIND_OF)
        return StateError(
            f"a {type(host).__name__} was called with {name!r} (a {cls}), which {what} and which the "
            f"adapters that act there do not know; of its arguments they know {known or 'none'}: leave it "
            f"out, deactivate them, or use a method that has nothing to do with it ({versions()})"
        )


def is_cache(value: Any) -> bool:
    """Whether a value keeps keys and values and says of how many positions, as every cache of `transformers`
    does: told by its method ``get_seq_length``, and not by its class.
    """
    return callable(getattr(value, "get_seq_length", None))


def says_length(cache: Any) -> bool:
    """Whether a cache can say how many positions it holds: one of nothing but recurrent states (Mamba)
    cannot, since none of its layers can.
    """
    layers = getattr(cache, "layers", None) or ()
    return is_cache(cache) and (len(layers) == 0 or any(is_cache(layer) for layer in layers))


def could_be_cache(value: Any) -> bool:
    """Whether a value of no known kind may hold the tokens of calls before.

    That is an object that is neither plain data nor made of tensors, and what caches were before there was a
    class for
    them: tuples with the keys and values of each layer, ``(batch, heads, tokens, size)``.

    >>> states = torch.ones(1, 7, 4)
    >>> could_be_cache(object()), could_be_cache(2.0), could_be_cache((states, states))
    (True, False, False)
    >>> could_be_cache(((torch.ones(1, 2, 7, 4), torch.ones(1, 2, 7, 4)),))
    True
    """
    if isinstance(value, (Tensor, *_PLAIN)) or hasattr(value, "__array__"):
        return False
    if isinstance(value, Mapping):
        return any(could_be_cache(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return any(_are_keys_and_values(item) or could_be_cache(item) for item in value)
    return not callable(value) or "cache" in type(value).__name__.lower()


def _are_keys_and_values(value: Any) -> bool:
    """Whether a value is a tuple of four-dimensional tensors."""
    if not isinstance(value, (tuple, list)) or len(value) < 2:
        return False
    return all(isinstance(item, Tensor) and item.dim() == 4 for item in value)


def could_be_mask(value: Tensor) -> bool:
    """Whether a tensor may say which tokens are real: yes or no of each, or something of each query and key.

    >>> [could_be_mask(torch.tensor([values])) for values in ([1, 0], [True], [1, 7])]
    [True, True, False]
    """
    if value.dim() == 4 or value.dtype == torch.bool:
        return True
    if value.dim() != 2 or torch.compiler.is_compiling():  # values cannot be looked at there
        return False
    return bool(((value == 0) | (value == 1)).all())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that an argument is or holds, in dictionaries, tuples and lists of any depth."""
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
    >>> shapes = ((2, 7), (1, 7, 4), (2, 1, 7, 9), (3, 2, 7))
    >>> [is_for_each_token(torch.ones(shape), ids, 0) for shape in shapes]
    [True, True, True, True]
    >>> [is_for_each_token(torch.ones(shape), ids, 0) for shape in ((2, 4), (7,), (5, 7))]
    [False, False, False]
    """
    batch, new = tokens.shape[:2]
    lengths = (new, new + past)
    shape = tuple(value.shape)
    if not 2 <= len(shape) <= 4:
        return False
    by_token = shape[0] in (1, batch) and shape[1] in lengths  # (batch, tokens, ...)
    by_query = (
        len(shape) == 4 and shape[0] in (1, batch) and shape[2] in lengths
    )  # (batch, heads, queries, keys)
    of_kinds = len(shape) == 3 and shape[1] == batch and shape[2] in lengths  # (kinds, batch, tokens)
    return by_token or by_query or of_kinds


def output_values(output: Any) -> list[Any]:
    """What a model gives, one by one: the values of a dictionary or of a tuple, or the only one that there
    is.
    """
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, (tuple, list)):
        return list(output)
    return [output]


def cache_in(output: Any) -> Any:
    """The cache that a model gives back in its output, or None."""
    for value in output_values(output):
        if is_cache(value):
            return value
    return None


def offset_parameter(positions: type[nn.Module]) -> str | None:
    """The parameter of a module that embeds positions which says how many positions came before, or None.

    It is the one that is the number 0 where it is not given: ``cache_length`` from `transformers` 5.24 on,
    before ``past_key_values_length``.
    """
    for parameter in list(inspect.signature(positions.forward).parameters.values())[1:]:
        if type(parameter.default) is int and parameter.default == 0:
            return parameter.name
    return None


def versions() -> str:
    """The versions that a report of a fault has to name."""
    found = []
    for name in ("grafts", "torch", "transformers"):
        if name != "grafts" and name not in sys.modules:
            continue
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # used from its folder, without being installed
            found.append(name)
    return ", ".join(found)
