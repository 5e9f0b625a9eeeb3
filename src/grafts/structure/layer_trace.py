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
        before: a module that was given the stream as it was before; None where none was.
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
        self.calls = []
        for call in reader.trace.calls:
            ran_inside = layer.begin <= call.begin and 0 <= call.end <= layer.end
            stands_inside = layer.path == "" or call.path.startswith(f"{layer.path}.")
            if call is not layer and ran_inside and stands_inside:
                self.calls.append(call)
        # What norms gave -> what they were given.
        self._normed: dict[int, int] = {}
        for call in self.calls:
            if call.output is not None and call.input is not None and reader.is_norm(call.path):
                self._normed[call.output] = call.input

    def updates(self) -> list[StreamUpdate]:
        """What is added to the stream, in order."""
        updates = []
        for index in range(self.layer.begin, self.layer.end):
            node = self.trace.nodes[index]
            self._follow_stream(node)
            if node.op not in ADDITIONS or not node.outputs:
                continue
            total = node.outputs[0]
            operands = self.reader.operands(node, self.reader.size(total))
            before = [number for number in operands if number in self.stream]
            added = [number for number in operands if number not in self.stream]
            if len(before) != 1 or len(added) != 1:
                continue
            of_sum = self._updates_in(added[0], before[0], index)
            if not of_sum:
                continue
            self.stream.add(total)
            if len(of_sum) == 1:
                of_sum[0].norm = self._norm_behind(total)
            updates += of_sum
        return updates

    def _follow_stream(self, node: Node) -> None:
        """Note what an operation gave that is the stream still."""
        for number in node.outputs:
            if self.reader.same_as(number) in self.stream or self._normed.get(number) in self.stream:
                self.stream.add(number)

    def _updates_in(self, added: int, before: int, index: int) -> list[StreamUpdate]:
        """The updates that were summed into what is added to the stream, the first of each kind.

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
            parts = self.reader.operands(node, self.reader.size(origin))
            if len(parts) == 2 and not any(part in self.stream for part in parts):
                return [*self._addends(parts[0], module), *self._addends(parts[1], module)]
        return [number]

    def _update(self, number: int, before: int, index: int) -> StreamUpdate | None:
        """The module whose output is added; None where nothing of the layer computed it from the stream.

        Args:
            number: of the tensor that is added.
            before: of the stream that it is added to.
            index: of the operation that adds.
        """
        out = self.reader.producer(self.reader.origins(number), self.calls)
        nodes, numbers = self.reader.upstream(number, self.stream)
        for tensor in numbers & self.stream:
            numbers = numbers | set(self.reader.origins(tensor))
        is_computed = any(self.trace.nodes[node].op in PRODUCTS for node in nodes)
        if out is None or not numbers & self.stream or not is_computed:
            return None

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
        aliases = set(self.reader.origins(before))
        readers = []
        for call in self.calls:
            if call.input is None or call.begin > index:
                continue
            if aliases & set(self.reader.origins(call.input)):
                readers.append(call)
        feeding = [call for call in readers if self._feeds(call, nodes, numbers | aliases)]
        first = _first(feeding or readers)
        if first is not None:
            return first.path
        if self.layer.inputs[0] in aliases:
            return self.layer.path

        # A branch beside another one, added after it: it was computed from the stream before both.
        beside = []
        for call in self.calls:
            if call.input is None or call.begin > index:
                continue
            reads_stream = bool(set(self.reader.origins(call.input)) & self.stream)
            if reads_stream and self._feeds(call, nodes, numbers) and not self._is_normed(call.input):
                beside.append(call)
        first = _first(beside)
        if first is None:
            return None
        return first.path

    def _feeds(self, call: Call, nodes: set[int], numbers: set[int]) -> bool:
        """Whether a call has part in what these operations and tensors are."""
        if call.output in numbers:
            return True
        return any(index in nodes for index in range(call.begin, call.end))

    def _is_normed(self, number: int) -> bool:
        """Whether a tensor comes out of a norm, but for its form."""
        chain = set(self.reader.origins(number))
        for call in self.trace.calls:
            if call.output in chain and self.reader.is_norm(call.path):
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
        """Whether what the layer gives is the stream with something added."""
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
            module = self.trace.nodes[kernel].module
            if not within(module, [self.layer.path]):
                continue
            steps = relative(module, self.layer.path).split(".")
            for count in range(len(steps), 0, -1):
                if "att" in steps[count - 1].lower():
                    called.add(join(self.layer.path, *steps[:count]))
                    break
        return called

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
        is_cross = self.view.roles.get(owner) == CROSS_ATTENTION or crosses(owner)
        update.kind = "cross" if is_cross else "self"
        # Where the output projection stands beside the module of the kernel (BERT), attention is what holds
        # both.
        update.attention = owner if within(update.out, [owner]) else _common(owner, update.out)
        if update.out != update.attention:
            update.found["attn_o_proj"] = update.out
        roles = {}
        for path, role in self.view.roles.items():
            if path and within(path, [update.attention]):
                roles[path] = role
        used = set()
        for number in numbers:
            if number in self.reader.linears:
                used.add(self.reader.linears[number])
        self._describe_projections(update, roles, kernels, used)

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
            if role in (QUERY, KEY, VALUE, KEY_VALUE, FUSED):
                projections[role] = path
        are_named = FUSED in projections or KEY_VALUE in projections or {QUERY, VALUE} <= projections.keys()
        if kernels and not are_named:
            operands = self.reader.kernel_operands(kernels, used)
            if len(operands) == 3:
                query, key, value = operands
                projections = {QUERY: query, KEY: key, VALUE: value}
                if query == key == value:
                    projections = {FUSED: query}
                update.by_flow = True

        if FUSED in projections:
            update.found["attn_qkv_proj"] = projections[FUSED]
            return
        query_path = projections.get(QUERY)
        key_path = projections.get(KEY, projections.get(KEY_VALUE))
        value_path = projections.get(VALUE, projections.get(KEY_VALUE))
        # Where keys and values share a projection that is called after one of them, it is both.
        key_path, value_path = key_path or value_path, value_path or key_path
        if query_path and key_path and value_path:
            update.found["attn_q_proj"] = query_path
            update.found["attn_k_proj"] = key_path
            update.found["attn_v_proj"] = value_path

    def _describe_feed_forward(self, update: StreamUpdate, numbers: set[int]) -> None:
        """Fill in the linears of a feed-forward that read the stream.

        Of two that do one is a gate: it goes through an activation before it is multiplied with the other.
        """
        update.kind = "ffn"
        readers = []
        for call in self.trace.calls:
            if call.output is None or call.output not in numbers or call.output not in self.reader.linears:
                continue
            path = self.reader.linears[call.output]
            if path == update.out or path in readers or _is_in_experts(path):
                continue
            if any(origin in self.stream for origin in self.reader.origins(call.inputs[0])):
                readers.append(path)
        if not readers:
            return
        ungated = [path for path in readers if self.reader.goes_into_product(path)]
        first = readers[-1]
        if len(readers) > 1 and ungated:
            first = ungated[-1]
        update.found["layer_intermediate_proj"] = first
        gates = [path for path in readers if path != first]
        if len(gates) == 1:
            update.found["layer_gate_proj"] = gates[0]

    def updates_by_structure(self) -> list[StreamUpdate]:
        """What a layer adds in a way that is not a plain sum (several streams mixed): told by names and
        sizes.

        None where the layer does not give what it was given in shape, or less than two steps can be told.
        """
        if self.layer.output is None:
            return []
        shape = self.trace.shapes[self.layer.output]
        if len(shape) < 3 or not any(self.trace.shapes[number] == shape for number in self.layer.inputs):
            return []
        ran = {call.path for call in self.calls}
        updates = []
        for path in sorted(self._attention_by_name(ran)):
            roles = {}
            for other, role in self.view.roles.items():
                if other in ran and within(other, [path]):
                    roles[other] = role
            update = StreamUpdate(path, attention=path, by_name=True)
            update.kind = "cross" if crosses(path) else "self"
            outs = [other for other, role in roles.items() if role == ATTENTION_OUT]
            if outs and outs[0] != path:
                update.out = update.found["attn_o_proj"] = outs[0]
            self._describe_projections(update, roles, kernels=(), used=set())
            updates.append(update)
        for name in _FEED_FORWARD_NAMES:
            path = f"{self.layer.path}.{name}"
            if path in ran:
                updates.append(StreamUpdate(self._feed_forward_out(path, ran), by_name=True))
                break
        if len(updates) > 1:
            return updates
        return []

    def _attention_by_name(self, ran: set[str]) -> set[str]:
        """Paths of the attention modules of the layer that ran; those whose kernel can be reached, else by
        name.
        """
        reachable = {path for path in self.reader.attending & ran if within(path, [self.layer.path])}
        if reachable:
            return reachable
        named = set()
        for path in ran:
            name = relative(path, self.layer.path).lower()
            is_child = "." not in name
            is_around = re.search("norm|connection|conv", name) is not None
            if not is_child or "att" not in name or is_around:
                continue
            if any(layer.is_linear and within(other, [path]) for other, layer in self.view.layers.items()):
                named.add(path)
        return named

    def _feed_forward_out(self, path: str, ran: set[str]) -> str:
        """The last linear of a feed-forward, where there is one alone; else the feed-forward itself."""
        last = []
        for other, role in self.view.roles.items():
            if role == FFN_OUT and other in ran and within(other, [path]):
                last.append(other)
        if len(last) == 1 and "expert" not in last[0]:
            return last[0]
        return path


def _first(calls: list[Call]) -> Call | None:
    """The call that began first, of several the outermost."""
    if not calls:
        return None
    return min(calls, key=lambda call: (call.begin, call.depth))


def _is_in_experts(path: str) -> bool:
    """Whether a module stands in a list of experts, or is one."""
    return any("expert" in step.lower() for step in path.split("."))


def _common(one: str, other: str) -> str:
    """The path of the innermost module around both."""
    steps = []
    for ours, theirs in zip(one.split("."), other.split("."), strict=False):
        if ours != theirs:
            break
        steps.append(ours)
    return ".".join(steps)


def relative(path: str, owner: str) -> str:
    """A path as it is called from its owner.

    >>> relative("model.layers.0", "model"), relative("lm_head", "")
    ('layers.0', 'lm_head')
    """
    if not owner:
        return path
    return path[len(owner) :].lstrip(".")
