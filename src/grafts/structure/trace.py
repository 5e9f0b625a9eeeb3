"""One forward of a model, watched: which tensors came from which, and which modules they went through.

The forward runs on a tiny input, in evaluation mode, without gradients, and leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grafts.errors import InterfaceError
from grafts.modules.tree import base_modules
from grafts.sites.arguments import tensors_in
from grafts.sites.setup import Setup
from grafts.sites.site import sites_in
from grafts.structure.example_inputs import example_inputs

# How many numbers a model on the meta device may have to get memory for the run (8 GB in float32).
_LARGEST = 2_000_000_000


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: its name, as ``add`` or ``native_layer_norm``.
        inputs: numbers of the tensors that it read.
        outputs: numbers of those that it gave.
        carried: numbers of tensors that share memory with what it wrote, as they were.
        module: the path of the innermost module that was running.
    """

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    carried: tuple[int, ...]
    module: str


@dataclass
class Call:
    """One call of a module.

    Attributes:
        path: the module's.
        begin: how many operations came before it.
        depth: how many modules were running around it.
        inputs: numbers of the tensors that it was given, the first argument's first.
        end: how many operations there were when it ended; -1 while it has not.
        outputs: numbers of the tensors that it gave.
    """

    path: str
    begin: int
    depth: int
    inputs: tuple[int, ...]
    end: int = -1
    outputs: tuple[int, ...] = ()

    @property
    def output(self) -> int | None:
        """The number of the first tensor that it gave, which of most modules is the only one; None where it
        gave none.
        """
        if self.outputs:
            return self.outputs[0]
        return None

    @property
    def input(self) -> int | None:
        """The number of the first tensor that it was given, which of most modules is what they work on; None
        where there is none.
        """
        if self.inputs:
            return self.inputs[0]
        return None


