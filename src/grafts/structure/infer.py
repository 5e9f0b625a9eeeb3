"""`infer_interface`: an interface worked out from what one forward of the model did."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from grafts.errors import InterfaceError
from grafts.modules.patterns import join, within
from grafts.structure.interface import (
    METHODS,
    Accessor,
    AdapterModelInterface,
    Finding,
    InterfaceMethod,
    accessor_names,
)
from grafts.structure.layer_trace import LayerTrace, StreamUpdate, layer_trace, relative
from grafts.structure.residual_stream import ResidualStream
from grafts.structure.trace import Call, traced
from grafts.structure.trace_reader import TraceReader
from grafts.structure.view import ModelView, look_at

# What was inferred of a model, which is worked out anew where it does not fit any more.
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
    """`infer_interface` of a model that was looked at already; what was worked out for a model is kept as
    long as it fits.

    Args:
        view: the model.
        inputs: keyword arguments of its ``forward``, where none can be made from its config.

    Raises:
        InterfaceError: the model cannot be run, or has no layers that add to a stream.
    """
    if inputs is None:
        known = _inferred.get(view.model)
        if known is not None and fits(known, view):
            return known
    interface = _interface(view, TraceReader(view, traced(view.model, inputs)))
    _inferred[view.model] = interface
    return interface


def inferred_or_none(view: ModelView) -> AdapterModelInterface | None:
    """`inferred`, or None where nothing can be worked out, for those who can do without.

    Args:
        view: the model.
    """
    try:
        return inferred(view)
    except InterfaceError:
        return None


def fits(interface: AdapterModelInterface, view: ModelView) -> bool:
    """Whether every accessor of an interface leads somewhere in a model.

    Args:
        interface: written by hand, worked out, or of a file.
        view: the model as it is built now.
    """
    try:
        interface.resolve(view)
    except InterfaceError:
        return False
    return True


def _layer_lists(view: ModelView, reader: TraceReader) -> dict[str, list[LayerTrace]]:
    """The lists of layers that were run, by path, each with what was seen of its members.

    A container is a list of layers if at least half of its members were seen to add to the residual stream.
    Containers nest: a list of blocks may hold lists of layers, and a layer may hold a list of experts. Of
    nested ones the list is taken whose members are whole layers, that is, add to the stream at least twice
    (attention and feed-forward).
    """
    adding: dict[str, list[LayerTrace]] = {}
    of_whole_layers: set[str] = set()
    for path, traces in _container_traces(view, reader).items():
        if _at_least_half(len(trace.updates) >= 1 for trace in traces):
            adding[path] = traces
        if _at_least_half(len(trace.updates) >= 2 for trace in traces):
            of_whole_layers.add(path)

    chosen: dict[str, list[LayerTrace]] = {}
    for path, traces in adding.items():
        # An outer list is passed over for the whole layers inside of it (blocks of layers).
        if any(inner.startswith(f"{path}.") for inner in of_whole_layers):
            continue
        # An inner list that holds no whole layers is part of a layer (experts, branches).
        is_nested = any(path.startswith(f"{outer}.") for outer in adding)
        if not is_nested or path in of_whole_layers:
            chosen[path] = traces
    return chosen


def _container_traces(view: ModelView, reader: TraceReader) -> dict[str, list[LayerTrace]]:
    """What was seen of the members of every container, by its path; members that did not run are left out."""
    # The first call of each module; one that did not end was left by an exception that the model caught.
    calls = {}
    for call in reversed(reader.trace.calls):
        if call.end >= 0:
            calls[call.path] = call
    traces = {}
    for path, module in view.modules.items():
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            members = [join(path, name) for name, _ in module.named_children()]
            ran = [member for member in members if member in calls and member in view.modules]
            traces[path] = [layer_trace(reader, calls[member]) for member in ran]
    return traces


def _at_least_half(answers: Iterable[bool]) -> bool:
    """Whether at least half of the answers are yes, and there is one."""
    all_answers = list(answers)
    return len(all_answers) > 0 and sum(all_answers) * 2 >= len(all_answers)


def _interface(view: ModelView, reader: TraceReader) -> AdapterModelInterface:
    """The interface that what was seen comes to.

    Raises:
        InterfaceError: there are no layers, or no accessors lead to what was seen in all of them.
    """
    lists = _layer_lists(view, reader)
    if not lists:
        raise InterfaceError(
            f"no list of layers of this {view.name} was seen to add to a stream: write the interface by hand"
        )
    layers = list(itertools.chain.from_iterable(lists.values()))
    embeddings = _embeddings(view, reader, [layer.path for layer in layers])

    # Paths count from the base model; where something stands outside of it, from the model itself.
    root, base_model = view.base, None
    named = set(lists)
    if embeddings is not None:
        named.add(embeddings)
    if root != "" and not all(within(path, [root]) for path in named):
        root, base_model = "", ""
    list_paths = tuple(relative(path, root) for path in lists)

    report = [
        Finding(
            "model_embeddings",
            embeddings,
            "seen" if embeddings else "not there",
            "what the first layer's input is made with",
        ),
        Finding(
            "model_layers",
            list_paths,
            "seen",
            f"{len(layers)} layers that add to the stream that they are given",
        ),
    ]
    accessors: dict[str, Accessor] = {}
    for name in accessor_names():
        if name not in ("model_embeddings", "model_layers", "base_model"):
            finding = _Accessor(name, layers, view).finding()
            accessors[name] = finding.value
            report.append(finding)
    interface = AdapterModelInterface(
        adapter_methods=_offered_methods(view, reader, embeddings, layers),
        model_embeddings=None if embeddings is None else relative(embeddings, root),
        model_layers=list_paths[0] if len(list_paths) == 1 else list_paths,
        base_model=base_model,
        report=tuple(report),
        **accessors,
    )
    _require_as_seen(interface.resolve(view), layers)
    return interface


def _require_as_seen(stream: ResidualStream, layers: Sequence[LayerTrace]) -> None:
    """Check that the accessors lead to what was seen, in every layer; of two steps of one kind to the first.

    Raises:
        InterfaceError: naming the first that does not.
    """
    resolved = {layer.path: layer for layer in stream.layers}
    for layer in layers:
        led_to = {}
        if layer.path in resolved:
            for step in resolved[layer.path].sublayers:
                led_to[step.kind] = (step.out, step.before, step.norm)
        seen: dict[str, tuple[str, str | None, str | None]] = {}
        for update in layer.updates:
            seen.setdefault(update.kind, (update.out, update.before, update.norm))
        if led_to != seen:
            raise InterfaceError(
                f"{layer.path!r}: {seen} was seen to write to the stream (module, what reads it before, "
                f"norm behind), and the accessors of all layers together lead to {led_to}: write the "
                "interface by hand"
            )


# Accessors that are looked for only where there is the step that they belong to.
_BESIDE_A_STEP = ("layer_pre_", "layer_ln_")
# The kind of step that each accessor of a layer speaks of.
_KINDS = {
    "layer_self_attn": "self",
    "layer_cross_attn": "cross",
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


@dataclass(frozen=True)
class _Use:
    """What an accessor has to lead to in one step: the path from its owner, or None for nothing."""

    owner: str
    value: str | None
    update: StreamUpdate


class _Accessor:
    """One accessor, worked out over all layers.

    Attributes:
        name: the accessor's.
        layers: what was seen of each layer.
        view: the model.
        uses: for each layer, what the accessor has to lead to in its steps.
    """

    def __init__(self, name: str, layers: Sequence[LayerTrace], view: ModelView) -> None:
        self.name = name
        self.layers = layers
        self.view = view
        self.is_in_attention = name.startswith("attn_")
        # Whether a layer without the step that it belongs to has no need of it.
        self.belongs_to_a_step = self.is_in_attention or name.startswith(_BESIDE_A_STEP)
        self.uses: list[list[_Use]] = []
        for layer in layers:
            self.uses.append([self._use(layer, update) for update in layer.updates if self._concerns(update)])

    def _concerns(self, update: StreamUpdate) -> bool:
        """Whether the accessor speaks of a step of this kind."""
        if self.is_in_attention:
            return update.kind in ("self", "cross")
        return update.kind == _KINDS[self.name]

    def _use(self, layer: LayerTrace, update: StreamUpdate) -> _Use:
        """What the accessor has to lead to in one step."""
        owner = layer.path
        if self.is_in_attention:
            assert update.attention is not None
            owner = update.attention
        path = self._meant(update)
        # An accessor goes downwards only: what stands elsewhere it cannot lead to.
        if path is None or not (owner == "" or within(path, [owner])):
            return _Use(owner, None, update)
        return _Use(owner, relative(path, owner), update)

    def _meant(self, update: StreamUpdate) -> str | None:
        """The path of what the accessor speaks of in one step, or None where the step has none."""
        if self.name in ("layer_self_attn", "layer_cross_attn"):
            return update.attention
        if self.name == "layer_output_proj":
            return update.out
        if self.name.startswith("layer_pre_"):
            return update.before
        if self.name.startswith("layer_ln_"):
            return update.norm
        return update.found.get(self.name)

    def _all_uses(self) -> Iterator[_Use]:
        for uses in self.uses:
            yield from uses

    def finding(self) -> Finding:
        """The accessor that leads where it has to in every layer, and how it was found."""
        counts = Counter(use.value for use in self._all_uses())
        values = self._sorted_values(counts)
        if not values:
            return Finding(self.name, None, "not there", "in no layer")

        accessor: Accessor = values[0]
        if self._is_lacking_somewhere():
            accessor = (*values, None)
        elif len(values) > 1:
            accessor = tuple(values)
        if self._misleads(accessor):
            accessor = self._by_layer()
        return Finding(self.name, accessor, *self._certainty(sum(counts[value] for value in values)))

    def _sorted_values(self, counts: Counter[str | None]) -> list[str]:
        """The paths that are meant somewhere; first the one that least often stands where another is
        meant.
        """
        values = [value for value in counts if value is not None]
        misled: Counter[str] = Counter()
        for use in self._all_uses():
            for value in values:
                if value != use.value and join(use.owner, value) in self.view.modules:
                    misled[value] += 1
        values.sort(key=lambda value: (misled[value], -value.count("."), -counts[value]))
        return values

    def _is_lacking_somewhere(self) -> bool:
        """Whether a layer, or a step, has nothing of the kind."""
        for uses in self.uses:
            if any(use.value is None for use in uses):
                return True
            if not uses and not self.belongs_to_a_step:
                return True
        return False

    def _misleads(self, accessor: Accessor) -> bool:
        """Whether an accessor leads in some layer to something else than what is meant in its first step."""
        for layer, uses in zip(self.layers, self.uses, strict=True):
            if self.belongs_to_a_step and not uses:
                continue
            if self.is_in_attention:
                owner = uses[0].owner
            else:
                owner = layer.path
            meant = uses[0].value if uses else None
            if self._leads_to(accessor, owner) != meant:
                return True
        return False

    def _leads_to(self, accessor: Accessor, owner: str) -> str | None:
        """The first alternative of an accessor that leads somewhere from an owner."""
        alternatives = accessor if isinstance(accessor, tuple) else (accessor,)
        for path in alternatives:
            if isinstance(path, str) and join(owner, path) in self.view.modules:
                return path
        return None

    def _by_layer(self) -> Accessor:
        """The accessor layer by layer, for models whose layers it cannot tell apart by what they have."""
        meant = [uses[0].value if uses else None for uses in self.uses]
        if set(meant) == {None}:
            return None
        common = Counter(meant).most_common(1)[0][0]
        by_layer = {"default": common}
        for number, value in enumerate(meant):
            if value != common:
                by_layer[str(number)] = value
        return by_layer

    def _certainty(self, count: int) -> tuple[str, str]:
        """How sure the accessor is, and why.

        Args:
            count: in how many steps it leads somewhere.
        """
        updates: list[StreamUpdate] = []
        for layer in self.layers:
            updates += layer.updates
        # Projections are told by their names, unless what the kernel multiplied could be followed back.
        is_projection = self.is_in_attention and self.name != "attn_o_proj"
        by_flow = is_projection and any(update.by_flow for update in updates)
        by_name = is_projection and not by_flow
        why = f"in {count} of {len(self.layers)} layers"
        if self.is_in_attention:
            why = f"in {count} attention modules"
        if by_flow:
            why += ", by what the kernel's operands come from"
        if by_name or any(update.by_name for update in updates):
            return "name", why
        return "seen", why


def _embeddings(view: ModelView, reader: TraceReader, layers: Sequence[str]) -> str | None:
    """The path of what the first layer's input is made with.

    That is what the model says, else the embedding that was called first, else the module that gave the first
    layer's input.

    Args:
        view: the model.
        reader: of the trace.
        layers: paths of the layers.
    """
    if view.input_embedding is not None:
        return view.input_embedding
    for call in reader.trace.calls:
        if call.path in view.layers and view.layers[call.path].kind == "embedding":
            if not within(call.path, layers):
                return call.path
            break
    for call in reader.trace.calls:
        if call.path in layers:
            return _maker_of_input(reader, call)
    return None


def _maker_of_input(reader: TraceReader, layer: Call) -> str | None:
    """The path of the module that gave a layer its input, of several the one that was called first; not one
    that the layer stands in.
    """
    if layer.input is None:
        return None
    chain = reader.origins(layer.input)
    for call in reader.trace.calls:
        if call.output in chain and not within(layer.path, [call.path]):
            return call.path
    return None


def _offered_methods(
    view: ModelView, reader: TraceReader, embeddings: str | None, layers: Sequence[LayerTrace]
) -> tuple[str, ...]:
    """Which of the methods that an interface speaks of the model may have: those for which it has what they
    need.
    """
    kinds = {layer.kind for layer in view.layers.values()}
    has = {
        InterfaceMethod.bottleneck: any(layer.updates for layer in layers),
        InterfaceMethod.prefix_tuning: any(
            reader.is_attention(view.modules[path]) for path in reader.attending
        ),
        InterfaceMethod.lora: "linear" in kinds or "transposed-linear" in kinds,
        InterfaceMethod.prompt_tuning: "input" in kinds,
        InterfaceMethod.reft: True,
        InterfaceMethod.invertible: embeddings is not None,
    }
    return tuple(method for method in METHODS if has[method])
