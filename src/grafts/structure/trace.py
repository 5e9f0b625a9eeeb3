"""One forward of a model, watched: which tensors came from which, and which modules they went through.

The forward runs on a tiny input, in evaluation mode, without gradients, and leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grafts.errors import InterfaceError
from grafts.modules.layers import describe
from grafts.modules.tree import base_modules
from grafts.sites.site import sites_in

_LARGEST = 2_000_000_000  # numbers that a model without memory gets some for


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
        end: how many when it ended.
        inputs: numbers of the tensors that it was given, the first argument's first.
        outputs: numbers of the tensors that it gave.
        depth: how many modules were running around it.
    """

    path: str
    begin: int
    depth: int
    inputs: tuple[int, ...]
    end: int = -1
    outputs: tuple[int, ...] = ()


@dataclass
class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What one forward did. A tensor that is written into gets a new number.

    Attributes:
        nodes: every operation, in order.
        calls: every call of a module, in the order in which they began.
        shapes: of each tensor, by number.
        maker: the index of the operation that gave a tensor, by number.
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
        self._kept: list[Tensor] = []  # so that no two tensors have one identity
        self._numbers: dict[int, int] = {}
        self._aliases: dict[int, list[Tensor]] = {}
        self._running: list[Call] = []

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor as it is now."""
        known = self._numbers.get(id(tensor))
        return self._new(tensor) if known is None else known

    def _new(self, tensor: Tensor) -> int:
        number = len(self.shapes)
        if id(tensor) not in self._numbers:
            self._kept.append(tensor)
            if tensor.device.type != "meta":
                self._aliases.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self._numbers[id(tensor)] = number
        self.shapes[number] = tuple(tensor.shape)
        if tensor.is_floating_point():
            self.floats.add(number)
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation."""
        inputs = tuple(self.number(t) for t in tensors_in((args, kwargs or {})))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return {torch.bool: True}.get(
                args[0].dtype, 1.0 if args[0].is_floating_point() else 1
            )  # nobody knows
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = tensors_in(result)
        carried: list[int] = []
        written = [t for t in given if id(t) in self._numbers] if name.endswith("_") else []
        outputs = [self._new(t) for t in given]
        for tensor in written:  # what shares its memory has changed as well
            if tensor.device.type == "meta":
                continue
            for other in self._aliases.get(tensor.untyped_storage().data_ptr(), ()):
                if other is not tensor:
                    carried.append(self.number(other))
                    outputs.append(self._new(other))
        index = len(self.nodes)
        module = self._running[-1].path if self._running else ""
        self.nodes.append(Node(name.removesuffix("_"), inputs, tuple(outputs), tuple(carried), module))
        for number in outputs:
            self.maker[number] = index
        for number in dict.fromkeys((*inputs, *carried)):
            self.readers.setdefault(number, []).append(index)
        return result

    def enter(self, path: str, args: Any, kwargs: Any) -> None:
        """A module begins."""
        inputs = tuple(self.number(t) for t in tensors_in((args, kwargs)))
        self._running.append(Call(path, len(self.nodes), len(self._running), inputs))
        self.calls.append(self._running[-1])

    def leave(self, output: Any) -> None:
        """The innermost module ends."""
        call = self._running.pop()
        call.end = len(self.nodes)
        call.outputs = tuple(self.number(t) for t in tensors_in(output))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors_in(item)]
    return []


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
            tries = [inputs] if inputs is not None else example_inputs(runnable)
        for given in tries:
            trace = Trace()
            try:
                with _watched(runnable, trace), _as_it_was(runnable), torch.no_grad(), trace:
                    runnable(**given)
            except Exception as error:
                said = str(error).strip()
                failures.append(f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"[:200])
                continue
            return trace
    raise InterfaceError(
        f"this {type(model).__name__} could not be run on a tiny input "
        f"({failures[0] if failures else 'none could be made'}): give one, as in "
        "grafts.infer_interface(model, inputs={'input_ids': ...}), or write the interface by hand"
    )


def _with_memory(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and where it has no memory (the meta device) and is not too large, a copy full of zeros."""
    yield model
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.device.type == "meta" for t in tensors) and sum(t.numel() for t in tensors) < _LARGEST:
        twin = copy.deepcopy(model).to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.zero_()
        yield twin


@contextlib.contextmanager
def _watched(model: nn.Module, trace: Trace) -> Iterator[None]:
    handles = []
    try:
        for path, module in base_modules(model):

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                trace.enter(path, args, kwargs)

            def after(_: nn.Module, args: Any, output: Any) -> None:
                trace.leave(output)

            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without adapters, and with the same random numbers and buffers after it as
    before.
    """
    setups = [(setup, setup.running) for setup in {id(s.setup): s.setup for _, s in sites_in(model)}.values()]
    for setup, _ in setups:
        setup.running = ()
    training = [module for module in model.modules() if module.training]
    model.eval()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for setup, running in setups:
            setup.running = running
        for module in training:
            module.training = True
        with torch.no_grad():
            for buffer, value in buffers:
                if buffer.shape == value.shape:
                    buffer.copy_(value)


def example_inputs(model: nn.Module) -> list[dict[str, Any]]:
    """Tiny inputs that the model may take, the likeliest first."""
    names = inspect.signature(type(model).forward).parameters
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(model, "config", None)
    tries: list[dict[str, Any]] = []
    with torch.device(device):
        if config is None:
            tries = _for_plain(
                model, [n for n, p in names.items() if n != "self" and p.default is p.empty and p.kind < 2]
            )
        else:
            ids = _ids(config)
            more = {"use_cache": False} if "use_cache" in names else {}
            if "input_ids" in names:
                text = {"input_ids": ids, **more}
                if "decoder_input_ids" in names:
                    text["decoder_input_ids"] = ids
                tries += [text, {**text, "attention_mask": torch.ones_like(ids)}]
            for name, tensors in _signals(config, dtype):
                if name in names:
                    both = {name: tensors, **more}
                    if "decoder_input_ids" in names:
                        both["decoder_input_ids"] = ids
                    tries.append(both)
                    if "input_ids" in names:
                        tries.append({**both, "input_ids": ids})
    return tries


def _ids(config: Any) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 8
    special = {getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    special |= {value for name, value in vars(config).items() if name.endswith(("token_id", "token_index"))}
    plain = [i for i in range(int(size) if isinstance(size, int) else 8) if i not in special][:12] or [0]
    return torch.tensor([(plain * 12)[:9], (plain * 12)[3:12]])


def _signals(config: Any, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Images and sounds by the name of their argument."""
    vision, audio = (getattr(config, name, None) or config for name in ("vision_config", "audio_config"))
    size = getattr(vision, "image_size", 32)
    height, width = (
        (size, size) if isinstance(size, int) else tuple(size)[:2] if isinstance(size, Sequence) else (32, 32)
    )
    channels = int(getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3)
    bins = int(getattr(audio, "num_mel_bins", None) or getattr(audio, "feature_size", None) or 16)
    frames = 2 * int(getattr(audio, "max_source_positions", None) or 32)
    return [
        ("pixel_values", torch.rand(2, channels, height, width, dtype=dtype)),
        (
            "pixel_values",
            torch.rand(2, int(getattr(config, "num_frames", 4)), channels, height, width, dtype=dtype),
        ),
        ("input_features", torch.rand(2, bins, frames, dtype=dtype)),
        ("input_features", torch.rand(2, 64, bins, dtype=dtype)),
        ("input_values", torch.rand(2, 2400, dtype=dtype)),
        ("input_values", torch.rand(2, int(getattr(config, "max_length", 64)), bins, dtype=dtype)),
        ("inputs_embeds", torch.rand(2, 9, int(getattr(config, "hidden_size", 16)), dtype=dtype)),
    ]


def _for_plain(model: nn.Module, required: Sequence[str]) -> list[dict[str, Any]]:
    """For a model without a config: tokens for its first embedding, numbers for its first linear or
    convolution.
    """
    if len(required) != 1:
        return []
    tries = []
    for _, module in base_modules(model):
        layer = describe(module)
        dtype = next((p.dtype for p in module.parameters()), torch.float32)
        if isinstance(module, nn.Embedding):
            tries.append(torch.arange(10).view(2, 5) % module.num_embeddings)
        elif layer is not None and layer.is_linear:
            tries.append(torch.rand(2, 5, layer.in_features, dtype=dtype))
        elif layer is not None and layer.kind == "convolution":
            tries.append(torch.rand(2, layer.in_features, *[16] * len(layer.kernel_size), dtype=dtype))
        if len(tries) == 3:
            break
    return [{required[0]: tensor} for tensor in tries]
