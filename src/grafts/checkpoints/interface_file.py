"""``adapter_interface.json``: an interface beside an adapter, as AdapterHub writes it too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from grafts.checkpoints.atomic_write import find
from grafts.errors import CheckpointError
from grafts.structure.infer import fits
from grafts.structure.interface import METHODS, NEW, AdapterModelInterface, InterfaceMethod
from grafts.structure.view import ModelView

INTERFACE_FILE = "adapter_interface.json"
# What AdapterHub's library can do through an interface.
_OF_ADAPTERHUB = (
    InterfaceMethod.bottleneck,
    InterfaceMethod.lora,
    InterfaceMethod.reft,
    InterfaceMethod.invertible,
)
VERSION = "adapters.1.3.0"  # of the layout


def interface_file(
    model: nn.Module, interface: AdapterModelInterface, *, older: bool = False
) -> dict[str, bytes]:
    """The file that says what a model's modules were taken for; ``older`` without what AdapterHub's library
    does not know.

    An interface with more than one path for an accessor has no such form: then there is no file.
    """
    if older:
        values = {name: value for name, value in interface.to_dict().items() if name not in NEW}
        methods = values.pop("adapter_methods")
        if any(isinstance(value, (list, dict)) for value in values.values()):
            return {}
        known = []
        for method in methods:
            if method in _OF_ADAPTERHUB:
                known.append(method)
        interface = AdapterModelInterface.from_dict({**values, "adapter_methods": known})
    kind = getattr(getattr(model, "config", None), "model_type", None)
    data = {"interface": interface.to_dict(), "model_type": kind, "version": VERSION}
    return {INTERFACE_FILE: (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()}


def read_interface(directory: Path) -> AdapterModelInterface | None:
    """The interface in an adapter's directory, or None where there is none.

    Raises:
        CheckpointError: the file is broken.
    """
    file = find(directory, INTERFACE_FILE)
    if file is None:
        return None
    try:
        data: Any = json.loads(file.read_text("utf-8"))
        return AdapterModelInterface.from_dict(data["interface"])
    except (ValueError, OSError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(file)!r} holds no interface: {error}") from error


def saved_interface(directory: Path, view: ModelView) -> AdapterModelInterface | None:
    """That interface, if it fits the model: an adapter may go to a model of another build, where another one
    holds.

    The adapter beside it shows which method it is for, whatever its list of methods says.
    """
    interface = read_interface(directory)
    if interface is None:
        return None
    interface = dataclasses.replace(interface, adapter_methods=METHODS)
    if fits(interface, view):
        return interface
    return None
