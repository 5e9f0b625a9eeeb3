"""The attention site: inside attention, after rotary and cache, where queries, keys, values and mask are
known.

Modern `transformers` models fetch their attention kernel by the name that the attention module's config
gives. An adapted module gets a view of its config that names the kernel of this file while an adapter acts
there, and delegates everything else; that kernel calls the real one. Other modules are watched during their
forward: a call of `F.scaled_dot_product_attention` is intercepted, or the steps of attention written out. A
module without adapters, and a module whose adapters are idle, runs the real kernel itself.
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
            keys, values = self._projected(names[0], prompt), self._projected(names[1], prompt)
        if self.where is None or keys.shape[0] in (1, self.query.shape[0]):
            return keys, values
        # Rows have chosen adapters of the projections too, so these are of all rows of the batch.
        return keys.index_select(0, self.where), values.index_select(0, self.where)

    def _projected(self, name: str, prompt: Tensor) -> Tensor:
        """A prompt through one of the module's linears,
        ``(batch or 1, key-value heads, length, head_dim)``.
        """
        projected = self.host.get_submodule(name)(prompt)
        return unflatten(projected, -1, (self.key_heads, -1)).transpose(1, 2)

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
        bias = self.prompt_bias
        if bias is not None:
            bias = bias.index_select(0, where)
        query, hidden = self.query.index_select(0, where), self.hidden.index_select(0, where)
        return replace(self, query=query, hidden=hidden, prompt_bias=bias, where=where)


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
    # The arguments of the present call; None outside of one, and where nothing acts.
    _called: CallArguments | None = None
    # Keys and values that the module has come to, while it runs over a prompt (`project`); else None.
    _captured: list[tuple[Tensor, Tensor]] | None = None
    # What is to be added to the module's output, behind its output projection.
    _late: Tensor | None = None
    # The values of a prefix whose scores were given, of a module that writes attention out.
    _prefix_values: Tensor | None = None
    # What watches the present call, of a module that does not fetch its kernel.
    _mode: Interception | None = None
    # Whether the present call came to a kernel.
    _reached: bool = False

    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Stand between the module and its kernel."""
        forward = written_forward(type(host))
        self.route = route_of(type(host))
        self.signature: CallSignature = CallSignature(forward)
        if self.route == "interface":
            self.functions: Any = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
            self.eager: Any = forward.__globals__.get("eager_attention_forward")
            self.functions.register(KERNEL, attention)
            host.__dict__["config"] = ConfigView(host.config, self)
        before = host.register_forward_pre_hook(self._before, with_kwargs=True)
        # A mode has to be left also when the module fails; hooks that are called come what may do not
        # compile.
        has_mode = self.route != "interface"
        after = host.register_forward_hook(self._after, with_kwargs=True, always_call=has_mode)
        return before, after

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
        """What watches a module that does not fetch its kernel."""
        if self.route == "call":
            return Interception(self, host)
        return UnfusedAttention(self, host, batch)

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._reached = self._mode.reached
            self._mode = None
        was_called = self._called is not None
        late = self._late
        self._late = self._called = None
        if was_called and output is not None and not self._reached:
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
        arguments = self._arguments_for(prompt)
        try:
            if self.route == "interface":
                type(host).forward(host, **arguments)
            else:
                with self._watch(host, prompt.shape[0]):
                    type(host).forward(host, **arguments)
        finally:
            self._captured = None
        if not captured:
            raise StateError(
                f"a {type(host).__name__} came to no attention kernel when it was run over a prompt"
            )
        return captured[0]

    def _arguments_for(self, prompt: Tensor) -> dict[str, Any]:
        """The arguments of the present call with ``prompt`` for tokens at position 0, without mask and
        cache.
        """
        called = self._called
        assert called is not None
        hidden, length = called.first(), prompt.shape[1]
        # Cross-attention projects keys and values from other states than its input.
        states = []
        for name in SPELLINGS[Kind.ENCODER_STATES]:
            if isinstance(called.values.get(name), Tensor):
                states.append(name)
        if not states:
            called.refuse_unknown_states(hidden)
        arguments = {}
        for name, value in called.values.items():
            arguments[name] = _neutral(name, value, length)
        first = called.first_name()
        assert first is not None
        arguments[first] = hidden.new_zeros(1, 1, hidden.shape[-1]) if states else prompt
        for name in states:
            arguments[name] = prompt
        return arguments

    def _present(self, host: nn.Module, query: Tensor, key: Tensor, scaling: float | None) -> Attention:
        """The present call of the kernel, as parts see it."""
        called = self._called
        assert called is not None
        return Attention(
            site=self,
            host=host,
            query=query,
            key_heads=key.shape[1],
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            hidden=called.first(),
            prompt_bias=self.setup.prompt_bias,
            cache=called.get(Kind.CACHE),
            begin=called.get(Kind.CACHE_POSITIONS),
        )

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
        kernel: Any
        if name in (None, "eager"):
            kernel = self.eager
        else:
            kernel = self.functions[name]
        present = self._present(host, query, key, arguments.get("scaling"))
        prefix = self._prefixes(present, key)
        if prefix is not None:
            # With continuous batching the kernel gets all keys from a paged cache, and the mask says how
            # many.
            paged_cache = arguments.get("cache")
            is_paged = paged_cache is not None
            if is_paged and mask is not None:
                keys = mask.shape[-1]
            else:
                keys = key.shape[2]
            causal = _is_causal(host, arguments)
            mask, arguments = extended(mask, name, causal, query, keys, prefix, arguments)
            if is_paged:
                arguments["cache"] = PrefixedCache(paged_cache, prefix)
            else:
                key, value = prefix.before(key, value)
        output, weights = kernel(host, query, key, value, mask, **arguments)
        added = self._beside(present)
        if added is not None:
            output = output + added.transpose(1, 2)
        return output, weights

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
        present = self._present(host, query, key, scale)
        prefix = self._prefixes(present, key)
        if prefix is not None:
            attn_mask, _ = extended(attn_mask, "sdpa", is_causal, query, key.shape[2], prefix, {})
            key, value = prefix.before(key, value)
            is_causal = False
        # Given only where it is asked for: kernels of other devices may not know it.
        grouped = {"enable_gqa": True} if enable_gqa else {}
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal=is_causal, scale=scale, **grouped
        )
        added = self._beside(present)
        if added is None:
            return output
        return output + added

    def prefix_scores(self, host: nn.Module, query: Tensor, key: Tensor, scaling: float) -> Tensor | None:
        """The scores of a prefix, ``(batch or 1, heads, queries, length)``, for a module that computes in
        steps, or None.
        """
        if self._captured is not None:
            return None
        prefix = self._prefixes(self._present(host, query, key, scaling), key)
        if prefix is None:
            return None
        self._prefix_values = prefix.values
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
        prefix_weights: Tensor | None,
    ) -> Tensor:
        """The last product of a module that computes in steps, and what its adapters add to it.

        Args:
            host: the module.
            query: ``(batch, heads, queries, head_dim)``.
            key: ``(batch, heads, keys, head_dim)``.
            scaling: what the products of both were multiplied by.
            weights: of the module's own keys, ``(batch, heads, queries, keys)``.
            value: ``(batch, heads, keys, head_dim)``.
            prefix_weights: of a prefix, ``(batch, heads, queries, length)``, or None.
        """
        output = weights @ value
        if self._captured is not None:
            self._captured.append((key, value))
            return output
        if prefix_weights is not None:
            assert self._prefix_values is not None
            output = output + prefix_weights.to(output.dtype) @ self._prefix_values.to(output.dtype)
            self._prefix_values = None
        added = self._beside(self._present(host, query, key, scaling))
        if added is None:
            return output
        return output + added

    def _beside(self, present: Attention) -> Tensor | None:
        """What the parts add to the heads' output, ``(batch, heads, queries, head_dim)``; None for
        nothing.
        """
        total: Tensor | None = None
        for part, where in self._acting(present.query):
            added = part.beside(present if where is None else present.rows(where))
            if added is None:
                continue
            if where is not None:
                nothing = present.query.new_zeros(*present.query.shape[:-1], added.shape[-1])
                added = nothing.index_copy(0, where, added)
            if part.after_projection:
                heads = added.transpose(1, 2).flatten(2)
                self._late = heads if self._late is None else self._late + heads
            else:
                total = added if total is None else total + added
        return total

    def _prefixes(self, present: Attention, like: Tensor) -> Prefix | None:
        """The keys and values of all parts together; None where no part has any.

        Args:
            present: the call.
            like: the module's own keys, ``(batch, heads, keys, head_dim)``.
        """
        prefixes = []
        for part, where in self._acting(present.query):
            pair = part.in_front(present if where is None else present.rows(where))
            if pair is None:
                continue
            keys, values = pair[0].to(like.device, like.dtype), pair[1].to(like.device, like.dtype)
            bias = part.position_bias(present)
            if where is None:
                prefixes.append(Prefix(keys, values, None, bias))
            else:
                prefixes.append(Prefix.of_rows(keys, values, bias, where, present.query.shape[0]))
        if not prefixes:
            return None
        return Prefix.joined(prefixes, like.shape[0])

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
    """Whether a kernel without a mask is causal: what the call says, else what the module says."""
    causal = arguments.get("is_causal")
    if causal is None:
        causal = getattr(host, "is_causal", True)
    return bool(causal)