@dataclass
class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What one forward did.

    Tensors are numbered in the order in which they appear. One that is written into gets a new number, and so
    do those that share its memory: a number stands for one value.

    Attributes:
        nodes: every operation, in order.
        calls: every call of a module, in the order in which they began.
        shapes: of each tensor, by number.
        floats: the numbers of the tensors that hold floating-point numbers.
        maker: the index of the operation that gave a tensor, by number; none for parameters and inputs.
        readers: the indices of those that read it, by number.
    """

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    floats: set[int] = field(default_factory=set)
    maker: dict[int, int] = field(default_factory=dict)
    readers: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        # Every tensor is kept until the end: the identity of one that is gone may be given to another.
        self._kept: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._sharing_memory: dict[int, list[Tensor]] = {}
        self._running: list[Call] = []

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor as it is now.

        Args:
            tensor: any tensor; one that was not met before is numbered.
        """
        known = self._numbers.get(id(tensor))
        if known is None:
            return self._new_number(tensor)
        return known

    def _new_number(self, tensor: Tensor) -> int:
        """Number a tensor that is new, or that was written into."""
        number = len(self.shapes)
        if id(tensor) not in self._numbers:
            self._kept.append(tensor)
            if tensor.device.type != "meta":
                address = tensor.untyped_storage().data_ptr()
                self._sharing_memory.setdefault(address, []).append(tensor)
        self._numbers[id(tensor)] = number
        self.shapes[number] = tuple(tensor.shape)
        if tensor.is_floating_point():
            self.floats.add(number)
        return number

    def _others_in_memory(self, tensor: Tensor) -> list[Tensor]:
        """The other known tensors that share a tensor's memory."""
        if tensor.device.type == "meta":
            return []
        others = self._sharing_memory.get(tensor.untyped_storage().data_ptr(), ())
        return [other for other in others if other is not tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation: it runs, and is written down."""
        kwargs = kwargs or {}
        inputs = tuple(self.number(tensor) for tensor in tensors_in((args, kwargs)))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return _unknown_number(args[0])
        result = func(*args, **kwargs)
        self._note(func.overloadpacket.__name__, inputs, list(tensors_in(result)))
        return result

    def _note(self, name: str, inputs: tuple[int, ...], results: Sequence[Tensor]) -> None:
        """Write down an operation that has run.

        Args:
            name: of the operation; one that writes into its input ends with an underscore.
            inputs: the numbers of what it read.
            results: what it gave.
        """
        rewritten: list[Tensor] = []
        if name.endswith("_"):
            rewritten = [tensor for tensor in results if id(tensor) in self._numbers]
        outputs = [self._new_number(tensor) for tensor in results]
        carried = []
        for tensor in rewritten:
            # What shares its memory has changed as well.
            for other in self._others_in_memory(tensor):
                carried.append(self.number(other))
                outputs.append(self._new_number(other))

        index = len(self.nodes)
        module = self._running[-1].path if self._running else ""
        self.nodes.append(Node(name.removesuffix("_"), inputs, tuple(outputs), tuple(carried), module))
        for number in outputs:
            self.maker[number] = index
        for number in dict.fromkeys((*inputs, *carried)):
            self.readers.setdefault(number, []).append(index)

    def enter(self, path: str, args: Any, kwargs: Any) -> None:
        """A module begins; until it ends, what runs is its.

        Args:
            path: the module's.
            args: what it is called with by position.
            kwargs: and by name.
        """
        inputs = tuple(self.number(tensor) for tensor in tensors_in((args, kwargs)))
        call = Call(path, len(self.nodes), len(self._running), inputs)
        self._running.append(call)
        self.calls.append(call)

    def leave(self, output: Any) -> None:
        """The innermost module that was running ends; the one around it goes on.

        Args:
            output: what it gives.
        """
        call = self._running.pop()
        call.end = len(self.nodes)
        call.outputs = tuple(self.number(tensor) for tensor in tensors_in(output))


def _unknown_number(tensor: Tensor) -> bool | float | int:
    """What a model that asks for a number on the meta device is told, where nobody knows it."""
    if tensor.dtype == torch.bool:
        return True
    if tensor.is_floating_point():
        return 1.0
    return 1


def traced(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Trace:
    """Run ``model`` once and watch.

    Args:
        model: the model; adapters on it are idle for this run.
        inputs: keyword arguments of its ``forward``; made from its config and its first layer where they are
            not given.

    Raises:
        InterfaceError: it cannot be run.
    """
    failures: list[str] = []
    for runnable in _with_memory(model):
        with torch.random.fork_rng(devices=[]):
            attempts: Sequence[Mapping[str, Any]]
            if inputs is not None:
                attempts = [inputs]
            else:
                attempts = example_inputs(runnable)
        for arguments in attempts:
            trace = Trace()
            # A model that was not written for this input may raise anything.
            try:
                with _watched(runnable, trace), _as_it_was(runnable), torch.no_grad(), trace:
                    runnable(**arguments)
            except Exception as error:
                failures.append(_first_line(error))
                continue
            return trace
    raise InterfaceError(
        f"this {type(model).__name__} could not be run on a tiny input "
        f"({failures[0] if failures else 'none could be made'}): give one, as in "
        "grafts.infer_interface(model, inputs={'input_ids': ...}), or write the interface by hand"
    )


def _first_line(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}"[:200]


def _with_memory(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and where it has no memory (the meta device) and is not too large, a copy full of zeros."""
    yield model
    tensors = [*model.parameters(), *model.buffers()]
    on_meta = any(tensor.device.type == "meta" for tensor in tensors)
    if on_meta and sum(tensor.numel() for tensor in tensors) < _LARGEST:
        twin = copy.deepcopy(model).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.zero_()
        yield twin


@contextlib.contextmanager
def _watched(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Tell a trace of every call of a module, for the length of a ``with`` block."""
    handles = []
    try:
        for path, module in base_modules(model):

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                trace.enter(path, args, kwargs)

            def after(_: nn.Module, args: Any, output: Any) -> None:
                trace.leave(output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without adapters; random numbers and buffers are afterwards as they were
    before.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with _without_adapters(model), _buffers_kept(model), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """No adapter acts on a model, or on a part of it, for the length of a ``with`` block."""
    running: dict[Setup, tuple[str, ...]] = {}
    for _, site in sites_in(model):
        running[site.setup] = site.setup.running
    try:
        for setup in running:
            setup.running = ()
        yield
    finally:
        for setup, keys in running.items():
            setup.running = keys


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """The buffers of a model (running means, caches of positions) are afterwards what they were before."""
    buffers = []
    for buffer in model.buffers():
        if buffer.device.type != "meta":
            buffers.append((buffer, buffer.clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if buffer.shape == value.shape:
                    buffer.copy_(value)
