"""The attention site: inside attention, after rotary and cache, where queries, keys, values and mask are known.

Modern `transformers` models fetch their attention kernel by the name that the attention module's config gives. An adapted
module gets a view of its config that names the kernel of this file while an adapter acts there, and delegates everything
else; that kernel calls the real one. Other modules that call `F.scaled_dot_product_attention` are reached by intercepting
that call during their forward. A module without adapters, and a module whose adapters are idle, runs the real kernel itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from grafts.errors import StateError
from grafts.sites.site import Part, Site

KERNEL = "grafts"  # the name under which `transformers` finds the kernel of this file
Route = Literal["interface", "call"]
_OTHER_STATES = ("key_value_states", "encoder_hidden_states")  # what cross-attention calls that which it attends to


@dataclass(frozen=True)
class Attention:
    """One call of an attention kernel.

    Attributes:
        site: where it happens.
        host: the attention module.
        query: after rotary, ``(batch, heads, queries, head_dim)``.
        key_heads: how many heads the keys have.
        scaling: what the products of queries and keys are multiplied by.
        hidden: the module's input, ``(batch, queries, hidden)``.
        prompt_bias: what the caller gave for the prompts of each row, ``(batch, 1 or length, hidden)``, or None.
        caches: whether the module was called with a cache.
        where: which rows of the batch these are; None for all.
    """

    site: AttentionSite
    host: nn.Module
    query: Tensor
    key_heads: int
    scaling: float
    hidden: Tensor
    prompt_bias: Tensor | None
    caches: bool
    where: Tensor | None = None

    def project(self, prompt: Tensor, names: tuple[str, str] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of ``prompt`` through the module's own projections (and norms), at position 0.

        Args:
            prompt: ``(batch or 1, length, hidden)``.
            names: the module's children that make keys and values; without them the module itself runs over the prompt.

        Returns:
            Keys and values, ``(batch or 1, key-value heads, length, head_dim)``.
        """
        if names is None:
            keys, values = self.site.project(self.host, prompt)
        else:
            keys, values = (
                _unflatten(self.host.get_submodule(name)(prompt), -1, (self.key_heads, -1)).transpose(1, 2) for name in names
            )
        if self.where is None or keys.shape[0] in (1, self.query.shape[0]):
            return keys, values
        return keys.index_select(0, self.where), values.index_select(0, self.where)  # rows have chosen in the projections too

    def rows(self, where: Tensor) -> Attention:
        """The call for some rows of the batch."""
        bias = None if self.prompt_bias is None else self.prompt_bias.index_select(0, where)
        return replace(
            self,
            query=self.query.index_select(0, where),
            hidden=self.hidden.index_select(0, where),
            prompt_bias=bias,
            where=where,
        )


class AttendingPart(Part):
    """What one adapter holds and computes inside one attention module. A method writes one of the two functions.

    Attributes:
        after_projection: what `beside` gives is added to the module's output and not before its output projection.
    """

    after_projection: bool = False

    def in_front(self, attention: Attention) -> tuple[Tensor, Tensor] | None:
        """Keys and values that every query attends to before the others.

        Returns:
            ``(batch or 1, key-value heads, length, head_dim)`` each, or None.
        """
        return None

    def beside(self, attention: Attention) -> Tensor | None:
        """What is added to the heads' output.

        Returns:
            ``(batch, heads, queries, head_dim)``, or None.
        """
        return None


