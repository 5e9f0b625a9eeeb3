"""`infer_interface`: an interface worked out from what one forward of the model did."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from grafts.errors import InterfaceError
from grafts.modules.patterns import join, within
from grafts.sites.attention_routes import route_of
from grafts.structure.interface import METHODS, Accessor, AdapterModelInterface, Finding, accessor_names
from grafts.structure.residual_stream import Stream
from grafts.structure.roles import ModelView, look_at
from grafts.structure.trace import traced
from grafts.structure.trace_reader import LayerTrace, StreamUpdate, TraceReader, relative

_inferred: WeakKeyDictionary[nn.Module, AdapterModelInterface] = WeakKeyDictionary()


def infer_interface(model: nn.Module, *, inputs: Mapping[str, Any] | None = None) -> AdapterModelInterface:
    """Work out the interface of ``model`` from its modules, their names, and one forward on a tiny input.

    Args:
        model: any model with layers; it is left as it was.
        inputs: keyword arguments of its ``forward`` for that one run, where none can be made from its config.

    Returns:
        The interface. Its ``report`` says of each accessor how sure it is, and why; ``print`` it to paste it.

    Raises:
        InterfaceError: the model cannot be run, or has no layers that add to a stream.
    """
    return inferred(look_at(model), inputs)


def inferred(view: ModelView, inputs: Mapping[str, Any] | None = None) -> AdapterModelInterface:
    """`infer_interface` of a model whose build is known already."""
    model = view.modules[""]
    if inputs is None and model in _inferred:
        with contextlib.suppress(InterfaceError):  # the model may have been rebuilt since
            _inferred[model].resolve(view)
            return _inferred[model]
    found = _interface(view, TraceReader(view, traced(model, inputs)))
    _inferred[model] = found
    return found


def _layers(view: ModelView, reading: TraceReader) -> dict[str, list[LayerTrace]]:
    """The lists of layers that were run, each with what was seen of its members.

    A container is a list of layers if at least half of its members were seen to add to the residual stream.
    Containers
    nest: a list of blocks may hold lists of layers, and a layer may hold a list of experts. Of nested ones
        the list is taken
    whose members are whole layers, that is, add to the stream at least twice (attention and feed-forward).
    """
    calls = {call.path: call for call in reversed(reading.trace.calls) if call.end >= 0}
    adding: dict[str, list[LayerTrace]] = {}
    whole: set[str] = set()
    for path, module in view.modules.items():
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            continue
        members = [join(path, name) for name, _ in module.named_children()]
        seen = [
            reading.layer(calls[member]) for member in members if member in calls and member in view.modules
        ]
        if _most(len(layer.written) >= 1 for layer in seen):
            adding[path] = seen
            if _most(len(layer.written) >= 2 for layer in seen):
                whole.add(path)

    chosen: dict[str, list[LayerTrace]] = {}
    for path, seen in adding.items():
        # An outer list is passed over for the whole layers inside of it (blocks of layers).
        if any(inner.startswith(f"{path}.") for inner in whole):
            continue
        # An inner list that holds no whole layers is part of a layer (experts, branches).
        inside = any(path.startswith(f"{outer}.") for outer in adding)
        if inside and path not in whole:
            continue
        chosen[path] = seen
    return chosen


def _most(answers: Iterable[bool]) -> bool:
    """Whether at least half of the answers are yes, and there is one."""
    given = list(answers)
    return len(given) > 0 and sum(given) * 2 >= len(given)


def _interface(view: ModelView, reading: TraceReader) -> AdapterModelInterface:
    lists = _layers(view, reading)
    if not lists:
        raise InterfaceError(
            f"no list of layers of this {view.name} was seen to add to a stream: write the interface by hand"
        )
    root = view.base
    embeddings = _embeddings(view, reading, [layer.path for some in lists.values() for layer in some])
    paths = [*lists, *([embeddings] if embeddings is not None else [])]
    named_base = None
    if not all(within(path, [root]) or not root for path in paths):
        root, named_base = "", ""
    seen = [layer for some in lists.values() for layer in some]
    values: dict[str, Accessor] = {}
    findings = []
    for name in accessor_names():
        if name in ("model_embeddings", "model_layers", "base_model"):
            continue
        values[name], finding = _accessor(name, seen, view)
        findings.append(finding)
    layers = tuple(relative(path, root) for path in lists)
    methods = _methods(view, reading, embeddings, seen)
    found = AdapterModelInterface(
        adapter_methods=methods,
        model_embeddings=None if embeddings is None else relative(embeddings, root),
        model_layers=layers[0] if len(layers) == 1 else layers,
        base_model=named_base,
        report=(
            Finding(
                "model_embeddings",
                embeddings,
                "seen" if embeddings else "not there",
                "what the first layer's input is made with",
            ),
            Finding(
                "model_layers",
                layers,
                "seen",
                f"{len(seen)} layers that add to the stream that they are given",
            ),
            *findings,
        ),
        **values,
    )
    _verify(found.resolve(view), seen)
    return found


def _by_layer(name: str, seen: Sequence[LayerTrace], view: ModelView, accessor: Accessor) -> Accessor:
    """The accessor, or where it would lead to something else in some layer, one that says it layer by
    layer.
    """
    meant: list[str | None] = []
    for layer in seen:
        values = [_value(name, layer, one) for one in layer.written if _concerns(name, one)]
        meant.append(values[0] if values else None)
    inside = name.startswith("attn_")
    owners = [[_owner(name, layer, one) for one in layer.written if _concerns(name, one)] for layer in seen]
    wrong = False
    for layer, value, attentions in zip(seen, meant, owners, strict=True):
        owner = (attentions[0] if attentions else None) if inside or name.startswith(_ASIDE) else layer.path
        owner = layer.path if owner is not None and not inside else owner
        if owner is not None and first_of(accessor, owner, view.modules) != value:
            wrong = True
    if not wrong:
        return accessor
    common = Counter(meant).most_common(1)[0][0]
    if set(meant) == {None}:
        return None
    return {"default": common, **{str(at): value for at, value in enumerate(meant) if value != common}}


def first_of(accessor: Accessor, owner: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The first alternative of an accessor that leads somewhere."""
    steps = accessor if isinstance(accessor, tuple) else (accessor,)
    return next((s for s in steps if isinstance(s, str) and f"{owner}.{s}".strip(".") in modules), None)


