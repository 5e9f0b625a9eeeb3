"""What a trace says of its tensors: which are the same but for their form, what they came from, what they go
into.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property

from torch import nn

from grafts.sites.attention_routes import route_of
from grafts.structure.trace import Call, Node, Trace
from grafts.structure.view import ModelView

# Operations that give the same numbers in another form, or the same but for dropout, which is off in a trace.
_SAME_NUMBERS = frozenset(
    (
        "_reshape_alias _to_copy _unsafe_view alias clone contiguous copy detach dropout expand lift_fresh "
        "native_dropout permute reshape roll squeeze t to transpose unsqueeze view"
    ).split()
)
# Operations that may multiply by a factor.
_SCALES = frozenset({"mul", "div"})
ADDITIONS = frozenset({"add", "add_n"})
# Operations in which something is computed from a tensor and a weight, or from two tensors.
PRODUCTS = frozenset(
    "_fft_c2c _fft_r2c _grouped_mm addmm baddbmm bmm convolution mkldnn_convolution mm mul".split()
)
# Operations that multiply two matrices, of which attention has one before and one after its softmax.
_MATRIX_PRODUCTS = frozenset({"bmm", "baddbmm", "mm"})
# What the names of attention kernels, and of the softmax of unfused attention, begin with.
KERNELS = ("_softmax", "softmax", "_scaled_dot_product", "_safe_softmax", "_native_multi_head_attention")


class TraceReader:
    """Reads a trace of a model.

    Attributes:
        view: the model as it is built.
        trace: what one forward of it did.
        attending: paths of the modules that do attention.
    """

    def __init__(self, view: ModelView, trace: Trace) -> None:
        self.view = view
        self.trace = trace
        self.attending: set[str] = set()
        for path, layer in view.layers.items():
            if layer.kind in ("attending", "attention"):
                self.attending.add(path)
        for path, module in view.modules.items():
            if path and route_of(type(module)) is not None:
                self.attending.add(path)

    @cached_property
    def linears(self) -> dict[int, str]:
        """The paths of linears, by the numbers of the tensors that they gave."""
        paths = {}
        for call in self.trace.calls:
            if call.output is not None and self.is_linear(call.path):
                paths[call.output] = call.path
        return paths

    def is_linear(self, path: str) -> bool:
        """Whether a module is a linear layer."""
        layer = self.view.layers.get(path)
        return layer is not None and layer.is_linear

    def is_norm(self, path: str) -> bool:
        """Whether a module is a norm: it is called one, and holds no layers."""
        if "norm" not in type(self.view.modules[path]).__name__.lower():
            return False
        return not any(other != path and other.startswith(f"{path}.") for other in self.view.layers)

    def is_attention(self, module: nn.Module) -> bool:
        """Whether the attention kernel of a module can be reached."""
        return route_of(type(module)) is not None

    def size(self, number: int) -> int:
        """How many numbers a tensor holds."""
        return math.prod(self.trace.shapes[number])

    def operands(self, node: Node, size: int) -> list[int]:
        """The tensors of floating-point numbers, of that size, that an operation read."""
        result = []
        for n in node.inputs:
            if n in self.trace.floats and self.size(n) == size:
                result.append(n)
        return result

    def same_as(self, number: int) -> int | None:
        """What a tensor is the same as, but for its form, a factor or a bias; None if it is something new."""
        index = self.trace.maker.get(number)
        if index is None:
            return None
        node = self.trace.nodes[index]
        size = self.size(number)
        if node.op in _SAME_NUMBERS and node.inputs and self.size(node.inputs[0]) == size:
            if node.inputs[0] != number:
                return node.inputs[0]
            return None

        alike = self.operands(node, size)
        others = [n for n in node.inputs if n not in alike]
        # A number, a parameter or an input of the model, and nothing that was computed.
        are_constant = all(self.size(n) == 1 or n not in self.trace.maker for n in others)
        is_scaled = node.op in _SCALES
        is_shifted = node.op in ADDITIONS and len(others) > 0
        if (is_scaled or is_shifted) and len(alike) == 1 and are_constant:
            return alike[0]
        return None

    def origins(self, number: int) -> list[int]:
        """A tensor and what it is the same as, nearest first."""
        chain = [number]
        while True:
            earlier = self.same_as(chain[-1])
            if earlier is None or earlier in chain:
                return chain
            chain.append(earlier)

    def upstream(self, number: int, stop: set[int]) -> tuple[set[int], set[int]]:
        """What a tensor came from.

        Args:
            number: the tensor's.
            stop: numbers of tensors behind which nothing is looked for.

        Returns:
            The indices of the operations, and the numbers of the tensors on the way, ``stop`` included.
        """
        nodes: set[int] = set()
        numbers = {number}
        left = [number]
        while left:
            index = self.trace.maker.get(left.pop())
            if index is None or index in nodes:
                continue
            nodes.add(index)
            node = self.trace.nodes[index]
            for read in (*node.inputs, *node.carried):
                if read not in numbers and read not in stop:
                    left.append(read)
                numbers.add(read)
        return nodes, numbers

    def producer(self, chain: Sequence[int], calls: Sequence[Call]) -> str | None:
        """The path of the module that gave a tensor; None where no module did.

        Of several that gave the same tensor (a module that only calls another) a linear is taken, else the
        outermost that ended last. Norms are looked through, and modules without parameters are taken only
        where no others are.

        Args:
            chain: the tensor and what it is the same as, nearest first.
            calls: the calls that may have given it.
        """
        for must_learn in (True, False):
            for number in chain:
                makers = [call for call in calls if call.output == number]
                if must_learn:
                    makers = [call for call in makers if self._has_parameters(call.path)]
                if makers:
                    return self._among(makers, calls)
        return None

    def _among(self, makers: Sequence[Call], calls: Sequence[Call]) -> str:
        """The module that stands for those that gave one tensor."""
        first = min(makers, key=lambda call: (call.end, -call.depth))
        if self.is_norm(first.path) and first.input is not None:
            before = [call for call in calls if call.begin < first.begin]
            inner = self.producer(self.origins(first.input), before)
            if inner is None:
                return first.path
            return inner
        for call in makers:
            if self.is_linear(call.path):
                return call.path
        return max(makers, key=lambda call: (call.end, -call.depth)).path

    def _has_parameters(self, path: str) -> bool:
        return next(self.view.modules[path].parameters(), None) is not None

    def kernel_operands(self, kernels: Iterable[int], used: set[str]) -> list[str]:
        """The linears that queries, keys and values of the first kernel come from; fewer where that cannot be
        seen.

        Args:
            kernels: indices of attention kernels or softmaxes.
            used: paths of the linears that may be meant.
        """
        node = self.trace.nodes[min(kernels)]
        if node.op.startswith("_scaled_dot_product"):
            operands = list(node.inputs[:3])
        else:
            # softmax(q k') v: the product before the softmax has queries and keys, the one behind it the
            # values.
            scores = self._product_before(node.inputs[0])
            weighted = self._product_behind(node.outputs[0])
            if scores is None or weighted is None:
                return []
            operands = [*scores.inputs[-2:], weighted.inputs[-1]]
        paths = []
        for number in operands:
            path = self._nearest_linear(number, used)
            if path is not None:
                paths.append(path)
        return paths

    def _product_before(self, number: int) -> Node | None:
        """The nearest product of matrices that a tensor came from."""
        left, seen = deque([number]), {number}
        while left:
            index = self.trace.maker.get(left.popleft())
            if index is None:
                continue
            node = self.trace.nodes[index]
            if node.op in _MATRIX_PRODUCTS:
                return node
            for read in node.inputs:
                if read not in seen:
                    seen.add(read)
                    left.append(read)
        return None

    def _product_behind(self, number: int) -> Node | None:
        """The nearest product of matrices that a tensor went into."""
        left, seen = deque([number]), {number}
        while left:
            for index in self.trace.readers.get(left.popleft(), ()):
                node = self.trace.nodes[index]
                if node.op in _MATRIX_PRODUCTS:
                    return node
                for given in node.outputs:
                    if given not in seen:
                        seen.add(given)
                        left.append(given)
        return None

    def _nearest_linear(self, number: int, used: set[str]) -> str | None:
        """The nearest linear, of those in use, that a tensor came from."""
        left, seen = deque([number]), {number}
        while left:
            number = left.popleft()
            path = self.linears.get(number)
            if path is not None and path in used:
                return path
            index = self.trace.maker.get(number)
            if index is None:
                continue
            for read in self.trace.nodes[index].inputs:
                if read not in seen:
                    seen.add(read)
                    left.append(read)
        return None

    def goes_into_product(self, path: str) -> bool:
        """Whether what a linear gives is multiplied with something else without having gone through
        anything.
        """
        for number, linear in self.linears.items():
            if linear != path:
                continue
            for index in self.trace.readers.get(number, ()):
                node = self.trace.nodes[index]
                if node.op == "mul" and len(set(node.inputs)) > 1:
                    return True
        return False
