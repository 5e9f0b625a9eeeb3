"""The layout of `peft`: ``adapter_config.json`` and ``adapter_model.safetensors``, keys without the adapter's
name.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from grafts.checkpoints.atomic_write import find
from grafts.config import AdapterConfig
from grafts.errors import CheckpointError, ConfigError
from grafts.methods._registry import method_named

CONFIG_FILE, TENSOR_FILE, PICKLE_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
CARD_FILE = "README.md"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Checkpoint:
    """An adapter as read from a directory, before any model is looked at.

    Attributes:
        path: the directory.
        config: its config.
        tensors: name -> tensor, the names being those in the file.
        size: bytes of the tensor file.
        layout: ``"peft"`` or ``"adapterhub"``.
    """

    path: Path
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    size: int
    layout: str = "peft"

    def by_module(self) -> dict[str, Tensor]:
        """The tensors by their module's path in the base model and their own name.

        Raises:
            CheckpointError: a name is none of this layout.
        """
        strange = [name for name in self.tensors if not name.startswith(PREFIX)]
        if strange:
            raise CheckpointError(
                f"the file holds {strange[0]!r}; names in this layout begin with {PREFIX!r}"
            )
        return {name.removeprefix(PREFIX): tensor for name, tensor in self.tensors.items()}


def files_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> dict[str, bytes]:
    """The files of a checkpoint, by name.

    Args:
        config: what goes into ``adapter_config.json``.
        tensors: by their names in the file.
        card: what goes into ``README.md``.
    """
    keyed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return {
        TENSOR_FILE: safetensors_bytes(_own_storage(keyed), metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode(),
        CARD_FILE: card.encode(),
    }


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory (a tied head saved beside its embedding), as the file format
    needs.
    """
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def read(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
    """Read an adapter's directory; nothing in it is run, and nothing outside it is opened.

    Raises:
        CheckpointError: a file is missing, broken, or pickled without ``allow_pickle``.
        ConfigError: the config asks for a method or an option that is not known.
    """
    directory = Path(path)
    config = read_config(directory)
    file = find(directory, TENSOR_FILE)
    if file is None:
        return _read_pickled(directory, config, allow_pickle)
    return Checkpoint(directory, config, read_tensors(file), file.stat().st_size)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by their names in it, on the CPU.

    Args:
        file: the file.

    Raises:
        CheckpointError: it is broken.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is not a whole safetensors file: {error}") from error


def read_config(directory: Path) -> AdapterConfig:
    """The config of an adapter's directory, as the config class of its method.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object that names a method.
        ConfigError: the method or an option is not known.
    """
    data = read_json(directory)
    file = directory / CONFIG_FILE
    if not isinstance(data.get("peft_type"), str):
        raise CheckpointError(f"{str(file)!r} names no 'peft_type', the method of the adapter")
    method = method_named(data.pop("peft_type"))
    data.pop("peft_version", None)
    config_class: type[AdapterConfig] = method.config
    try:
        return config_class.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{str(file)!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{str(file)!r} holds a value of the wrong type: {error}") from error


def read_json(directory: Path) -> dict[str, Any]:
    """What a directory's ``adapter_config.json`` holds, as plain data.

    Args:
        directory: an adapter's.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """
    file = find(directory, CONFIG_FILE)
    if file is None:
        raise CheckpointError(f"{str(directory)!r} holds no {CONFIG_FILE}: {_found_in(directory)}")
    try:
        data = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{str(file)!r} names no 'peft_type', the method of the adapter")
    return data


def _found_in(directory: Path) -> str:
    """What there is in place of an adapter, for messages."""
    if not directory.is_dir():
        return "no such directory"
    names = sorted(path.name for path in directory.iterdir())[:8]
    found = f"it holds {', '.join(names) or 'nothing'}"
    # Several adapters that were saved together: each has a folder of its own.
    folders = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if folders:
        found += f"; adapters are in its folders {', '.join(folders)}"
    return found


def _read_pickled(directory: Path, config: AdapterConfig, allow_pickle: bool) -> Checkpoint:
    """The adapter of a directory without a safetensors file.

    Raises:
        CheckpointError: there is no pickle either, or it cannot be read, or is not allowed to be.
    """
    file = find(directory, PICKLE_FILE)
    if file is None:
        raise CheckpointError(f"{str(directory)!r} holds no {TENSOR_FILE}")
    return Checkpoint(directory, config, read_pickle(file, allow_pickle), file.stat().st_size)


def read_pickle(file: Path, allowed: bool) -> dict[str, Tensor]:
    """The tensors of a pickle, of which nothing but tensors is unpickled.

    Raises:
        CheckpointError: it was not ``allowed``, or holds more than tensors, or is broken.
    """
    if not allowed:
        raise CheckpointError(
            f"{str(file)!r} is a pickle, which can run code when it is loaded. To convert it, load it once "
            "with grafts.load(model, path, allow_pickle=True) from a source that you trust and write it "
            f"with grafts.save, which makes {TENSOR_FILE}."
        )
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} holds more than tensors, or is broken: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{str(file)!r} is not a dictionary of tensors")
    return tensors
