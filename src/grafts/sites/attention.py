"""The attention site: inside attention, after rotary and cache, where queries, keys, values and mask are
known.

Modern `transformers` models fetch their attention kernel by the name that the attention module's config
gives. An adapted module gets a view of its config that names the kernel of this file while an adapter acts
there, and delegates everything else; that kernel calls the real one. Other modules are watched during their
forward: a call of `F.scaled_dot_product_attention` is intercepted, or the steps of attention written out. A
    module without adapters, and a
module whose adapters are idle, runs the real kernel itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.errors import StateError
from grafts.sites.arguments import SPELLINGS, CallArguments, CallSignature, Kind
from grafts.sites.attention_interception import Interception, UnfusedAttention
from grafts.sites.attention_routes import route_of, unflatten, written_forward
from grafts.sites.prefix import Prefix, PrefixedCache, extended
from grafts.sites.site import Part, Site

KERNEL = "grafts"  # the name under which `transformers` finds the kernel of this file


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
        prompt_bias: what the caller gave for the prompts of each row, ``(batch, 1 or length, hidden)``, or
            None.
        cache: what the module was called with to keep keys and values, or None.
        begin: where the queries stand, ``(queries,)``, where the caller has said so.
        where: which rows of the batch these are; None for all.
    """

    site: AttentionSite
    host: nn.Module
    query: Tensor
    key_heads: int
    scaling: float
    hidden: Tensor
    prompt_bias: Tensor | None
    cache: Any = None
    begin: Tensor | None = None
    where: Tensor | None = None

    def project(self, prompt: Tensor, names: tuple[str, str] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of ``prompt`` through the module's own projections (and norms), at position 0.

        Args:
            prompt: ``(batch or 1, length, hidden)``.
            names: the module's children that make keys and values; without them the module itself runs over
                the prompt.

        Returns:
            Keys and values, ``(batch or 1, key-value heads, length, head_dim)``.
        """
        if names is None:
            keys, values = self.site.project(self.host, prompt)
        else:
            keys, values = (
                unflatten(self.host.get_submodule(name)(prompt), -1, (self.key_heads, -1)).transpose(1, 2)
                for name in names
            )
        if self.where is None or keys.shape[0] in (1, self.query.shape[0]):
            return keys, values
        return keys.index_select(0, self.where), values.index_select(
            0, self.where
        )  # rows have chosen in the projections too

    def past(self) -> int:
        """How many tokens came before the queries; looks into the cache, which has taken in theirs."""
        if self.begin is not None:
            return int(self.begin[0])
        if self.site._called is not None:
            self.site._called.refuse_unknown_cache(self.host)
        if self.cache is None:
            return 0
        return max(int(self.cache.get_seq_length()) - self.query.shape[2], 0)

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
    """What one adapter holds and computes inside one attention module. A method writes one of the two
    functions.

    Attributes:
        after_projection: what `beside` gives is added to the module's output and not before its output
            projection.
        takes_bias: it reads the call's ``prompt_bias``.
    """

    after_projection: bool = False
    takes_bias: bool = False

    def in_front(self, attention: Attention) -> tuple[Tensor, Tensor] | None:
        """Keys and values that every query attends to before the others.

        Returns:
            ``(batch or 1, key-value heads, length, head_dim)`` each, or None.
        """
        return None

    def position_bias(self, attention: Attention) -> Tensor | None:
        """What is added to the scores of what stands `in_front`, in a model whose scores have a bias by
        position.

        Returns:
            ``(1, heads, queries, length)``, or None.
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
    _called: CallArguments | None = None
    _captured: list[tuple[Tensor, Tensor]] | None = None
    _late: Tensor | None = None
    _values: Tensor | None = None
    _mode: Interception | None = None
    _reached: bool = False

    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Stand between the module and its kernel."""
        forward = written_forward(type(host))
        self.route = route_of(type(host))  # type: ignore[arg-type]
        self.signature = CallSignature(forward)
        if self.route == "interface":
            self.functions = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
            self.eager = forward.__globals__.get("eager_attention_forward")
            self.functions.register(KERNEL, attention)
            host.__dict__["config"] = ConfigView(host.config, self)
        before = host.register_forward_pre_hook(self._before, with_kwargs=True)
        # a mode has to be left also when the module fails; hooks that are called come what may do not compile
        return before, host.register_forward_hook(
            self._after, with_kwargs=True, always_call=self.route != "interface"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the kernel known where a model is unpickled."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.route == "interface":
            self.functions.register(KERNEL, attention)

    def detach(self, host: nn.Module) -> None:
        """The exact inverse of `attach`."""
        super().detach(host)
        if isinstance(host.__dict__.get("config"), ConfigView):
            host.__dict__["config"] = real_config(host.__dict__["config"])

    def _before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.setup.rows is None and self.setup.routed:
            self.setup.require_forward()
        if self.acts():
            self._called = self.signature.bind(args, kwargs)
            self._reached = False
            if self.route != "interface":
                self._mode = self._watch(host, self._called.first().shape[0])
                self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _watch(self, host: nn.Module, batch: int) -> Interception:
        return Interception(self, host) if self.route == "call" else UnfusedAttention(self, host, batch)

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._reached, self._mode = self._mode.reached, None
        called = self._called is not None
        late, self._late, self._called = self._late, None, None
        if called and output is not None and not self._reached:
            raise StateError(
                f"a {type(host).__name__} came to no attention kernel, so its adapters could not act"
            )
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
            if self.route == "interface":
                type(host).forward(host, **given)
            else:
                with self._watch(host, prompt.shape[0]):
                    type(host).forward(host, **given)
        finally:
            self._captured = None
        if not captured:
            raise StateError(
                f"a {type(host).__name__} came to no attention kernel when it was run over a prompt"
            )
        return captured[0]

    def _neutral(self, prompt: Tensor) -> dict[str, Any]:
        """The arguments of the present call with ``prompt`` for tokens at position 0, without mask and
        cache.
        """
        called = self._called
        assert called is not None
        hidden, length = called.first(), prompt.shape[1]
        others = [
            name for name in SPELLINGS[Kind.ENCODER_STATES] if isinstance(called.values.get(name), Tensor)
        ]
        if not others:
            called.refuse_unknown_states(hidden)
        result = {name: _neutral(name, value, length) for name, value in called.values.items()}
        # cross-attention projects keys and values from other states than its input
        first = called.first_name()
        assert first is not None
        result[first] = hidden.new_zeros(1, 1, hidden.shape[-1]) if others else prompt
        for name in others:
            result[name] = prompt
        return result

    def _present(self, host: nn.Module, query: Tensor, key: Tensor, scaling: float | None) -> Attention:
        called = self._called
        assert called is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        cache, begin = called.get(Kind.CACHE), called.get(Kind.CACHE_POSITIONS)
        bias = self.setup.prompt_bias
        return Attention(self, host, query, key.shape[1], scale, called.first(), bias, cache, begin)

    def kernel(
        self, host: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The kernel of an adapted module of `transformers`; the arguments are those of every kernel
        there.
        """
        if self._captured is not None:
            self._captured.append((key, value))
            return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
        self._reached = True
        name = real_config(host.config)._attn_implementation
        real: Any = self.eager if name in (None, "eager") else self.functions[name]
        now = self._present(host, query, key, arguments.get("scaling"))
        prefix = self._prefixes(now, key)
        paged = arguments.get("cache")
        if prefix is not None:
            keys = key.shape[2] if paged is None or mask is None else mask.shape[-1]
            mask, arguments = extended(
                mask, name, _is_causal(host, arguments), query, keys, prefix, arguments
            )
            if paged is None:
                key, value = prefix.before(key, value)
            else:
                arguments["cache"] = PrefixedCache(paged, prefix)
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
        """`F.scaled_dot_product_attention` in an adapted module that calls it itself; the arguments are its
        own.
        """
        if self._captured is not None:
            self._captured.append((key, value))
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        now = self._present(host, query, key, scale)
        prefix = self._prefixes(now, key)
        if prefix is not None:
            attn_mask, _ = extended(attn_mask, "sdpa", is_causal, query, key.shape[2], prefix, {})
            key, value = prefix.before(key, value)
            is_causal = False
        more = {"enable_gqa": True} if enable_gqa else {}
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal=is_causal, scale=scale, **more
        )
        added = self._beside(now)
        return output if added is None else output + added

    def prefix_scores(self, host: nn.Module, query: Tensor, key: Tensor, scaling: float) -> Tensor | None:
        """The scores of a prefix, ``(batch or 1, heads, queries, length)``, for a module that computes in
        steps, or None.
        """
        if self._captured is not None:
            return None
        prefix = self._prefixes(self._present(host, query, key, scaling), key)
        if prefix is None:
            return None
        self._values = prefix.values
        scores = query @ prefix.keys.transpose(-1, -2) * scaling
        if prefix.bias is not None:
            scores = scores + prefix.bias.to(scores.dtype)
        if prefix.visible is None:
            return scores
        return scores.masked_fill(~prefix.visible[:, None, None, :], torch.finfo(scores.dtype).min)

    def read(
        self,
        host: nn.Module,
        query: Tensor,
        key: Tensor,
        scaling: float,
        weights: Tensor,
        value: Tensor,
        of_prefix: Tensor | None,
    ) -> Tensor:
        """The last product of a module that computes in steps, and what its adapters add to it.

        Args:
            host: the module.
            query: ``(batch, heads, queries, head_dim)``.
            key: ``(batch, heads, keys, head_dim)``.
            scaling: what the products of both were multiplied by.
            weights: of the module's own keys, ``(batch, heads, queries, keys)``.
            value: ``(batch, heads, keys, head_dim)``.
            of_prefix: the weights of a prefix, ``(batch, heads, queries, length)``, or None.
        """
        output = weights @ value
        if self._captured is not None:
            self._captured.append((key, value))
            return output
        if of_prefix is not None:
            assert self._values is not None
            output, self._values = output + of_prefix.to(output.dtype) @ self._values.to(output.dtype), None
        added = self._beside(self._present(host, query, key, scaling))
        return output if added is None else output + added

    def _beside(self, now: Attention) -> Tensor | None:
        """What the parts add to the heads' output."""
        total: Tensor | None = None
        for part, where in self._acting(now.query):
            added = part.beside(now if where is None else now.rows(where))
            if added is None:
                continue
            if where is not None:
                added = now.query.new_zeros(*now.query.shape[:-1], added.shape[-1]).index_copy(
                    0, where, added
                )
            if part.after_projection:
                heads = added.transpose(1, 2).flatten(2)
                self._late = heads if self._late is None else self._late + heads
            else:
                total = added if total is None else total + added
        return total

    def _prefixes(self, now: Attention, like: Tensor) -> Prefix | None:
        """The keys and values of all parts together."""
        given = []
        for part, where in self._acting(now.query):
            pair = part.in_front(now if where is None else now.rows(where))
            if pair is not None:
                keys, values = (x.to(like.device, like.dtype) for x in pair)
                bias = part.position_bias(now)
                if where is None:
                    given.append(Prefix(keys, values, None, bias))
                else:
                    given.append(Prefix.of_rows(keys, values, bias, where, now.query.shape[0]))
        return Prefix.joined(given, like.shape[0]) if given else None

    def _acting(self, query: Tensor) -> Iterator[tuple[AttendingPart, Tensor | None]]:
        """The parts that act now, each with the rows of the batch that it acts on, or None for all."""
        rows = self.setup.rows
        if rows is None:
            for part in self.running():
                yield cast("AttendingPart", part), None
        else:
            for key, part in self.routed(rows):
                yield cast("AttendingPart", part), rows.of(key, query.shape[0], query.device)


AttendingPart.site = AttentionSite


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
        if name in SPELLINGS[Kind.CACHE_POSITIONS]:
            return torch.arange(length, device=value.device)
        positions = name in SPELLINGS[Kind.POSITIONS]
        return torch.zeros(1, length, dtype=value.dtype, device=value.device) if positions else None
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


class ConfigView:
    """A model's config as one attention module sees it: the same, but for the name of the kernel while
    adapters act there.
    """

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
    """The kernel that adapted modules of `transformers` fetch; see its `AttentionInterface` for the
    arguments.
    """
    site = module._modules[AttentionSite.child]
    assert isinstance(site, AttentionSite)
    return site.kernel(module, query, key, value, attention_mask, arguments)
