"""What one watched forward says of a model's layers: which modules add to the stream, and what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from grafts.modules.patterns import within
from grafts.sites.attention_routes import route_of
from grafts.structure.attention_modules import CROSS_ATTENTION, crosses
from grafts.structure.roles import ATTENTION_OUT, FFN_OUT, FUSED, KEY, KEY_VALUE, QUERY, VALUE, ModelView
from grafts.structure.trace import Call, Trace

_SAME = {
    "clone",
    "_to_copy",
    "view",
    "_unsafe_view",
    "reshape",
    "alias",
    "detach",
    "dropout",
    "native_dropout",
    "contiguous",
}
_SAME |= {
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "t",
    "lift_fresh",
    "to",
    "copy",
    "expand",
    "_reshape_alias",
    "roll",
}
_SCALED = {"mul", "div"}
_ADDS = {"add", "add_n"}
_PRODUCTS = {
    "_fft_c2c",
    "_fft_r2c",
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "convolution",
    "mkldnn_convolution",
    "mul",
}
_KERNELS = ("_softmax", "softmax", "_scaled_dot_product", "_safe_softmax", "_native_multi_head_attention")


@dataclass
class StreamUpdate:
    """One module's output being added to the stream, in one layer; paths are those of the model.

    Attributes:
        out: the module.
        before: the module that was given the stream as it was before.
        norm: the norm that the sum went through, and nothing else read.
        kind: ``"self"``, ``"cross"`` or ``"ffn"``.
        found: accessor -> path, of what is in it.
    """

    out: str
    before: str | None
    norm: str | None
    kind: str = ""
    found: dict[str, str] = field(default_factory=dict)


@dataclass
class LayerTrace:
    """What was seen of one layer."""

    path: str
    written: list[StreamUpdate]


class TraceReader:
    """Reads a trace."""

    def __init__(self, view: ModelView, trace: Trace) -> None:
        self.view, self.trace = view, trace
        self.attending = {
            path for path, layer in view.layers.items() if layer.kind in ("attending", "attention")
        }
        self.attending |= {
            path
            for path, module in view.modules.items()
            if path and route_of(type(module)) is not None  # type: ignore[arg-type]
        }

    @cached_property
    def linears(self) -> dict[int, str]:
        """The paths of the linears by what they gave."""
        kinds = {path for path, layer in self.view.layers.items() if layer.is_linear}
        return {n: call.path for call in self.trace.calls if call.path in kinds for n in call.outputs[:1]}

    def is_norm(self, path: str) -> bool:
        """Whether a module is a norm."""
        module = self.view.modules[path]
        name = type(module).__name__.lower()
        return "norm" in name and not any(path != p and p.startswith(f"{path}.") for p in self.view.layers)

    def passed(self, number: int) -> int | None:
        """What a tensor is the same as, but for its form or a factor; None if it is something new."""
        index = self.trace.maker.get(number)
        if index is None:
            return None
        node = self.trace.nodes[index]
        size = _size(self.trace.shapes[number])
        alike = [n for n in node.inputs if n in self.trace.floats and _size(self.trace.shapes[n]) == size]
        if node.op in _SAME and node.inputs and _size(self.trace.shapes[node.inputs[0]]) == size:
            return node.inputs[0] if node.inputs[0] != number else None
        others = [n for n in node.inputs if n not in alike]
        plain = all(_size(self.trace.shapes[n]) == 1 or n not in self.trace.maker for n in others)
        shifted = node.op in _ADDS and bool(others)  # by a parameter
        return alike[0] if (node.op in _SCALED or shifted) and len(alike) == 1 and plain else None

    def origins(self, number: int) -> list[int]:
        """A tensor and what it is the same as, nearest first."""
        chain = [number]
        while (earlier := self.passed(chain[-1])) is not None and earlier not in chain:
            chain.append(earlier)
        return chain

    def upstream(self, number: int, stop: set[int]) -> tuple[set[int], set[int]]:
        """The operations that a tensor came from, up to the tensors ``stop``, and the tensors on the way."""
        nodes: set[int] = set()
        numbers = {number}
        left = [number]
        while left:
            index = self.trace.maker.get(left.pop())
            if index is None or index in nodes:
                continue
            nodes.add(index)
            for n in (*self.trace.nodes[index].inputs, *self.trace.nodes[index].carried):
                if n not in numbers and n not in stop:
                    left.append(n)
                numbers.add(n)
        return nodes, numbers

    def producer(self, chain: Sequence[int], calls: Sequence[Call]) -> tuple[str | None, int]:
        """The module that gave a tensor: the one that ended first of those that gave it, norms being looked
        through.
        """
        for learns, number in [(wanted, number) for wanted in (True, False) for number in chain]:
            makers = [c for c in calls if number in c.outputs[:1] and (self._learns(c.path) or not learns)]
            if not makers:
                continue
            first = min(makers, key=lambda c: (c.end, -c.depth))
            if self.is_norm(first.path) and first.inputs:
                inner, at = self.producer(
                    self.origins(first.inputs[0]), [c for c in calls if c.begin < first.begin]
                )
                return (first.path, number) if inner is None else (inner, at)
            linear = next(
                (c for c in makers if c.path in self.view.layers and self.view.layers[c.path].is_linear), None
            )
            return (linear or max(makers, key=lambda c: (c.end, -c.depth))).path, number
        return None, chain[-1]

    def _learns(self, path: str) -> bool:
        return next(self.view.modules[path].parameters(), None) is not None

    def layer(self, call: Call) -> LayerTrace:
        """What one call of a layer added to the stream that it was given."""
        trace, calls = (
            self.trace,
            [c for c in self.trace.calls if call.begin <= c.begin and 0 <= c.end <= call.end],
        )
        calls = [c for c in calls if c is not call and (c.path.startswith(f"{call.path}.") or not call.path)]
        given = [n for n in call.inputs if n in trace.floats and len(trace.shapes[n]) >= 3]
        if not given:
            return LayerTrace(call.path, [])
        stream = {given[0]}
        written: list[StreamUpdate] = []
        norms = {c.outputs[0]: c for c in calls if c.outputs and c.inputs and self.is_norm(c.path)}
        last = given[0]
        for index in range(call.begin, call.end):
            node = trace.nodes[index]
            for number in node.outputs:
                if (earlier := self.passed(number)) is not None and earlier in stream:
                    stream.add(number)
                if number in norms and norms[number].inputs[0] in stream:
                    stream.add(number)
            if node.op not in _ADDS or not node.outputs:
                continue
            size = _size(trace.shapes[node.outputs[0]])
            operands = [n for n in node.inputs if n in trace.floats and _size(trace.shapes[n]) == size]
            old = [n for n in operands if n in stream]
            new = [n for n in operands if n not in stream]
            if len(old) != 1 or len(new) != 1:
                continue
            updates = self._addends(new[0], node.module, stream)
            each = [
                w for n in updates if (w := self._update(n, old[0], stream, calls, call, index)) is not None
            ]
            if not each:
                continue
            made = [next(w for w in each if w.kind == kind) for kind in dict.fromkeys(w.kind for w in each)]
            stream.add(node.outputs[0])
            last = node.outputs[0]
            norm = self._norm_after(last, calls)
            for one in made:
                one.norm = norm if len(made) == 1 else None
            written += made
        if not written:
            return LayerTrace(call.path, self._by_structure(call, calls))
        if not any(n in call.outputs or self._reaches(n, call) for n in stream if n != given[0]):
            return LayerTrace(call.path, [])
        return LayerTrace(call.path, self._named(written))

    def _by_structure(self, layer: Call, calls: Sequence[Call]) -> list[StreamUpdate]:
        """What a layer adds in a way that is not a plain sum (several streams mixed): told by names and
        sizes.
        """
        shape = self.trace.shapes[layer.outputs[0]] if layer.outputs else ()
        if len(shape) < 3 or not any(self.trace.shapes[n] == shape for n in layer.inputs):
            return []
        ran = {c.path for c in calls}
        made = []
        direct = {
            p for p in ran if "." not in relative(p, layer.path) and "att" in relative(p, layer.path).lower()
        }
        direct = {p for p in direct if not re.search("norm|connection|conv", p.rpartition(".")[2].lower())}
        direct = {
            p for p in direct if any(x.is_linear and within(q, [p]) for q, x in self.view.layers.items())
        }
        for path in sorted({p for p in self.attending & ran if within(p, [layer.path])} or direct):
            inside = {p: role for p, role in self.view.roles.items() if within(p, [path]) and p in ran}
            out = next((p for p, role in inside.items() if role == ATTENTION_OUT), path)
            one = StreamUpdate(
                out, None, None, "cross" if crosses(path) else "self", {"attention": path, "by name": ""}
            )
            one.found |= {} if out == path else {"attn_o_proj": out}
            self._projections(one, {}, inside)
            made.append(one)
        for name in ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe"):
            if (path := f"{layer.path}.{name}") in ran:
                last = [
                    p
                    for p, role in self.view.roles.items()
                    if role == FFN_OUT and p in ran and within(p, [path])
                ]
                out = last[0] if len(last) == 1 and "expert" not in last[0] else path
                made.append(StreamUpdate(out, None, None, "ffn", {"by name": ""}))
                break
        return made if len(made) > 1 else []

    def _reaches(self, number: int, call: Call) -> bool:
        return any(number in self.origins(out) for out in call.outputs[:1])

    def _addends(self, number: int, module: str, stream: set[int]) -> list[int]:
        """What was summed into an update in the layer's own code: attention and feed-forward side by side."""
        for n in self.origins(number):
            index = self.trace.maker.get(n)
            if index is None:
                break
            node = self.trace.nodes[index]
            if node.op in _ADDS and node.module == module:
                size = _size(self.trace.shapes[n])
                parts = [
                    x for x in node.inputs if x in self.trace.floats and _size(self.trace.shapes[x]) == size
                ]
                if len(parts) == 2 and not any(p in stream for p in parts):
                    return [leaf for part in parts for leaf in self._addends(part, module, stream)]
        return [number]

    def _update(
        self, number: int, old: int, stream: set[int], calls: Sequence[Call], layer: Call, index: int
    ) -> StreamUpdate | None:
        """The module whose output is added, or None where nothing of the layer computed it from the
        stream.
        """
        out, _ = self.producer(self.origins(number), calls)
        nodes, numbers = self.upstream(number, stream)
        numbers |= {origin for n in numbers & stream for origin in self.origins(n)}
        if out is None or not numbers & stream or not any(self.trace.nodes[i].op in _PRODUCTS for i in nodes):
            return None
        aliases = set(self.origins(old))
        readers = [
            c for c in calls if c.inputs and aliases & set(self.origins(c.inputs[0])) and c.begin <= index
        ]
        inner = [c for c in readers if self._feeds(c, nodes, numbers | aliases)] or readers
        before = min(inner, key=lambda c: (c.begin, c.depth)).path if inner else None
        if before is None and layer.inputs[0] in aliases:
            before = layer.path
        if before is None:  # a branch beside another one, added after it: what it was computed from
            beside = [
                c for c in calls if c.inputs and set(self.origins(c.inputs[0])) & stream and c.begin <= index
            ]
            beside = [c for c in beside if self._feeds(c, nodes, numbers) and not self._normed(c.inputs[0])]
            before = min(beside, key=lambda c: (c.begin, c.depth)).path if beside else None
        made = StreamUpdate(out, before, None)
        kernels = {i for i in nodes if self.trace.nodes[i].op.startswith(_KERNELS)}
        owners = {m for m in self.attending for i in kernels if within(self.trace.nodes[i].module, [m])}
        owners = {m for m in owners if within(m, [layer.path])} or self._called_attention(kernels, layer.path)
        if owners:
            self._attention(made, owners, kernels, numbers)
        else:
            self._feed_forward(made, nodes, numbers, stream)
        return made

    def _feeds(self, call: Call, nodes: set[int], numbers: set[int]) -> bool:
        """Whether a call has part in what these operations and tensors are."""
        return any(i in nodes for i in range(call.begin, call.end)) or bool(set(call.outputs[:1]) & numbers)

    def _normed(self, number: int) -> bool:
        """Whether a tensor comes out of a norm, but for its form."""
        chain = set(self.origins(number))
        return any(c.outputs[:1] and c.outputs[0] in chain and self.is_norm(c.path) for c in self.trace.calls)

    def _called_attention(self, kernels: set[int], layer: str) -> set[str]:
        """Modules in a layer that are called attention and take a softmax, where no kernel of theirs can be
        reached.
        """
        found = set()
        for index in kernels:
            module = self.trace.nodes[index].module
            steps = module[len(layer) :].lstrip(".").split(".")
            named = [i for i, step in enumerate(steps) if "att" in step.lower()]
            if named and within(module, [layer]):
                found.add(".".join([*([layer] if layer else []), *steps[: named[-1] + 1]]))
        return found

    def _norm_after(self, number: int, calls: Sequence[Call]) -> str | None:
        """The norm that alone reads a sum."""
        norms = [c for c in calls if c.inputs[:1] == (number,) and self.is_norm(c.path)]
        if len(norms) != 1:
            return None
        inside = range(norms[0].begin, norms[0].end)
        return norms[0].path if all(i in inside for i in self.trace.readers.get(number, ())) else None

    def _attention(self, made: StreamUpdate, owners: set[str], kernels: set[int], numbers: set[int]) -> None:
        owner = max(owners, key=len)
        made.kind = "cross" if self.view.roles.get(owner) == CROSS_ATTENTION or crosses(owner) else "self"
        common = owner if within(made.out, [owner]) else _common(owner, made.out)
        made.found["attention"] = common
        if made.out != common:
            made.found["attn_o_proj"] = made.out
        own = {path: role for path, role in self.view.roles.items() if path and within(path, [common])}
        self._projections(made, {i: self.trace.nodes[i] for i in kernels}, own, numbers)

    def _projections(
        self,
        made: StreamUpdate,
        kernels: Mapping[int, Any],
        own: Mapping[str, str],
        numbers: Iterable[int] = (),
    ) -> None:
        """The projections in an attention module, by their names, or else by what the kernel's operands come
        from.
        """
        by_name = {role: path for path, role in own.items() if role in (QUERY, KEY, VALUE, KEY_VALUE, FUSED)}
        used = {self.linears[n] for n in numbers if n in self.linears}
        by_flow = self._operands(set(kernels), used) if kernels else []
        if len(by_flow) == 3 and not (
            by_name.get(FUSED) or {QUERY, VALUE} <= by_name.keys() or KEY_VALUE in by_name
        ):
            query, key, value = by_flow
            by_name = {FUSED: query} if query == key == value else {QUERY: query, KEY: key, VALUE: value}
            made.found["by flow"] = ""
        if FUSED in by_name:
            made.found["attn_qkv_proj"] = by_name[FUSED]
            return
        keys, values = (by_name.get(role, by_name.get(KEY_VALUE)) for role in (KEY, VALUE))
        names = {
            "attn_q_proj": by_name.get(QUERY),
            "attn_k_proj": keys or values,
            "attn_v_proj": values or keys,
        }
        if all(names.values()):
            made.found |= {name: path for name, path in names.items() if path is not None}

    def _operands(self, kernels: set[int], used: set[str]) -> list[str]:
        """The linears that queries, keys and values of the first kernel come from; fewer where that cannot be
        seen.
        """
        index = min(kernels)
        node = self.trace.nodes[index]
        if node.op.startswith("_scaled_dot_product"):
            operands = list(node.inputs[:3])
        else:
            scores = self._nearest_product(node.inputs[0], back=True)
            weighted = self._nearest_product(node.outputs[0], back=False)
            if scores is None or weighted is None:
                return []
            operands = [*self.trace.nodes[scores].inputs[-2:], self.trace.nodes[weighted].inputs[-1]]
        return [path for n in operands if (path := self._nearest_linear(n, used)) is not None]

    def _nearest_product(self, number: int, *, back: bool) -> int | None:
        left, seen = [number], {number}
        while left:
            number = left.pop(0)
            if back:
                indices = [i for i in (self.trace.maker.get(number),) if i is not None]
            else:
                indices = self.trace.readers.get(number, [])
            for index in indices:
                node = self.trace.nodes[index]
                if node.op in ("bmm", "baddbmm", "mm"):
                    return index
                for n in node.inputs if back else node.outputs:
                    if n not in seen:
                        seen.add(n)
                        left.append(n)
        return None

    def _nearest_linear(self, number: int, used: set[str]) -> str | None:
        left, seen = [number], {number}
        while left:
            number = left.pop(0)
            if self.linears.get(number) in used:
                return self.linears[number]
            index = self.trace.maker.get(number)
            for n in () if index is None else self.trace.nodes[index].inputs:
                if n not in seen:
                    seen.add(n)
                    left.append(n)
        return None

    def _feed_forward(self, made: StreamUpdate, nodes: set[int], numbers: set[int], stream: set[int]) -> None:
        """The linears that read the stream: the one whose output goes straight into a product is no gate."""
        made.kind = "ffn"
        readers = []
        for call in self.trace.calls:
            path = self.linears.get(call.outputs[0]) if call.outputs else None
            if path is None or path == made.out or call.outputs[0] not in numbers or path in readers:
                continue
            if any(n in stream for n in self.origins(call.inputs[0])) and not within(path, _experts(path)):
                readers.append(path)
        if not readers:
            return
        straight = [path for path in readers if self._goes_straight(path)]
        first = (
            straight[-1] if len(readers) > 1 and straight else readers[-1] if len(readers) > 1 else readers[0]
        )
        made.found["layer_intermediate_proj"] = first
        rest = [path for path in readers if path != first]
        if len(rest) == 1:
            made.found["layer_gate_proj"] = rest[0]

    def _goes_straight(self, path: str) -> bool:
        numbers = [n for n, linear in self.linears.items() if linear == path]
        for number in numbers:
            for index in self.trace.readers.get(number, ()):
                node = self.trace.nodes[index]
                if node.op == "mul" and len(set(node.inputs)) > 1:
                    return True
        return False

    def _named(self, written: list[StreamUpdate]) -> list[StreamUpdate]:
        """What mixes tokens without an attention kernel stands in the place of self-attention, if a
        feed-forward follows.
        """
        plain = [one for one in written if one.kind == "ffn"]
        if len(plain) > 1 and not any(one.kind == "self" for one in written):
            owner = plain[0].out
            plain[0].kind = "self"
            plain[0].found = {"attention": owner.rpartition(".")[0], "attn_o_proj": owner}
        return written


def _experts(path: str) -> list[str]:
    steps = path.split(".")
    return [".".join(steps[: i + 1]) for i, step in enumerate(steps) if "expert" in step.lower()]


def _size(shape: Iterable[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _common(one: str, other: str) -> str:
    """The path of the innermost module around both."""
    steps = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        steps.append(a)
    return ".".join(steps)


def relative(path: str, owner: str) -> str:
    """A path as it is called from its owner."""
    return path[len(owner) :].lstrip(".") if owner else path
