"""`AdapterModelInterface`: generic accessor names -> a model's attribute names, and what they come to in a
model.

Accessors are dotted paths: ``model_embeddings`` and ``model_layers`` from the base model, ``layer_...`` from
each layer, ``attn_...`` from the attention module. ``""`` is the module itself. Where layers differ an
accessor is a
tuple: the first path that a layer has is meant, and a None among them says that a layer may have none. Where
    that
does not tell the layers apart it is a mapping: a layer's number, counted over the whole model, or
``"default"`` -> path or None.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from grafts.errors import InterfaceError, did_you_mean, nearest
from grafts.modules.layers import describe
from grafts.modules.patterns import join, within
from grafts.structure.attention_modules import CROSS_ATTENTION, ENCODER_ATTENTION, SELF_ATTENTION
from grafts.structure.residual_stream import ResidualStream, StreamLayer, Sublayer, SublayerKind
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
)

if TYPE_CHECKING:
    from grafts.structure.view import ModelView

Accessor = str | None | tuple[str | None, ...] | Mapping[str, str | None]


class InterfaceMethod:
    """The words that ``adapter_methods`` of an interface may hold.

    They are AdapterHub's, and the only names of methods that are known outside of `grafts.methods`: an
    interface says of these whether a model may have them, and of other methods (those of other packages)
    nothing.
    """

    bottleneck = "bottleneck"
    prefix_tuning = "prefix_tuning"
    lora = "lora"
    prompt_tuning = "prompt_tuning"
    reft = "reft"
    invertible = "invertible"


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
        adapter_methods: which methods the model may have.
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
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if isinstance(self.adapter_methods, str):
            raise InterfaceError(f"adapter_methods is {self.adapter_methods!r}; it must be a list of names")
        object.__setattr__(self, "adapter_methods", tuple(self.adapter_methods))
        for method in self.adapter_methods:
            if method not in METHODS:
                raise InterfaceError(f"adapter_methods names {method!r}; {did_you_mean(method, METHODS)}")
        if not self.model_layers:
            raise InterfaceError("model_layers names no list of layers")
        self._require_projections()

    def _require_projections(self) -> None:
        """Refuse projections of attention that do not go together.

        Raises:
            InterfaceError: naming those that are given.
        """
        if None not in _alternatives(self.attn_qkv_proj) and None not in _alternatives(self.attn_q_proj):
            raise InterfaceError(
                "attn_qkv_proj is given beside attn_q_proj: every attention has one or the other"
            )
        projections = []
        for name in ("attn_q_proj", "attn_k_proj", "attn_v_proj"):
            if getattr(self, name) is not None:
                projections.append(name)
        if 0 < len(projections) < 3:
            raise InterfaceError(
                f"of the projections only {projections} are given; give queries, keys and values, or "
                f"attn_qkv_proj"
            )

    def offers(self, method: str) -> bool:
        """Whether the model may have this method; of methods that the interface does not list it says
        nothing.
        """
        return method not in METHODS or method in self.adapter_methods

    def to_dict(self) -> dict[str, Any]:
        """The interface as plain data, tuples as lists; accessors that AdapterHub's does not have are left
        out where they are not given.
        """
        data = {}
        for name in ("adapter_methods", *accessor_names()):
            value = getattr(self, name)
            if name in NEW and value is None:
                continue
            data[name] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """An interface from plain data, as `to_dict` gives it.

        Args:
            data: accessors by name; those without which nothing can be found have to be there.

        Raises:
            InterfaceError: a name is unknown or a value cannot be.
        """
        known = ("adapter_methods", *accessor_names())
        for name in data:
            if name not in known:
                raise InterfaceError(f"an interface has no {name!r}; {did_you_mean(name, known)}")
        for name in ("adapter_methods", "model_embeddings", "model_layers"):
            if name not in data:
                raise InterfaceError(f"the interface has no {name!r}")
        return cls(**{"layer_self_attn": None, "layer_cross_attn": None, **data})

    def __str__(self) -> str:
        """The interface as Python, ready to paste."""
        lines = ["AdapterModelInterface("]
        for name in ("adapter_methods", *accessor_names()):
            value = getattr(self, name)
            if name in _POSITIONAL or value is not None:
                lines.append(f"    {name}={value!r},")
        return "\n".join([*lines, ")"])

    def resolve(self, view: ModelView) -> ResidualStream:
        """What the accessors come to in a model; every layer is looked at.

        Args:
            view: the model as it is built.

        Raises:
            InterfaceError: an accessor leads nowhere; names layer, accessor, what stands there, and the
                nearest names.
        """
        root = self._root(view)
        reader = _LayerReader(view, self)
        embeddings = None
        if self.model_embeddings is not None:
            embeddings = reader.follow(root, self.model_embeddings, "model_embeddings", "the base model")
        lists = self.model_layers
        if isinstance(lists, str):
            lists = (lists,)
        layers: list[StreamLayer] = []
        for name in lists:
            # Layers are counted over the whole model, through all lists.
            for member in reader.members(root, name):
                layers.append(reader.layer(member, len(layers), embeddings))
        reader.require_used()
        return ResidualStream(embeddings, tuple(layers), reader.roles)

    def _root(self, view: ModelView) -> str:
        """The path of the base model, from which the paths of layers and embeddings count."""
        if self.base_model is None:
            return view.base
        if self.base_model not in view.modules:
            raise InterfaceError(f"base_model={self.base_model!r}: {view.name} has no such module")
        return self.base_model


METHODS = (
    InterfaceMethod.bottleneck,
    InterfaceMethod.prefix_tuning,
    InterfaceMethod.lora,
    InterfaceMethod.prompt_tuning,
    InterfaceMethod.reft,
    InterfaceMethod.invertible,
)
# Accessors that AdapterHub's interface does not have; written to its files only where they are given.
NEW = ("layer_gate_proj", "layer_ln_cross_attn")
_POSITIONAL = ("adapter_methods", "model_embeddings", "model_layers", "layer_self_attn", "layer_cross_attn")


def accessor_names() -> list[str]:
    """The names of all accessors, in the order of the class: ``model_embeddings``, ``model_layers``,
    ``layer_self_attn`` and so on.
    """
    names = []
    for accessor in dataclasses.fields(AdapterModelInterface):
        if accessor.name not in ("adapter_methods", "report"):
            names.append(accessor.name)
    return names


def _checked(name: str, value: Any) -> Accessor:
    """An accessor in one form: lists as tuples, the numbers of a mapping as text.

    Raises:
        InterfaceError: it cannot be one.
    """
    paths = [value]
    if isinstance(value, Mapping):
        value = _checked_numbers(name, value)
        paths = list(value.values())
    elif isinstance(value, (list, tuple)):
        value = tuple(value)
        paths = list(value)
    if not all(path is None or isinstance(path, str) for path in paths):
        raise InterfaceError(f"{name} is {value!r}; it must be a dotted path, several in a tuple, or None")
    accessor: Accessor = value
    return accessor


def _checked_numbers(name: str, value: Mapping[Any, Any]) -> dict[str, Any]:
    """An accessor that is given layer by layer, the numbers as text.

    Raises:
        InterfaceError: it is given for something that is no number of a layer.
    """
    by_layer = {str(number): path for number, path in value.items()}
    if not all(number == "default" or number.isdigit() for number in by_layer):
        raise InterfaceError(
            f"{name} is {by_layer!r}; a mapping is layer number, or 'default' -> dotted path or None"
        )
    return by_layer


def _alternatives(value: Accessor, layer: int | None = None) -> tuple[str | None, ...]:
    """The paths that an accessor may mean, in the layer of that number, or in any."""
    if isinstance(value, Mapping):
        if layer is None:
            return (*value.values(), None)
        return (value.get(str(layer), value.get("default")),)
    if isinstance(value, tuple):
        return value
    return (value,)


class _SublayerNames(NamedTuple):
    """The accessors of one step of a layer."""

    kind: SublayerKind
    attention: str | None
    before: str
    norm: str


_SUBLAYERS = (
    _SublayerNames("self", "layer_self_attn", "layer_pre_self_attn", "layer_ln_1"),
    _SublayerNames("cross", "layer_cross_attn", "layer_pre_cross_attn", "layer_ln_cross_attn"),
    _SublayerNames("ffn", None, "layer_pre_ffn", "layer_ln_2"),
)
_PROJECTIONS = {
    QUERY: "attn_q_proj",
    KEY: "attn_k_proj",
    VALUE: "attn_v_proj",
    FUSED: "attn_qkv_proj",
}
_FEED_FORWARD = {
    FFN_IN: "layer_intermediate_proj",
    FFN_GATE: "layer_gate_proj",
    FFN_OUT: "layer_output_proj",
}


class _LayerReader:
    """Reads the layers of one model through an interface.

    Attributes:
        roles: what was found so far, by path.
    """

    def __init__(self, view: ModelView, interface: AdapterModelInterface) -> None:
        self.view = view
        self.interface = interface
        self.roles: dict[str, str] = {}
        self._layer = 0  # the number of the layer that is read
        self._used: set[str] = set()  # the accessors that led somewhere

    def class_of(self, path: str) -> str:
        """The class of a module, for messages.

        Args:
            path: the module's; it has to be there.
        """
        return type(self.view.modules[path]).__name__

    def follow(self, owner: str, accessor: str, name: str, where: str) -> str:
        """The path of what an accessor leads to.

        Args:
            owner: the path of the module that it starts at.
            accessor: the dotted path from there.
            name: the accessor's name, for messages.
            where: what the owner is, for messages.

        Raises:
            InterfaceError: it leads nowhere.
        """
        path = join(owner, accessor)
        if path not in self.view.modules:
            raise InterfaceError(self._leads_nowhere(owner, accessor, name, where))
        return path

    def _leads_nowhere(self, owner: str, accessor: str, name: str, where: str) -> str:
        """The message for an accessor that leads nowhere: where it ends, what is there, and the nearest
        names.
        """
        # As far as it leads.
        path, missing = owner, accessor
        for step in accessor.split("."):
            if join(path, step) not in self.view.modules:
                missing = step
                break
            path = join(path, step)
        # There may be something of that name which is no module: a function, a parameter.
        module = self.view.modules[path]
        other = getattr(module, missing, None)
        stands = f"it has no {missing!r}"
        if other is not None:
            stands = f"{missing!r} there is a {type(other).__name__}"
        names = [name for name, _ in module.named_children()]
        children = [repr(child) for child in names if not child.startswith("grafts")]
        message = (
            f"{name}={accessor!r} leads nowhere in {where}: {path or 'the model'} is a "
            f"{type(module).__name__} and {stands}; it holds {', '.join(children) or 'nothing'}"
        )
        close = self._nearest_below(path, accessor)
        if close:
            message += f"; nearest: {close[:3]}"
        return message

    def _nearest_below(self, path: str, accessor: str) -> list[str]:
        """The modules below another one whose last name is like that of an accessor, as paths from there."""
        below = []
        for other in self.view.modules:
            if path == "" or within(other, [path]):
                below.append(other[len(path) :].lstrip("."))
        by_last_name: dict[str, list[str]] = {}
        for other in below:
            if other:
                by_last_name.setdefault(other.rpartition(".")[2], []).append(other)
        close = []
        for name in nearest(accessor.rpartition(".")[2], by_last_name):
            close += by_last_name[name]
        return close

    def members(self, root: str, name: str) -> list[str]:
        """The paths of the layers in one list.

        Args:
            root: the path of the base model.
            name: the list's, from there.

        Raises:
            InterfaceError: it leads nowhere, or to something that holds no layers.
        """
        path = self.follow(root, name, "model_layers", "the base model")
        children = [join(path, child) for child, _ in self.view.modules[path].named_children()]
        members = [child for child in children if child in self.view.modules]  # no sites of adapters
        if not members:
            raise InterfaceError(
                f"model_layers={name!r}: {path!r} is a {self.class_of(path)} and holds no layers"
            )
        return members

    def find(self, owner: str, name: str, where: str) -> str | None:
        """The path of what one of an accessor's alternatives leads to; None where a module may be without.

        Args:
            owner: the path of the module that it starts at.
            name: the accessor's name.
            where: what the owner is, for messages.

        Raises:
            InterfaceError: none of them leads anywhere.
        """
        # The first that leads somewhere is meant.
        alternatives = _alternatives(getattr(self.interface, name), self._layer)
        for accessor in alternatives:
            if accessor is not None and join(owner, accessor) in self.view.modules:
                self._used.add(name)
                return join(owner, accessor)
        first = alternatives[0]
        if first is None or None in alternatives:
            return None
        error = self._leads_nowhere(owner, first, name, where)
        if len(alternatives) > 1:
            error += f" (nor do {list(alternatives[1:])})"
        raise InterfaceError(f"{error}; if some layers have none, write {(*alternatives, None)}")

    def require_used(self) -> None:
        """Refuse an accessor that led somewhere in no layer at all.

        Raises:
            InterfaceError: naming it.
        """
        for name in accessor_names():
            value = getattr(self.interface, name)
            is_in_layers = name.startswith(("layer_", "attn_"))
            if is_in_layers and name not in self._used and value is not None:
                raise InterfaceError(f"{name}={value!r} leads nowhere in any layer")

    def layer(self, path: str, number: int, embeddings: str | None) -> StreamLayer:
        """One layer; the roles of what is in it are noted.

        Args:
            path: the layer's.
            number: of the layer in the whole model.
            embeddings: the path of the token embedding, or None.
        """
        self._layer = number
        where = f"layer {number} ({path!r}, a {self.class_of(path)})"
        # In the order in which layers have them: self-attention, cross-attention, feed-forward.
        sublayers = []
        for names in _SUBLAYERS:
            if names.attention:
                out = self._attention(path, names, where)
            else:
                out = self._feed_forward(path, where)
            if out is None:
                continue
            before = self.find(path, names.before, where)
            norm = self.find(path, names.norm, where)
            width = self._width(out, before, norm, embeddings)
            sublayers.append(Sublayer(number, names.kind, out, before, norm, width))
        # Behind the layer the stream is as wide as behind its last step.
        if sublayers:
            width = sublayers[-1].width
        else:
            width = self._width(path, None, None, embeddings)
        return StreamLayer(number, path, width, tuple(sublayers))

    def _feed_forward(self, layer: str, where: str) -> str | None:
        """Note the roles of a feed-forward's linears; returns the path of what is added to the stream."""
        out = None
        for role, name in _FEED_FORWARD.items():
            path = self.find(layer, name, where)
            if path is not None and path in self.view.layers and self.view.layers[path].is_linear:
                self.roles[path] = role
            if role == FFN_OUT:
                out = path
        return out

    def _attention(self, layer: str, names: _SublayerNames, where: str) -> str | None:
        """Note the roles of what is in an attention module; returns the path of what is added to the
        stream.
        """
        assert names.attention is not None
        owner = self.find(layer, names.attention, where)
        if owner is None:
            return None
        out = self.find(owner, "attn_o_proj", where)
        projections = {role: self.find(owner, name, where) for role, name in _PROJECTIONS.items()}
        # One linear for keys and values is named twice.
        if projections[KEY] is not None and projections[KEY] == projections[VALUE]:
            projections[KEY_VALUE] = projections.pop(KEY)
            del projections[VALUE]
        for role, path in projections.items():
            if path is not None:
                self.roles[path] = role
        if out is not None and out != owner:
            self.roles[out] = ATTENTION_OUT

        self._note_attending(owner, names.kind)
        if out is None:
            return owner
        return out

    def _note_attending(self, owner: str, kind: SublayerKind) -> None:
        """Note what the modules attend to whose attention can be reached, in one step's attention module.

        Args:
            owner: the path of that module.
            kind: of the step.
        """
        for path, described in self.view.layers.items():
            if described.kind != "attending" or not within(path, [owner]):
                continue
            if kind == "cross":
                self.roles[path] = CROSS_ATTENTION
            elif self.view.roles[path] == ENCODER_ATTENTION:
                self.roles[path] = ENCODER_ATTENTION
            else:
                self.roles[path] = SELF_ATTENTION

    def _width(self, out: str, before: str | None, norm: str | None, embeddings: str | None) -> int:
        """The size of the stream: that of a linear's output, of a norm, or of what is embedded.

        Raises:
            InterfaceError: none of them says it.
        """
        layer = self.view.layers.get(out)
        if layer is not None and layer.is_linear:
            return layer.out_features
        for path in (norm, before):
            size = self._size_of_norm(path)
            if size is not None:
                return size
        # What adds to the stream is made of linears (experts): one of their sizes is the stream's.
        sizes = self._sizes_in(out)
        hidden_size = self._hidden_size()
        if hidden_size is not None and (hidden_size in sizes or not sizes):
            return hidden_size
        if sizes:
            return Counter(sizes).most_common(1)[0][0]
        embedding = None
        if embeddings is not None:
            embedding = describe(self.view.modules[embeddings])
        if embedding is None:
            raise InterfaceError(f"the size of the stream at {out!r} cannot be told")
        return embedding.out_features

    def _size_of_norm(self, path: str | None) -> int | None:
        """The size of what a norm is given, as its weight says; None for other modules, and for none."""
        if path is None:
            return None
        weight = self.view.modules[path]._parameters.get("weight")
        if weight is None or weight.dim() != 1:
            return None
        return weight.shape[0]

    def _sizes_in(self, owner: str) -> list[int]:
        """The sizes of what the linears in a module are given and give."""
        sizes = []
        for path, linear in self.view.layers.items():
            if linear.is_linear and within(path, [owner]):
                sizes += [linear.in_features, linear.out_features]
        return sizes

    def _hidden_size(self) -> int | None:
        """The size of the stream as the model's config says it."""
        config: Any = getattr(self.view.model, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        size = getattr(config, "hidden_size", None)
        if isinstance(size, int):
            return size
        return None