def _verify(stream: Stream, seen: Sequence[LayerTrace]) -> None:
    """Check that the accessors lead to what was seen, in every layer; of two steps of one kind in a layer to
    the first.

    Raises:
        InterfaceError: naming the first that does not.
    """
    by_path = {layer.path: layer for layer in stream.layers}
    for layer in seen:
        there = (
            {s.kind: (s.out, s.before, s.norm) for s in by_path[layer.path].sublayers}
            if layer.path in by_path
            else {}
        )
        first = {one.kind: (one.out, one.before, one.norm) for one in reversed(layer.written)}
        if there != first:
            raise InterfaceError(
                f"{layer.path!r}: {first} was seen to write to the stream (module, what reads it before, "
                f"norm behind), and the accessors of all layers together lead to {there}: write the "
                "interface by hand"
            )


def _accessor(name: str, seen: Sequence[LayerTrace], view: ModelView) -> tuple[Accessor, Finding]:
    """One accessor over all layers; of several paths first the one that least often stands where another is
    meant.
    """
    values = Counter(
        _value(name, layer, one) for layer in seen for one in layer.written if _concerns(name, one)
    )
    per_layer: dict[str | None, int] = {}
    for layer in seen:
        of_layer = [_value(name, layer, one) for one in layer.written if _concerns(name, one)]
        for value in of_layer or [None]:
            per_layer[value] = per_layer.get(value, 0) + 1
    given = [value for value in values if value is not None]
    if not given:
        return None, Finding(name, None, "not there", "in no layer")
    meant = [
        (_owner(name, layer, one), _value(name, layer, one))
        for layer in seen
        for one in layer.written
        if _concerns(name, one)
    ]
    misled = Counter(
        v for owner, right in meant for v in given if v != right and f"{owner}.{v}".strip(".") in view.modules
    )
    given.sort(key=lambda value: (misled[value], -value.count("."), -values[value]))
    inside = name.startswith("attn_")
    lacking = (None in values) if inside or name.startswith(_ASIDE) else (None in per_layer)
    accessor: Accessor = (
        given[0] if len(given) == 1 and not lacking else (*given, None) if lacking else tuple(given)
    )
    flow = (
        any("by flow" in one.found for layer in seen for one in layer.written)
        and inside
        and name != "attn_o_proj"
    )
    accessor = _by_layer(name, seen, view, accessor)
    count = sum(values[v] for v in given)
    why = f"in {count} attention modules" if inside else f"in {count} of {len(seen)} layers"
    if flow:
        why += ", by what the kernel's operands come from"
    named = (inside and name != "attn_o_proj" and not flow) or any(
        "by name" in o.found for s in seen for o in s.written
    )
    return accessor, Finding(name, accessor, "name" if named else "seen", why)


