"""The methods, one file each, and what the author of another one needs.

A method is a config, one or several kinds of parts, and a record of what it can do, which the decorator
`method` registers. Its parts stand at one of three kinds of site: beside a module (`ModulePart`), inside
attention (`AttendingPart`), or in front of a stack's input (`InputPart`). CONTRIBUTING.md goes through one
from beginning to end.
"""

from grafts.config import AdapterConfig, Auxiliary, LayerSelection, Names, config, option
from grafts.methods._files import FileTarget, MethodFiles, PackedFiles, Parts
from grafts.methods._registry import (
    Method,
    Place,
    Source,
    method,
    method_named,
    method_names,
    method_of,
    methods,
    stream_place,
)
from grafts.methods._tensor_merging import TensorMerging
from grafts.methods.shared.rescale import scaled
from grafts.modules.layers import Layer
from grafts.sites.arguments import Kind
from grafts.sites.attention import AttendingPart, Attention
from grafts.sites.input import InputPart, TokenObserver
from grafts.sites.module import ModulePart
from grafts.sites.site import Part, RankedPart, Reference
from grafts.structure import residual_stream, roles
from grafts.structure.residual_stream import ResidualStream, Sublayer
from grafts.structure.view import ModelView

__all__ = [
    "AdapterConfig",
    "AttendingPart",
    "Attention",
    "Auxiliary",
    "FileTarget",
    "InputPart",
    "Kind",
    "Layer",
    "LayerSelection",
    "Method",
    "MethodFiles",
    "ModelView",
    "ModulePart",
    "Names",
    "PackedFiles",
    "Part",
    "Parts",
    "Place",
    "RankedPart",
    "Reference",
    "ResidualStream",
    "Source",
    "Sublayer",
    "TensorMerging",
    "TokenObserver",
    "config",
    "method",
    "method_named",
    "method_names",
    "method_of",
    "methods",
    "option",
    "residual_stream",
    "roles",
    "scaled",
    "stream_place",
]
