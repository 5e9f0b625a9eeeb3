"""What one watched call of a layer added to the residual stream, and which modules computed it.

A layer is given the stream and gives it back with something added: ``stream + attention(norm(stream))``, then
``stream + feed_forward(norm(stream))``; models that norm afterwards give ``norm(stream + ...)``. So the sums
are looked for of which one operand is the stream; the other operand is an update, and what it was computed by
and from is followed back (README.md has a drawing).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from grafts.modules.patterns import join, within
from grafts.structure.attention_modules import CROSS_ATTENTION, crosses
from grafts.structure.residual_stream import SublayerKind
from grafts.structure.roles import ATTENTION_OUT, FFN_OUT, FUSED, KEY, KEY_VALUE, QUERY, VALUE
from grafts.structure.trace import Call, Node
from grafts.structure.trace_reader import ADDITIONS, KERNELS, PRODUCTS, TraceReader

# What models call a feed-forward, where it cannot be told by what it does.
_FEED_FORWARD_NAMES = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe")


@dataclass
class StreamUpdate:
    """One module's output being added to the stream, in one layer; paths are those of the model.

    Attributes:
        out: the module whose output is added.
        before: a module that was given the stream as it was before (the norm in front; the layer itself,
            where it was given that stream); None where none was.
        norm: the norm that the sum went through, and nothing else read; None where there is none.
        kind: of the step.
        attention: the attention module, of a step of attention.
        found: accessor -> path, of what else is in it.
        by_flow: the projections were told by what the kernel's operands come from.
        by_name: the step was told by names and sizes, and not seen.
    """

    out: str
    before: str | None = None
    norm: str | None = None
    kind: SublayerKind = "ffn"
    attention: str | None = None
    found: dict[str, str] = field(default_factory=dict)
    by_flow: bool = False
    by_name: bool = False


@dataclass(frozen=True)
class LayerTrace:
    """What was seen of one layer: its path, and what it added to the stream, in order."""

    path: str
    updates: tuple[StreamUpdate, ...]


def layer_trace(reader: TraceReader, call: Call) -> LayerTrace:
    """What one call of a layer added to the stream that it was given.

    Args:
        reader: of the trace.
        call: the layer's.
    """
    # The stream is the first input that can be hidden states: floats by row, token and feature.
    states = []
    for number in call.inputs:
        if number in reader.trace.floats and len(reader.trace.shapes[number]) >= 3:
            states.append(number)
    if not states:
        return LayerTrace(call.path, ())

    layer = _LayerReader(reader, call, states[0])
    updates = layer.updates()
    if not updates:
        return LayerTrace(call.path, tuple(layer.updates_by_structure()))
    # Sums that the layer keeps to itself are no stream (a module inside of a layer, say).
    if not layer.gives_stream_back():
        return LayerTrace(call.path, ())
    _name_token_mixing(updates)
    return LayerTrace(call.path, tuple(updates))


def _name_token_mixing(updates: list[StreamUpdate]) -> None:
    """What mixes tokens without attention stands in the place of self-attention, if a feed-forward
    follows.
    """
    feed_forwards = [update for update in updates if update.kind == "ffn"]
    has_attention = any(update.kind == "self" for update in updates)
    if len(feed_forwards) > 1 and not has_attention:
        mixing = feed_forwards[0]
        mixing.kind = "self"
        mixing.attention = mixing.out.rpartition(".")[0]
        mixing.found = {"attn_o_proj": mixing.out}


class _LayerReader:
    """Reads one call of a layer.

    Attributes:
        layer: the call.
        calls: the calls of modules inside of it.
        given: the number of the tensor that the layer was given as the stream.
        stream: the numbers of the tensors that are the stream: what was given, the sums, and what is the same
            as one of them but for its form or a norm.
    """

    def __init__(self, reader: TraceReader, layer: Call, given: int) -> None:
        self.reader = reader
        self.trace = reader.trace
        self.view = reader.view
        self.layer = layer
        self.given = given
        self.stream = {given}
        self.calls = [call for call in reader.trace.calls if self._is_inside(call)]
        # What norms gave -> what they were given.
        self._normed: dict[int, int] = {}
        for call in self.calls:
            if call.output is not None and call.input is not None and reader.is_norm(call.path):
                self._normed[call.output] = call.input

    def _is_inside(self, call: Call) -> bool:
        """Whether a call is one of a module inside of the layer, and ran during the layer's own."""
        if call is self.layer:
            return False
        ran_inside = self.layer.begin <= call.begin and 0 <= call.end <= self.layer.end
        stands_inside = self.layer.path == "" or call.path.startswith(f"{self.layer.path}.")
        return ran_inside and stands_inside

    def updates(self) -> list[StreamUpdate]:
        """What is added to the stream, in the order of the sums.

        The operations of the layer are gone through once, and `stream` grows on the way: each sum with the
        stream is the stream from there on.
        """
        updates = []
        for index in range(self.layer.begin, self.layer.end):
            node = self.trace.nodes[index]
            self._follow_stream(node)
            operands = self._operands_of_sum(node)
            if operands is None:
                continue
            before, added = operands
            of_sum = self._updates_in(added, before, index)
            if not of_sum:
                continue
            total = node.outputs[0]
            self.stream.add(total)
            # A norm after the sum is that of its step, unless several steps were summed at once.
            if len(of_sum) == 1:
                of_sum[0].norm = self._norm_behind(total)
            updates += of_sum
        return updates

    def _operands_of_sum(self, node: Node) -> tuple[int, int] | None:
        """The stream and what an operation adds to it; None where it is no sum of exactly these two."""
        if node.op not in ADDITIONS or not node.outputs:
            return None
        operands = self.reader.operands(node, self.reader.size(node.outputs[0]))
        before = [number for number in operands if number in self.stream]
        added = [number for number in operands if number not in self.stream]
        if len(before) != 1 or len(added) != 1:
            return None
        return before[0], added[0]

    def _follow_stream(self, node: Node) -> None:
        """Note what an operation gave that is the stream still."""
        for number in node.outputs:
            if self.reader.same_as(number) in self.stream or self._normed.get(number) in self.stream:
                self.stream.add(number)

    def _updates_in(self, added: int, before: int, index: int) -> list[StreamUpdate]:
        """The updates that were summed into what is added to the stream, the first of each kind.

        Layers with attention and feed-forward side by side (GPT-J, Falcon) add both at once; what else they
        sum there (the output of experts beside that of shared ones) belongs to the same step.

        Args:
            added: the number of what is added.
            before: the number of the stream that it is added to.
            index: of the operation that adds.
        """
        updates: dict[str, StreamUpdate] = {}
        for addend in self._addends(added, self.trace.nodes[index].module):
            update = self._update(addend, before, index)
            if update is not None:
                updates.setdefault(update.kind, update)
        return list(updates.values())

    def _addends(self, number: int, module: str) -> list[int]:
        """What was summed into an update in the layer's own code: attention and feed-forward side by side.

        Args:
            number: the update's.
            module: the path of the module in whose code it must have been summed.
        """
        for origin in self.reader.origins(number):
            index = self.trace.maker.get(origin)
            if index is None:
                break
            node = self.trace.nodes[index]
            if node.op not in ADDITIONS or node.module != module:
                continue
            summands = self.reader.operands(node, self.reader.size(origin))
            if len(summands) == 2 and self.stream.isdisjoint(summands):
                first, second = summands
                return [*self._addends(first, module), *self._addends(second, module)]
        return [number]

    def _update(self, number: int, before: int, index: int) -> StreamUpdate | None:
        """A step of the layer, by what it added; None where nothing of the layer computed that from the
        stream.

        Args:
            number: of the tensor that is added.
            before: of the stream that it is added to.
            index: of the operation that adds.
        """
        out = self.reader.producer(self.reader.origins(number), self.calls)
        # Followed back to the stream and no further. A tensor that is the stream in another form (flattened
        # for experts, say) counts as the stream that it was made from, which is what modules were given.
        nodes, numbers = self.reader.upstream(number, self.stream)
        for tensor in numbers & self.stream:
            numbers = numbers | set(self.reader.origins(tensor))
        is_computed = any(self.trace.nodes[node].op in PRODUCTS for node in nodes)
        comes_from_stream = not numbers.isdisjoint(self.stream)
        if out is None or not comes_from_stream or not is_computed:
            return None

        # A step in which a kernel of attention ran is attention; every other one is a feed-forward.
        update = StreamUpdate(out, before=self._module_before(before, nodes, numbers, index))
        kernels = {node for node in nodes if self.trace.nodes[node].op.startswith(KERNELS)}
        owners = self._attention_around(kernels)
        if owners:
            self._describe_attention(update, max(owners, key=len), kernels, numbers)
        else:
            self._describe_feed_forward(update, numbers)
        return update

    def _module_before(self, before: int, nodes: set[int], numbers: set[int], index: int) -> str | None:
        """The path of a module that was given the stream to which an update is added.

        Args:
            before: the number of that stream.
            nodes: the operations that the update came from.
            numbers: the tensors that it came from.
            index: of the operation that adds it.
        """
        # Of those that read this very stream the one that the update came from, else any.
        aliases = set(self.reader.origins(before))
        readers = self._readers_of(aliases, index)
        feeding = [call for call in readers if self._feeds(call, nodes, numbers | aliases)]
        first = _first(feeding or readers)
        if first is not None:
            return first.path
        if self.layer.inputs[0] in aliases:
            return self.layer.path

        # A branch beside another one, added after it (GPT-NeoX: the sum with the feed-forward, then
        # attention): it was computed from the stream before both.
        beside = []
        for call in self._readers_of(self.stream, index):
            if self._feeds(call, nodes, numbers) and not self._is_normed(call):
                beside.append(call)
        first = _first(beside)
        if first is None:
            return None
        return first.path

    def _readers_of(self, numbers: set[int], index: int) -> list[Call]:
        """The calls inside of the layer that were given one of these tensors, in any form.

        Args:
            numbers: the tensors'.
            index: of an operation; calls that began after it are left out.
        """
        readers = []
        for call in self.calls:
            if call.input is None or call.begin > index:
                continue
            if not numbers.isdisjoint(self.reader.origins(call.input)):
                readers.append(call)
        return readers

    def _feeds(self, call: Call, nodes: set[int], numbers: set[int]) -> bool:
        """Whether a call has part in what these operations and tensors are."""
        if call.output in numbers:
            return True
        return any(index in nodes for index in range(call.begin, call.end))

    def _is_normed(self, call: Call) -> bool:
        """Whether what a call was given comes out of a norm, but for its form."""
        if call.input is None:
            return False
        chain = set(self.reader.origins(call.input))
        for other in self.trace.calls:
            if other.output in chain and self.reader.is_norm(other.path):
                return True
        return False

    def _norm_behind(self, number: int) -> str | None:
        """The path of the norm that alone reads a sum."""
        norms = []
        for call in self.calls:
            if call.inputs[:1] == (number,) and self.reader.is_norm(call.path):
                norms.append(call)
        if len(norms) != 1:
            return None
        inside = range(norms[0].begin, norms[0].end)
        if all(index in inside for index in self.trace.readers.get(number, ())):
            return norms[0].path
        return None

    def gives_stream_back(self) -> bool:
        """Whether what the layer gives is the stream with something added; known once `updates` has found the
        sums.
        """
        sums = self.stream - {self.given}
        results = set(self.layer.outputs)
        if self.layer.output is not None:
            results.update(self.reader.origins(self.layer.output))
        return bool(sums & results)

    def _attention_around(self, kernels: set[int]) -> set[str]:
        """Paths of the attention modules in the layer in which these kernels ran.

        Where no kernel of theirs can be reached it is modules that are called attention and take a softmax.
        """
        owners = set()
        for kernel in kernels:
            module = self.trace.nodes[kernel].module
            for path in self.reader.attending:
                if within(module, [path]) and within(path, [self.layer.path]):
                    owners.add(path)
        if owners:
            return owners
        called = set()
        for kernel in kernels:
            owner = self._called_attention(self.trace.nodes[kernel].module)
            if owner is not None:
                called.add(owner)
        return called

    def _called_attention(self, module: str) -> str | None:
        """The innermost module of the layer that is called attention and holds ``module``, or is it."""
        if not within(module, [self.layer.path]):
            return None
        steps = relative(module, self.layer.path).split(".")
        for count in range(len(steps), 0, -1):
            if "att" in steps[count - 1].lower():
                return join(self.layer.path, *steps[:count])
        return None

    def _describe_attention(
        self, update: StreamUpdate, owner: str, kernels: set[int], numbers: set[int]
    ) -> None:
        """Fill in what is known of a step of attention.

        Args:
            update: the step.
            owner: the path of the module in which the kernel ran.
            kernels: the kernels.
            numbers: the tensors that the update came from.
        """
        if self.view.roles.get(owner) == CROSS_ATTENTION or crosses(owner):
            update.kind = "cross"
        else:
            update.kind = "self"
        # Where the output projection stands beside the module of the kernel (BERT), attention is what holds
        # both.
        update.attention = owner
        if not within(update.out, [owner]):
            update.attention = _common(owner, update.out)
        if update.out != update.attention:
            update.found["attn_o_proj"] = update.out
        roles = self._roles_in(update.attention)
        used = {self.reader.linears[number] for number in numbers & self.reader.linears.keys()}
        self._describe_projections(update, roles, kernels, used)

    def _roles_in(self, owner: str) -> dict[str, str]:
        """What the modules in a module, and it itself, are there for by their names, by path."""
        roles = {}
        for path, role in self.view.roles.items():
            if path and within(path, [owner]):
                roles[path] = role
        return roles

    def _describe_projections(
        self, update: StreamUpdate, roles: Mapping[str, str], kernels: Iterable[int], used: set[str]
    ) -> None:
        """Fill in the projections of attention: by their names, else by what the kernel's operands come from.

        Args:
            update: the step.
            roles: what the modules in it are there for by their names, by path.
            kernels: its kernels; none where they were not seen.
            used: the linears that had part in it.
        """
        projections = {}
        for path, role in roles.items():
            if role in _PROJECTIONS:
                projections[role] = path
        if kernels and not _are_named(projections):
            operands = self.reader.kernel_operands(kernels, used)
            if len(operands) == 3:
                projections = _projections_by_flow(*operands)
                update.by_flow = True
        update.found |= _accessors_of(projections)

    def _describe_feed_forward(self, update: StreamUpdate, numbers: set[int]) -> None:
        """Fill in the linears of a feed-forward that read the stream.

        Of two that do one is a gate: it goes through an activation before it is multiplied with the other.
        """
        update.kind = "ffn"
        readers = [path for path in self._linears_on_stream(numbers) if path != update.out]
        if not readers:
            return
        # The gate's activation stands between it and the product; the other one goes into it as it is.
        ungated = [path for path in readers if self.reader.goes_into_product(path)]
        first = readers[-1]
        if len(readers) > 1 and ungated:
            first = ungated[-1]
        update.found["layer_intermediate_proj"] = first
        gates = [path for path in readers if path != first]
        if len(gates) == 1:
            update.found["layer_gate_proj"] = gates[0]

    def _linears_on_stream(self, numbers: set[int]) -> list[str]:
        """The paths of the linears that were given the stream and gave one of these tensors, in order,
        without those of experts.
        """
        paths: dict[str, None] = {}
        for call in self.trace.calls:
            if call.output not in numbers or call.output not in self.reader.linears:
                continue
            path = self.reader.linears[call.output]
            if not _is_in_experts(path) and not self.stream.isdisjoint(self.reader.origins(call.inputs[0])):
                paths[path] = None
        return list(paths)

    def updates_by_structure(self) -> list[StreamUpdate]:
        """What a layer adds in a way that is not a plain sum (several streams mixed): told by names and
        sizes.

        Nothing where the layer does not give what it was given in shape, or less than two steps can be told.
        """
        if not self._keeps_shape():
            return []
        ran = {call.path for call in self.calls}
        updates = [self._attention_update(path, ran) for path in sorted(self._attention_by_name(ran))]
        for name in _FEED_FORWARD_NAMES:
            path = f"{self.layer.path}.{name}"
            if path in ran:
                updates.append(StreamUpdate(self._feed_forward_out(path, ran), by_name=True))
                break
        if len(updates) > 1:
            return updates
        return []

    def _keeps_shape(self) -> bool:
        """Whether the layer gives hidden states of the shape of something that it was given."""
        if self.layer.output is None:
            return False
        shape = self.trace.shapes[self.layer.output]
        given = [self.trace.shapes[number] for number in self.layer.inputs]
        return len(shape) >= 3 and shape in given

    def _attention_update(self, path: str, ran: set[str]) -> StreamUpdate:
        """A step of attention, told by names.

        Args:
            path: the attention module's.
            ran: the paths of all modules of the layer that ran.
        """
        update = StreamUpdate(path, attention=path, by_name=True)
        update.kind = "cross" if crosses(path) else "self"
        roles = {other: role for other, role in self._roles_in(path).items() if other in ran}
        outs = [other for other, role in roles.items() if role == ATTENTION_OUT]
        if outs and outs[0] != path:
            update.out = outs[0]
            update.found["attn_o_proj"] = outs[0]
        self._describe_projections(update, roles, kernels=(), used=set())
        return update

    def _attention_by_name(self, ran: set[str]) -> set[str]:
        """Paths of the attention modules of the layer that ran; those whose kernel can be reached, else by
        name.
        """
        reachable = {path for path in self.reader.attending & ran if within(path, [self.layer.path])}
        if reachable:
            return reachable
        return {path for path in ran if self._is_called_attention(path) and self._has_linears(path)}

    def _is_called_attention(self, path: str) -> bool:
        """Whether a child of the layer is called attention, and is not what stands around it."""
        name = relative(path, self.layer.path).lower()
        is_child = "." not in name
        is_around = re.search("norm|connection|conv", name) is not None
        return is_child and "att" in name and not is_around

    def _has_linears(self, path: str) -> bool:
        """Whether there are linears in a module, or it is one."""
        for other, layer in self.view.layers.items():
            if layer.is_linear and within(other, [path]):
                return True
        return False

    def _feed_forward_out(self, path: str, ran: set[str]) -> str:
        """The last linear of a feed-forward, where there is one alone; else the feed-forward itself."""
        last = []
        for other, role in self.view.roles.items():
            if role == FFN_OUT and other in ran and within(other, [path]):
                last.append(other)
        if len(last) == 1 and "expert" not in last[0]:
            return last[0]
        return path