class AttentionSite(Site):
    """All adapters inside one attention module."""

    child = "grafts_attention"
    _called: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    _captured: list[tuple[Tensor, Tensor]] | None = None
    _late: Tensor | None = None
    _mode: _Interception | None = None

    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Stand between the module and its kernel."""
        forward = _written_forward(type(host))
        self.route = route_of(type(host))  # type: ignore[arg-type]
        self.names = tuple(inspect.signature(forward).parameters)[1:]
        if self.route == "interface":
            self.functions = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
            self.eager = forward.__globals__.get("eager_attention_forward")
            self.functions.register(KERNEL, attention)
            host.__dict__["config"] = ConfigView(host.config, self)
        before = host.register_forward_pre_hook(self._before, with_kwargs=True)
        # a mode has to be left also when the module fails; hooks that are called come what may do not compile
        return before, host.register_forward_hook(self._after, with_kwargs=True, always_call=self.route == "call")

    def detach(self, host: nn.Module) -> None:
        """The exact inverse of `attach`."""
        super().detach(host)
        if isinstance(host.__dict__.get("config"), ConfigView):
            host.__dict__["config"] = real_config(host.__dict__["config"])

    def acts(self) -> bool:
        """Whether some adapter may act here now."""
        if self.setup.rows is not None:
            return any(key in self.children_of for key in self.setup.rows.keys)
        return any(key in self.children_of for key in self.setup.running)

    def _before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.setup.rows is None and self.setup.routed:
            self.setup.require_forward()
        if self.acts():
            self._called = args, kwargs
            if self.route == "call":
                self._mode = _Interception(self, host)
                self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None
        late, self._late, self._called = self._late, None, None
        if late is None:
            return output
        if isinstance(output, Tensor):
            return output + late
        return type(output)((output[0] + late, *output[1:]))

    def project(self, host: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """`Attention.project`: the module itself runs over the prompt, up to the kernel.

        Raises:
            StateError: the module cannot be run so.
        """
        assert self._called is not None
        captured: list[tuple[Tensor, Tensor]] = []
        self._captured = captured
        given = self._neutral(prompt)
        try:
            if self.route == "call":
                with _Interception(self, host):
                    type(host).forward(host, **given)
            else:
                type(host).forward(host, **given)
        finally:
            self._captured = None
        if not captured:
            raise StateError(f"a {type(host).__name__} came to no attention kernel when it was run over a prompt")
        return captured[0]

    def _neutral(self, prompt: Tensor) -> dict[str, Any]:
        """The arguments of the present call with ``prompt`` for tokens at position 0, without mask and cache."""
        assert self._called is not None
        args, kwargs = self._called
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        others = [name for name in _OTHER_STATES if isinstance(given.get(name), Tensor)]
        hidden = given[self.names[0]]
        length = prompt.shape[1]
        result = {name: _neutral(name, value, length) for name, value in given.items()}
        result[self.names[0]] = hidden.new_zeros(1, 1, hidden.shape[-1]) if others else prompt
        return result | dict.fromkeys(others, prompt)

    def _present(self, host: nn.Module, query: Tensor, key: Tensor, scaling: float | None) -> Attention:
        assert self._called is not None
        args, kwargs = self._called
        hidden = args[0] if args else kwargs[self.names[0]]
        cached = any(kwargs.get(name) is not None for name in ("past_key_values", "past_key_value", "layer_past"))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return Attention(self, host, query, key.shape[1], scale, hidden, self.setup.prompt_bias, cached)

    def kernel(
        self, host: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The kernel of an adapted module of `transformers`; the arguments are those of every kernel there."""
        if self._captured is not None:
            self._captured.append((key, value))
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
        name = real_config(host.config)._attn_implementation
        real: Any = self.eager if name in (None, "eager") else self.functions[name]
        now = self._present(host, query, key, arguments.get("scaling"))
        prefix = self._prefixes(now, key)
        if prefix is not None:
            mask, arguments = _extended(mask, name, _is_causal(host, arguments), query, key.shape[2], prefix, arguments)
            key, value = prefix.before(key, value)
        output, weights = real(host, query, key, value, mask, **arguments)
        added = self._beside(now)
        return (output if added is None else output + added.transpose(1, 2)), weights

    def call(
        self,
        host: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`F.scaled_dot_product_attention` in an adapted module that calls it itself; the arguments are its own."""
        if self._captured is not None:
            self._captured.append((key, value))
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        now = self._present(host, query, key, scale)
        prefix = self._prefixes(now, key)
        if prefix is not None:
            attn_mask, _ = _extended(attn_mask, "sdpa", is_causal, query, key.shape[2], prefix, {})
            key, value = prefix.before(key, value)
            is_causal = False
        more = {"enable_gqa": True} if enable_gqa else {}
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal=is_causal, scale=scale, **more
        )
        added = self._beside(now)
        return output if added is None else output + added

    def _beside(self, now: Attention) -> Tensor | None:
        """What the parts add to the heads' output."""
        total: Tensor | None = None
        for part, where in self._acting(now.query):
            added = part.beside(now if where is None else now.rows(where))
            if added is None:
                continue
            if where is not None:
                added = now.query.new_zeros(*now.query.shape[:-1], added.shape[-1]).index_copy(0, where, added)
            if part.after_projection:
                heads = added.transpose(1, 2).flatten(2)
                self._late = heads if self._late is None else self._late + heads
            else:
                total = added if total is None else total + added
        return total

    def _prefixes(self, now: Attention, like: Tensor) -> _Prefix | None:
        """The keys and values of all parts together."""
        given = []
        for part, where in self._acting(now.query):
            pair = part.in_front(now if where is None else now.rows(where))
            if pair is not None:
                keys, values = (x.to(like.dtype) for x in pair)
                if where is None:
                    given.append(_Prefix(keys, values, None))
                else:
                    given.append(_Prefix.of_rows(keys, values, where, now.query.shape[0]))
        return _Prefix.joined(given, like.shape[0]) if given else None

    def _acting(self, query: Tensor) -> Iterator[tuple[AttendingPart, Tensor | None]]:
        """The parts that act now, each with the rows of the batch that it acts on, or None for all."""
        rows = self.setup.rows
        if rows is None:
            for part in self.running():
                yield cast(AttendingPart, part), None
        else:
            for key, part in self.routed(rows):
                yield cast(AttendingPart, part), rows.of(key, query.shape[0], query.device)


AttendingPart.site = AttentionSite


@dataclass(frozen=True)
class _Prefix:
    """Keys and values in front of a module's own, ``(batch or 1, heads, length, head_dim)``.

    Attributes:
        keys: the keys.
        values: the values.
        visible: which of them each row attends to, ``(batch, length)``; None for all.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None

    @classmethod
    def of_rows(cls, keys: Tensor, values: Tensor, where: Tensor, batch: int) -> _Prefix:
        """A prefix that some rows of a batch have."""

        def spread(x: Tensor) -> Tensor:
            rows = x.expand(where.shape[0], *x.shape[1:])
            return x.new_zeros(batch, *x.shape[1:]).index_copy(0, where, rows)

        here = torch.zeros(batch, dtype=torch.bool, device=where.device).index_fill(0, where, True)
        return cls(spread(keys), spread(values), here[:, None].expand(batch, keys.shape[2]))

    @classmethod
    def joined(cls, prefixes: Sequence[_Prefix], batch: int) -> _Prefix:
        """Several as one, in order."""
        if len(prefixes) == 1:
            return prefixes[0]
        visible = None
        if any(p.visible is not None for p in prefixes):
            seen = [torch.ones(batch, p.length, dtype=torch.bool, device=p.keys.device) for p in prefixes]
            visible = torch.cat([all_ if p.visible is None else p.visible for p, all_ in zip(prefixes, seen, strict=True)], 1)
        keys, values = (
            torch.cat([x.expand(batch, *x.shape[1:]) for x in xs], 2)
            for xs in ([p.keys for p in prefixes], [p.values for p in prefixes])
        )
        return cls(keys, values, visible)

    @property
    def length(self) -> int:
        """How many there are."""
        return self.keys.shape[2]

    def before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The module's keys and values with these in front."""
        return tuple(  # type: ignore[return-value]
            torch.cat([own.expand(x.shape[0], *own.shape[1:]), x], 2) for own, x in ((self.keys, key), (self.values, value))
        )


def _extended(
    mask: Any, name: str | None, causal: bool, query: Tensor, keys: int, prefix: _Prefix, arguments: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A kernel's mask and arguments for keys with a prefix, which every query attends to.

    Args:
        mask: what the kernel was to get, in its own kind, for ``keys`` keys.
        name: the kernel's.
        causal: whether the kernel is causal by itself where it gets no mask.
        query: ``(batch, heads, queries, head_dim)``.
        keys: how many keys there are without the prefix.
        prefix: what comes in front.
        arguments: the kernel's other arguments.

    Raises:
        StateError: the kernel cannot be told about a prefix.
    """
    changed = dict(arguments)
    if (bias := arguments.get("position_bias")) is not None:
        changed["position_bias"] = F.pad(bias, (prefix.length, 0))
    if name is not None and "flash" in name:
        return _extended_flash(mask, keys, prefix, changed, query.shape[0]), changed
    if name == "flex_attention":
        return _extended_flex(mask, query, keys, prefix), changed
    batch, queries = query.shape[0], query.shape[2]
    if mask is None and name not in (None, "eager") and causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]  # as the kernel's own
        changed.pop("is_causal", None)
    if mask is None and prefix.visible is None:
        return None, changed
    if mask is None:
        kind = query.dtype if name in (None, "eager") else torch.bool
        mask = torch.zeros(1, 1, 1, keys, dtype=kind, device=query.device)
        mask = mask if kind != torch.bool else ~mask
    mask = mask[..., :keys]
    boolean = mask.dtype == torch.bool
    if prefix.visible is None:
        return F.pad(mask, (prefix.length, 0), value=boolean), changed
    seen = prefix.visible[:, None, None, :]
    if not boolean:
        seen = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device).masked_fill(~seen, torch.finfo(mask.dtype).min)
    shape = batch, mask.shape[1], queries
    return torch.cat([seen.expand(*shape, -1), mask.expand(*shape, -1)], -1), changed


def _extended_flash(
    mask: Tensor | None, keys: int, prefix: _Prefix, arguments: Mapping[str, Any], batch: int
) -> Tensor | None:
    """For kernels that take a padding mask ``(batch, keys)``, and align their causal mask to the end."""
    if arguments.get("sliding_window") is not None or arguments.get("cu_seq_lens_q") is not None:
        raise StateError(
            "flash attention with a sliding window or packed sequences cannot attend to a prefix as well: "
            'use model.set_attn_implementation("sdpa")'
        )
    if mask is None and prefix.visible is None:
        return None
    if mask is None:
        mask = torch.ones(batch, keys, dtype=torch.long, device=prefix.keys.device)
    if prefix.visible is None:
        return F.pad(mask, (prefix.length, 0), value=1)
    return torch.cat([prefix.visible.to(mask.dtype), mask], 1)


def _extended_flex(mask: Any, query: Tensor, keys: int, prefix: _Prefix) -> Any:
    """For flex attention, whose mask is a function of indices."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask  # noqa: PLC0415 - slow, and rarely used

    length, visible = prefix.length, prefix.visible
    if isinstance(mask, Tensor):  # scores that are added
        return F.pad(mask[..., :keys], (length, 0))
    if mask is None and visible is None:
        return None
    own = mask.mask_mod if isinstance(mask, BlockMask) else None

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_prefix = k < length
        here = in_prefix if visible is None else in_prefix & visible[b, k.clamp_max(length - 1)]
        there = ~in_prefix if own is None else ~in_prefix & own(b, h, q, (k - length).clamp_min(0))
        return here | there

    return create_block_mask(mask_mod, query.shape[0], None, query.shape[2], keys + length, device=str(query.device))


def _is_causal(host: nn.Module, arguments: Mapping[str, Any]) -> bool:
    said = arguments.get("is_causal")
    return bool(getattr(host, "is_causal", True) if said is None else said)


def _neutral(name: str, value: Any, length: int) -> Any:
    """An argument of an attention module for ``length`` tokens at position 0, without mask and cache."""
    if name in ("position_embeddings", "rotary_pos_emb") and isinstance(value, (tuple, list)):
        return tuple(_neutral(kind, x, length) for kind, x in zip(("cos", "sin"), value, strict=True))
    if isinstance(value, Tensor):
        lead = [1] * (value.dim() - 2)
        if name == "cos" or value.is_complex():
            return torch.ones(*lead, length, value.shape[-1], dtype=value.dtype, device=value.device)
        if name == "sin":
            return torch.zeros(*lead, length, value.shape[-1], dtype=value.dtype, device=value.device)
        return torch.zeros(1, length, dtype=value.dtype, device=value.device) if name == "position_ids" else None
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


class ConfigView:
    """A model's config as one attention module sees it: the same, but for the name of the kernel while adapters act there."""

    def __init__(self, config: Any, site: AttentionSite) -> None:
        self.__dict__.update(_grafts_config=config, _grafts_site=site)

    @property
    def _attn_implementation(self) -> Any:
        return KERNEL if self._grafts_site.acts() else self._grafts_config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        """What the config has; Python's own protocols (copying, pickling) ask the view itself."""
        if name.startswith(("__", "_grafts_")):
            raise AttributeError(name)
        return getattr(self._grafts_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Into the config."""
        setattr(self._grafts_config, name, value)


def real_config(config: Any) -> Any:
    """The config behind a view, or itself."""
    return config.__dict__["_grafts_config"] if isinstance(config, ConfigView) else config


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """The kernel that adapted modules of `transformers` fetch; see its `AttentionInterface` for the arguments."""
    site = module._modules[AttentionSite.child]
    assert isinstance(site, AttentionSite)
    return site.kernel(module, query, key, value, attention_mask, arguments)


class _Interception(TorchFunctionMode):
    """Brings a module's calls of `F.scaled_dot_product_attention` to its site."""

    def __init__(self, site: AttentionSite, host: nn.Module) -> None:
        super().__init__()
        self.site, self.host = site, host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of PyTorch in the meantime."""
        if func is F.scaled_dot_product_attention:
            return self.site.call(self.host, *args, **(kwargs or {}))
        if func is Tensor.unflatten:  # compilers cannot trace it from here, though they can where it was written
            return _unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    dim = dim % x.dim()
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _written_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """A class's ``forward`` as it was written, without decorators."""
    return cast(Callable[..., Any], inspect.unwrap(cls.forward))


@functools.cache
def route_of(cls: type[nn.Module]) -> Route | None:
    """How the attention kernel of a class of modules is reached; None where it has none, or none that can be reached.

    >>> route_of(nn.Linear) is None
    True
    """
    forward = _written_forward(cls)
    code = getattr(forward, "__code__", None)
    if cls.__module__.startswith("torch.") or code is None:
        return None
    if "ALL_ATTENTION_FUNCTIONS" in code.co_names and "ALL_ATTENTION_FUNCTIONS" in forward.__globals__:
        return "interface"
    methods = [inspect.unwrap(f) for c in cls.__mro__ if c is not nn.Module for f in vars(c).values() if inspect.isfunction(f)]
    called = any("scaled_dot_product_attention" in f.__code__.co_names for f in methods if hasattr(f, "__code__"))
    return "call" if called else None
