"""`AdapterModelInterface`: generic accessor names -> a model's attribute names, and what they come to in a
model.

Accessors are dotted paths: ``model_embeddings`` and ``model_layers`` from the base model, ``layer_...`` from
each layer, ``attn_...`` from the attention module. ``""`` is the module itself. Where layers differ an
accessor is a tuple: the first path that a layer has is meant, and a None among them says that a layer may
have none. Where that does not tell the layers apart it is a mapping: a layer's number, counted over the whole
model, or ``"default"`` -> path or None.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

from grafts.errors import InterfaceError, did_you_mean, nearest
from grafts.modules.layers import describe
from grafts.modules.patterns import join, within
from grafts.structure.attention_modules import CROSS_ATTENTION, ENCODER_ATTENTION, SELF_ATTENTION
from grafts.structure.residual_stream import Stream, StreamLayer, Sublayer, SublayerKind
from grafts.structure.roles import (
    ATTENTION_OUT,
    FFN_GATE,
    FFN_IN,
    FFN_OUT,
    FUSED,
    KEY,
    KEY_VALUE,
    QUERY,
    VALUE,
    ModelView,
)

Accessor = str | None | tuple[str | None, ...] | Mapping[str, str | None]
METHODS = ("bottleneck", "prefix_tuning", "lora", "prompt_tuning", "reft", "invertible")


@dataclass(frozen=True)
class Finding:
    """How one accessor was found.

    Attributes:
        accessor: its name.
        value: what was found.
        sure: ``"seen"`` in the traced forward, told by the ``"name"`` or the structure, or ``"not there"``.
        why: in a few words.
    """

    accessor: str
    value: Any
    sure: str
    why: str


@dataclass(frozen=True)
class AdapterModelInterface:
    """Which of a model's modules are what.

    Attributes:
        adapter_methods: which of `METHODS` the model may have.
        model_embeddings: the token embedding, from the base model.
        model_layers: the list of layers, from the base model; several lists as a tuple, an encoder's first.
        layer_self_attn: self-attention, or what mixes tokens in its place.
        layer_cross_attn: attention to an encoder.
        attn_k_proj: keys' projection.
        attn_q_proj: queries' projection.
        attn_v_proj: values' projection.
        attn_o_proj: the projection of what attention gives; without it the attention module itself.
        layer_intermediate_proj: the feed-forward's first linear.
        layer_output_proj: its last linear, or the module of experts.
        layer_pre_self_attn: a module whose input is the stream that self-attention's output is added to.
        layer_pre_cross_attn: the same for cross-attention.
        layer_pre_ffn: the same for the feed-forward.
        layer_ln_1: the norm *after* self-attention's output was added to the stream; none in models that norm
            before.
        layer_ln_2: the same for the feed-forward.
        attn_qkv_proj: one projection for queries, keys and values, in place of the three.
        base_model: where the base model is in the model; by default what `transformers` says.
        layer_gate_proj: the feed-forward's gate.
        layer_ln_cross_attn: like ``layer_ln_1``, for cross-attention.
        report: how each accessor was found, where it was inferred.
    """

    adapter_methods: Sequence[str]
    model_embeddings: str | None
    model_layers: str | Sequence[str]
    layer_self_attn: Accessor
    layer_cross_attn: Accessor
    attn_k_proj: Accessor = None
    attn_q_proj: Accessor = None
    attn_v_proj: Accessor = None
    attn_o_proj: Accessor = None
    layer_intermediate_proj: Accessor = None
    layer_output_proj: Accessor = None
    layer_pre_self_attn: Accessor = None
    layer_pre_cross_attn: Accessor = None
    layer_pre_ffn: Accessor = None
    layer_ln_1: Accessor = None
    layer_ln_2: Accessor = None
    attn_qkv_proj: Accessor = field(default=None, kw_only=True)
    base_model: str | None = field(default=None, kw_only=True)
    layer_gate_proj: Accessor = field(default=None, kw_only=True)
    layer_ln_cross_attn: Accessor = field(default=None, kw_only=True)
    report: tuple[Finding, ...] = field(default=(), kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Bring lists into one form and refuse what cannot be.

        Raises:
            InterfaceError: naming the accessor.
        """
        for name in accessor_names():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if isinstance(value, Mapping):
                value = {str(number): path for number, path in value.items()}
                object.__setattr__(self, name, value)
            steps = (
                tuple(value.values())
                if isinstance(value, Mapping)
                else value
                if isinstance(value, tuple)
                else (value,)
            )
            if isinstance(value, Mapping) and not all(
                number == "default" or number.isdigit() for number in value
            ):
                raise InterfaceError(
                    f"{name} is {value!r}; a mapping is layer number, or 'default' -> dotted path or None"
                )
            if not all(step is None or isinstance(step, str) for step in steps):
                raise InterfaceError(
                    f"{name} is {value!r}; it must be a dotted path, several in a tuple, or None"
                )
        if isinstance(self.adapter_methods, str):
            raise InterfaceError(f"adapter_methods is {self.adapter_methods!r}; it must be a list of names")
        object.__setattr__(self, "adapter_methods", tuple(self.adapter_methods))
        for method in self.adapter_methods:
            if method not in METHODS:
                raise InterfaceError(f"adapter_methods names {method!r}; {did_you_mean(method, METHODS)}")
        if not self.model_layers:
            raise InterfaceError("model_layers names no list of layers")
        apart = [
            name for name in ("attn_q_proj", "attn_k_proj", "attn_v_proj") if getattr(self, name) is not None
        ]
        if None not in _alternatives(self.attn_qkv_proj) and None not in _alternatives(self.attn_q_proj):
            raise InterfaceError(
                "attn_qkv_proj is given beside attn_q_proj: every attention has one or the other"
            )
        if 0 < len(apart) < 3:
            raise InterfaceError(
                f"of the projections only {apart} are given; give queries, keys and values, or attn_qkv_proj"
            )

    def to_dict(self) -> dict[str, Any]:
        """The interface as plain data; accessors that are not given beyond the older ones are left out."""
        values = {name: getattr(self, name) for name in ("adapter_methods", *accessor_names())}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value for name, value in plain.items() if name not in NEW or value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """An interface from plain data.

        Raises:
            InterfaceError: a name is unknown or a value cannot be.
        """
        known = ("adapter_methods", *accessor_names())
        for name in data:
            if name not in known:
                raise InterfaceError(f"an interface has no {name!r}; {did_you_mean(name, known)}")
        missing = [
            name for name in ("adapter_methods", "model_embeddings", "model_layers") if name not in data
        ]
        if missing:
            raise InterfaceError(f"the interface has no {missing[0]!r}")
        return cls(**{"layer_self_attn": None, "layer_cross_attn": None, **data})

    def __str__(self) -> str:
        """The interface as Python, ready to paste."""
        values = {name: getattr(self, name) for name in ("adapter_methods", *accessor_names())}
        required = (
            "adapter_methods",
            "model_embeddings",
            "model_layers",
            "layer_self_attn",
            "layer_cross_attn",
        )
        lines = [
            f"    {name}={value!r},"
            for name, value in values.items()
            if name in required or value is not None
        ]
        return "\n".join(["AdapterModelInterface(", *lines, ")"])

    def resolve(self, view: ModelView) -> Stream:
        """What the accessors come to in a model; every layer is looked at.

        Args:
            view: the model as it is built.

        Raises:
            InterfaceError: an accessor leads nowhere; names layer, accessor, what stands there, and the
                nearest names.
        """
        root = self._root(view)
        reader = _Reader(view, self)
        embeddings = None
        if self.model_embeddings is not None:
            embeddings = reader.at(root, self.model_embeddings, "model_embeddings", "the base model")
        layers: list[StreamLayer] = []
        names = (self.model_layers,) if isinstance(self.model_layers, str) else self.model_layers
        for name in names:
            path = reader.at(root, name, "model_layers", "the base model")
            children = view.modules[path].named_children()
            own = [child for child, _ in children if join(path, child) in view.modules]
            if not own:
                raise InterfaceError(
                    f"model_layers={name!r}: {path!r} is a {reader.kind(path)} and holds no layers"
                )
            layers += [
                reader.layer(join(path, child), len(layers) + at, embeddings) for at, child in enumerate(own)
            ]
        reader.require_found()
        return Stream(embeddings, tuple(layers), reader.roles)

    def _root(self, view: ModelView) -> str:
        if self.base_model is not None:
            if self.base_model not in view.modules:
                raise InterfaceError(f"base_model={self.base_model!r}: {view.name} has no such module")
            return self.base_model
        return view.base