def _neutral(name: str, value: Any, length: int) -> Any:
    """An argument of an attention module for ``length`` tokens at position 0, without mask and cache.

    Rotary embeddings are those of no rotation: the cosine is 1 and the sine 0, a complex number 1.
    """
    if name in ("position_embeddings", "rotary_pos_emb") and isinstance(value, (tuple, list)):
        cos, sin = value
        return _neutral("cos", cos, length), _neutral("sin", sin, length)
    if isinstance(value, Tensor):
        lead = [1] * (value.dim() - 2)
        options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
        if name == "cos" or value.is_complex():
            return torch.ones(*lead, length, value.shape[-1], **options)
        if name == "sin":
            return torch.zeros(*lead, length, value.shape[-1], **options)
        if name in SPELLINGS[Kind.CACHE_POSITIONS]:
            return torch.arange(length, device=value.device)
        if name in SPELLINGS[Kind.POSITIONS]:
            return torch.zeros(1, length, **options)
        return None
    is_plain = isinstance(value, (bool, int, float, str))
    if is_plain:
        return value
    return None


class ConfigView:
    """A model's config as one attention module sees it: the same, but for the name of the kernel while
    adapters act there.
    """

    def __init__(self, config: Any, site: AttentionSite) -> None:
        self.__dict__.update(_grafts_config=config, _grafts_site=site)

    @property
    def _attn_implementation(self) -> Any:
        if self._grafts_site.acts():
            return KERNEL
        return self._grafts_config._attn_implementation

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
    if isinstance(config, ConfigView):
        return config.__dict__["_grafts_config"]
    return config


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """The kernel that adapted modules of `transformers` fetch; see its `AttentionInterface` for the
    arguments.
    """
    site = module._modules[AttentionSite.child]
    assert isinstance(site, AttentionSite)
    return site.kernel(module, query, key, value, attention_mask, arguments)