_ASIDE = ("layer_pre_", "layer_ln_")  # looked for only where there is what they belong to
_OWNERS = {"layer_self_attn": "self", "layer_cross_attn": "cross"}
_KINDS = {
    "layer_pre_self_attn": "self",
    "layer_pre_cross_attn": "cross",
    "layer_pre_ffn": "ffn",
    "layer_ln_1": "self",
    "layer_ln_cross_attn": "cross",
    "layer_ln_2": "ffn",
    "layer_intermediate_proj": "ffn",
    "layer_gate_proj": "ffn",
    "layer_output_proj": "ffn",
}


def _concerns(name: str, one: StreamUpdate) -> bool:
    if name.startswith("attn_"):
        return one.kind in ("self", "cross")
    return one.kind == (_OWNERS.get(name) or _KINDS[name])


def _value(name: str, layer: LayerTrace, one: StreamUpdate) -> str | None:
    if name in _OWNERS:
        path: str | None = one.found["attention"]
    elif name == "layer_output_proj":
        path = one.out
    elif name.startswith("layer_pre_"):
        path = one.before
    elif name.startswith("layer_ln_"):
        path = one.norm
    else:
        path = one.found.get(name)
    owner = _owner(name, layer, one)
    if path is None or not (within(path, [owner]) or not owner):
        return None
    return relative(path, owner)


def _owner(name: str, layer: LayerTrace, one: StreamUpdate) -> str:
    return one.found["attention"] if name.startswith("attn_") else layer.path


def _embeddings(view: ModelView, reading: TraceReader, layers: Sequence[str]) -> str | None:
    """What the first layer's input is made with: what the model says, else the embedding that was called
    first.
    """
    if view.input_embedding is not None:
        return view.input_embedding
    called = [call.path for call in reading.trace.calls]
    first = next(
        (path for path in called if path in view.layers and view.layers[path].kind == "embedding"), None
    )
    if first is not None and not within(first, layers):
        return first
    begin = next((call for call in reading.trace.calls if call.path in layers), None)
    if begin is None or not begin.inputs:
        return None
    chain = reading.origins(begin.inputs[0])
    makers = [
        c for c in reading.trace.calls if set(c.outputs[:1]) & set(chain) and not within(begin.path, [c.path])
    ]
    return makers[0].path if makers else None


def _methods(
    view: ModelView, reading: TraceReader, embeddings: str | None, seen: Sequence[LayerTrace]
) -> tuple[str, ...]:
    kinds = {layer.kind for layer in view.layers.values()}
    has = {
        "bottleneck": any(layer.written for layer in seen),
        "prefix_tuning": any(route_of(type(view.modules[path])) is not None for path in reading.attending),  # type: ignore[arg-type]
        "lora": bool(kinds & {"linear", "transposed-linear"}),
        "prompt_tuning": "input" in kinds,
        "reft": True,
        "invertible": embeddings is not None,
    }
    return tuple(method for method in METHODS if has[method])