NEW = ("layer_gate_proj", "layer_ln_cross_attn")


def accessor_names() -> list[str]:
    """The names of all accessors, in order."""
    fields = dataclasses.fields(AdapterModelInterface)
    return [f.name for f in fields if f.name not in ("adapter_methods", "report")]


def _alternatives(value: Accessor | Sequence[str], layer: int | None = None) -> tuple[str | None, ...]:
    """The paths that an accessor may mean, in a layer, or in any."""
    if isinstance(value, Mapping):
        return (
            (value.get(str(layer), value.get("default")),) if layer is not None else (*value.values(), None)
        )
    return tuple(value) if isinstance(value, (tuple, list)) else (cast("str | None", value),)


class _Reader:
    """Reads the layers of one model through an interface.

    Attributes:
        roles: what was found so far, by path.
    """

    def __init__(self, view: ModelView, interface: AdapterModelInterface) -> None:
        self.view, self.interface = view, interface
        self.roles: dict[str, str] = {}
        self._number = 0
        self._found: set[str] = set()

    def kind(self, path: str) -> str:
        """The class of a module, for messages."""
        return type(self.view.modules[path]).__name__

    def at(self, owner: str, accessor: str, name: str, where: str) -> str:
        """The path of what an accessor leads to.

        Raises:
            InterfaceError: it leads nowhere.
        """
        path = f"{owner}.{accessor}".strip(".") if accessor else owner
        if path in self.view.modules:
            return path
        here = owner
        for step in accessor.split("."):
            if join(here, step) not in self.view.modules:
                raise InterfaceError(self._nowhere(here, step, accessor, name, where))
            here = join(here, step)
        raise AssertionError(path)

    def _nowhere(self, here: str, step: str, accessor: str, name: str, where: str) -> str:
        module = self.view.modules[here]
        children = [child for child, _ in module.named_children() if not child.startswith("grafts")]
        other = getattr(module, step, None)
        stands = f"{step!r} there is a {type(other).__name__}" if other is not None else f"it has no {step!r}"
        below = [
            path[len(here) + 1 if here else 0 :]
            for path in self.view.modules
            if within(path, [here]) or not here
        ]
        near = nearest(accessor.rpartition(".")[2], {path.rpartition(".")[2]: path for path in below if path})
        close = [path for name in near for path in below if path.rpartition(".")[2] == name][:3]
        return (
            f"{name}={accessor!r} leads nowhere in {where}: {here or 'the model'} is a "
            f"{type(module).__name__} and {stands}; it holds {', '.join(map(repr, children)) or 'nothing'}"
            + (f"; nearest: {close}" if close else "")
        )

    def find(self, owner: str, name: str, where: str) -> str | None:
        """The path of what one of the accessor's alternatives leads to, or None where a module may be
        without.

        Raises:
            InterfaceError: none of them leads anywhere.
        """
        alternatives = _alternatives(getattr(self.interface, name), self._number)
        for accessor in alternatives:
            if accessor is not None:
                path = f"{owner}.{accessor}".strip(".") if accessor else owner
                if path in self.view.modules:
                    self._found.add(name)
                    return path
        if None not in alternatives:
            assert alternatives[0] is not None
            error = f"{self._nowhere_deep(owner, alternatives[0], name, where)}"
            more = f" (nor do {list(alternatives[1:])})" if len(alternatives) > 1 else ""
            raise InterfaceError(f"{error}{more}; if some layers have none, write {(*alternatives, None)}")
        return None

    def _nowhere_deep(self, owner: str, accessor: str, name: str, where: str) -> str:
        try:
            self.at(owner, accessor, name, where)
        except InterfaceError as error:
            return str(error)
        raise AssertionError(accessor)

    def require_found(self) -> None:
        """Refuse an accessor that led somewhere in no layer at all.

        Raises:
            InterfaceError: naming it.
        """
        for name in accessor_names():
            value = getattr(self.interface, name)
            if name.startswith(("layer_", "attn_")) and name not in self._found and value is not None:
                raise InterfaceError(f"{name}={value!r} leads nowhere in any layer")

    def layer(self, path: str, number: int, embeddings: str | None) -> StreamLayer:
        """One layer, with the roles of what is in it."""
        self._number = number
        where = f"layer {number} ({path!r}, a {self.kind(path)})"
        sublayers = []
        for kind, attention, pre, norm in (
            ("self", "layer_self_attn", "layer_pre_self_attn", "layer_ln_1"),
            ("cross", "layer_cross_attn", "layer_pre_cross_attn", "layer_ln_cross_attn"),
            ("ffn", None, "layer_pre_ffn", "layer_ln_2"),
        ):
            if attention is None:
                self._feed_forward(path, where)
                out = self.find(path, "layer_output_proj", where)
            else:
                owner = self.find(path, attention, where)
                out = None if owner is None else self._attention(owner, kind, where)
            if out is not None:
                before, after = self.find(path, pre, where), self.find(path, norm, where)
                width = self._width(out, before, after, embeddings)
                sublayers.append(Sublayer(number, cast("SublayerKind", kind), out, before, after, width))
        width = sublayers[-1].width if sublayers else self._width(path, None, None, embeddings)
        return StreamLayer(number, path, width, tuple(sublayers))

    def _feed_forward(self, path: str, where: str) -> None:
        for name, role in (
            ("layer_intermediate_proj", FFN_IN),
            ("layer_gate_proj", FFN_GATE),
            ("layer_output_proj", FFN_OUT),
        ):
            found = self.find(path, name, where)
            if found is not None and found in self.view.layers and self.view.layers[found].is_linear:
                self.roles[found] = role

    def _attention(self, owner: str, kind: str, where: str) -> str:
        """The roles of what is in an attention module; returns the path of what is added to the stream."""
        out = self.find(owner, "attn_o_proj", where)
        found = {role: self.find(owner, name, where) for name, role in _PROJECTIONS.items()}
        if found[KEY] is not None and found[KEY] == found[VALUE]:
            found[KEY], found[VALUE], found[KEY_VALUE] = None, None, found[KEY]
        self.roles |= {path: role for role, path in found.items() if path is not None}
        if out is not None and out != owner:
            self.roles[out] = ATTENTION_OUT
        for path, layer in self.view.layers.items():
            if layer.kind == "attending" and within(path, [owner]):
                encoder = self.view.roles[path] == ENCODER_ATTENTION
                self.roles[path] = (
                    CROSS_ATTENTION if kind == "cross" else ENCODER_ATTENTION if encoder else SELF_ATTENTION
                )
        return owner if out is None else out

    def _width(self, out: str, before: str | None, norm: str | None, embeddings: str | None) -> int:
        """The size of the stream: that of a linear's output, of a norm, or of what is embedded."""
        layer = self.view.layers.get(out)
        if layer is not None and layer.is_linear:
            return layer.out_features
        for path in (norm, before):
            weight = None if path is None else self.view.modules[path]._parameters.get("weight")
            if weight is not None and weight.dim() == 1:
                return weight.shape[0]
        linears = [x for p, x in self.view.layers.items() if within(p, [out]) and x.is_linear]
        sizes = [size for x in linears for size in (x.in_features, x.out_features)]
        config: Any = getattr(self.view.modules[""], "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        said = getattr(text, "hidden_size", None)
        if isinstance(said, int) and (said in sizes or not sizes):
            return said
        if sizes:
            return Counter(sizes).most_common(1)[0][0]
        first = None if embeddings is None else describe(self.view.modules[embeddings])
        if first is None:
            raise InterfaceError(f"the size of the stream at {out!r} cannot be told")
        return first.out_features


_PROJECTIONS = {"attn_q_proj": QUERY, "attn_k_proj": KEY, "attn_v_proj": VALUE, "attn_qkv_proj": FUSED}
