"""How the adapters of a method lie in files: the one object through which a method speaks of them.

Most methods need none of this: their tensors lie one by one under the path of their module, as
`Part.file_tensors` names them, and their config is written as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Size, Tensor

from grafts.config import AdapterConfig
from grafts.modules.layers import Layer
from grafts.sites.site import Part

C = TypeVar("C", bound=AdapterConfig)

# The parts of one adapter that its method has made, by path.
Parts = Mapping[str, Part]


class FileTarget(NamedTuple):
    """What a file has to hold for one target: its path, the shapes of its tensors by name, and its role."""

    path: str
    tensors: Mapping[str, Size]
    role: str


class MethodFiles(Generic[C]):
    """How the config and the tensors of a method lie in files; a method overrides what is different for it.

    Attributes:
        replaceable: the fields of the config in which an adapter may differ from the one whose place it takes
            (`grafts.hotswap`): those that change nothing of how its parts are built.
        is_packed: its tensors do not lie one by one under the path of their module (see `PackedFiles`).
        has_training_state: training goes on from more than the tensors of the file.
    """

    replaceable: frozenset[str]
    is_packed: ClassVar[bool] = False
    has_training_state: ClassVar[bool] = False

    def __init__(self, replaceable: frozenset[str] = frozenset()) -> None:
        self.replaceable = replaceable

    def config_values(
        self, config: C, values: Mapping[str, Any], parts: Parts, layers: Mapping[str, Layer]
    ) -> Mapping[str, Any]:
        """The fields that ``adapter_config.json`` must say otherwise, because the model or the training
        decided them.

        Args:
            config: the adapter's.
            values: the fields as they would be written, with the targets resolved.
            parts: the adapter's.
            layers: what its parts stand beside, by path.
        """
        return {}

    def training_state(self, parts: Parts) -> Mapping[str, Tensor]:
        """What training has to go on from besides the tensors of the file."""
        return {}

    def resume(self, parts: Parts, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `training_state`."""


class PackedFiles(MethodFiles[C]):
    """The files of a method whose tensors lie together (virtual tokens: all of them in one tensor).

    Attributes:
        prefix: what the names of other tensors (a trained head) begin with.
    """

    is_packed: ClassVar[bool] = True
    prefix: ClassVar[str] = "base_model."

    def config_of(self, config: C, tensors: Mapping[str, Tensor]) -> C:
        """The config as the tensors of a file show it; by default as it is."""
        return config

    def pack(self, config: C, parts: Parts) -> Mapping[str, Tensor]:
        """The tensors of the method's parts, by their whole names in the file."""
        raise NotImplementedError

    def unpack(
        self, config: C, tensors: Mapping[str, Tensor], targets: Sequence[FileTarget]
    ) -> Mapping[str, Tensor]:
        """The inverse of `pack`: all tensors of a file, by the path of their module and their own name there.

        Args:
            config: the adapter's, as `config_of` gives it.
            tensors: those of the file, by their names in it.
            targets: what the file has to hold.

        Raises:
            CheckpointError: something is missing or misshapen.
        """
        raise NotImplementedError