# The roles of projections that take the stream into attention.
_PROJECTIONS = (QUERY, KEY, VALUE, KEY_VALUE, FUSED)


def _are_named(projections: Mapping[str, str]) -> bool:
    """Whether names alone tell the projections of attention, by role."""
    if FUSED in projections or KEY_VALUE in projections:
        return True
    return QUERY in projections and VALUE in projections


def _projections_by_flow(query: str, key: str, value: str) -> dict[str, str]:
    """The projections by role, from the paths of those that a kernel's operands come from."""
    if query == key == value:
        return {FUSED: query}
    return {QUERY: query, KEY: key, VALUE: value}


def _accessors_of(projections: Mapping[str, str]) -> dict[str, str]:
    """The paths of projections by the accessors of an interface; none where not all can be told.

    Args:
        projections: their paths, by role.
    """
    if FUSED in projections:
        return {"attn_qkv_proj": projections[FUSED]}
    query = projections.get(QUERY)
    key = projections.get(KEY, projections.get(KEY_VALUE))
    value = projections.get(VALUE, projections.get(KEY_VALUE))
    # Where keys and values share a projection that is called after one of them, it is both.
    key = key or value
    value = value or key
    if query and key and value:
        return {"attn_q_proj": query, "attn_k_proj": key, "attn_v_proj": value}
    return {}


def _first(calls: list[Call]) -> Call | None:
    """The call that began first, of several the outermost."""
    if not calls:
        return None
    return min(calls, key=lambda call: (call.begin, call.depth))


def _is_in_experts(path: str) -> bool:
    """Whether a module stands in a list of experts, or is one."""
    return any("expert" in step.lower() for step in path.split("."))


def _common(first: str, second: str) -> str:
    """The path of the innermost module around both."""
    steps = []
    for ours, theirs in zip(first.split("."), second.split("."), strict=False):
        if ours != theirs:
            break
        steps.append(ours)
    return ".".join(steps)


def relative(path: str, owner: str) -> str:
    """A path as it is called from its owner: the steps that lead from there to the module.

    >>> relative("model.layers.0", "model"), relative("lm_head", "")
    ('layers.0', 'lm_head')
    """
    if not owner:
        return path
    return path[len(owner) :].lstrip(".")
