"""What a trace says of its tensors: which are the same but for their form, what they came from, what they go
into.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        """The paths of linears, by the numbers of the tensors that they gave; only of those that ran in the
        trace.
        """
        paths = {}
        for call in self.trace.calls:
            if call.output is not None and self.is_linear(call.path):
                paths[call.output] = call.path
        return paths

    def is_linear(self, path: str) -> bool:
        """Whether a module is a linear layer, of any class that adapters can stand beside.

        Args:
            path: the module's.
        """
        layer = self.view.layers.get(path)
        return layer is not None and layer.is_linear

    def is_norm(self, path: str) -> bool:
        """Whether a module is a norm: its class is called one, and it holds no layers.

        Args:
            path: the module's.
        """
        if "norm" not in type(self.view.modules[path]).__name__.lower():
            return False
        return not any(other != path and other.startswith(f"{path}.") for other in self.view.layers)

    def is_attention(self, module: nn.Module) -> bool:
        """Whether the attention kernel of a module can be reached, so that adapters can stand inside its
        attention.

        Args:
            module: of any class.
        """
        return route_of(type(module)) is not None

    def size(self, number: int) -> int:
        """How many elements a tensor has.

        Args:
            number: the tensor's, of those in the trace.
        """
        return math.prod(self.trace.shapes[number])

    def operands(self, node: Node, size: int) -> list[int]:
        """The tensors of floating-point numbers, of that size, that an operation read.

        Args:
            node: the operation.
            size: how many elements they have.
        """
        return [n for n in node.inputs if n in self.trace.floats and self.size(n) == size]

    def same_as(self, number: int) -> int | None:
        """What a tensor is the same as, but for its form, a factor or a bias; None if it is something new.

        Args:
            number: the tensor's.
        """
        index = self.trace.maker.get(number)
        if index is None:
            return None
        node = self.trace.nodes[index]
        size = self.size(number)
        # Copied, cast, or looked at in another shape.
        if node.op in _SAME_NUMBERS and node.inputs and self.size(node.inputs[0]) == size:
            if node.inputs[0] != number:
                return node.inputs[0]
            return None
        # Multiplied with, or added to, what does not depend on the input.
        alike = self.operands(node, size)
        others = set(node.inputs) - set(alike)
        is_scaled = node.op in _SCALES
        is_shifted = node.op in ADDITIONS and len(others) > 0
        if (is_scaled or is_shifted) and len(alike) == 1 and self._are_constant(others):
            return alike[0]
        return None

    def _are_constant(self, numbers: Iterable[int]) -> bool:
        """Whether tensors are single numbers, parameters or inputs of the model, and nothing that was
        computed.
        """
        return all(self.size(number) == 1 or number not in self.trace.maker for number in numbers)

    def origins(self, number: int) -> list[int]:
        """A tensor and what it is the same as, nearest first; the chain ends where something new was
        computed.

        Args:
            number: the tensor's.
        """
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
        learning = [call for call in calls if self._has_parameters(call.path)]
        for considered in (learning, calls):
            for number in chain:
                makers = [call for call in considered if call.output == number]
                if makers:
                    return self._among(makers, calls)
        return None

    def _among(self, makers: Sequence[Call], calls: Sequence[Call]) -> str:
        """The module that stands for those that gave one tensor.

        Args:
            makers: the calls that gave it.
            calls: all calls that may be looked at, for what a norm was given.
        """
        first = min(makers, key=lambda call: (call.end, -call.depth))
        if self.is_norm(first.path) and first.input is not None:
            before = [call for call in calls if call.begin < first.begin]
            return self.producer(self.origins(first.input), before) or first.path
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
        for earlier in _nearest_first(number, self._sources):
            index = self.trace.maker.get(earlier)
            if index is not None and self.trace.nodes[index].op in _MATRIX_PRODUCTS:
                return self.trace.nodes[index]
        return None

    def _product_behind(self, number: int) -> Node | None:
        """The nearest product of matrices that a tensor went into."""
        for later in _nearest_first(number, self._results):
            for index in self.trace.readers.get(later, ()):
                if self.trace.nodes[index].op in _MATRIX_PRODUCTS:
                    return self.trace.nodes[index]
        return None

    def _nearest_linear(self, number: int, used: set[str]) -> str | None:
        """The nearest linear, of those in use, that a tensor came from."""
        for earlier in _nearest_first(number, self._sources):
            path = self.linears.get(earlier)
            if path is not None and path in used:
                return path
        return None

    def _sources(self, number: int) -> Sequence[int]:
        """What the operation read that gave a tensor; nothing for parameters and inputs."""
        index = self.trace.maker.get(number)
        if index is None:
            return ()
        return self.trace.nodes[index].inputs

    def _results(self, number: int) -> Sequence[int]:
        """What the operations gave that read a tensor."""
        results: list[int] = []
        for index in self.trace.readers.get(number, ()):
            results += self.trace.nodes[index].outputs
        return results

    def goes_into_product(self, path: str) -> bool:
        """Whether what a linear gives is multiplied with something else without having gone through
        anything.

        Args:
            path: the linear's.
        """
        for number, linear in self.linears.items():
            if linear != path:
                continue
            for index in self.trace.readers.get(number, ()):
                node = self.trace.nodes[index]
                if node.op == "mul" and len(set(node.inputs)) > 1:
                    return True
        return False


def _nearest_first(number: int, neighbours: Callable[[int], Sequence[int]]) -> Iterator[int]:
    """A tensor, its neighbours, theirs and so on, each once (breadth first).

    Args:
        number: the tensor's.
        neighbours: gives the numbers of those beside a tensor.
    """
    left, seen = deque([number]), {number}
    while left:
        nearest = left.popleft()
        yield nearest
        for other in neighbours(nearest):
            if other not in seen:
                seen.add(other)
                left.append(other)
