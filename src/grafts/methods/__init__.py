"""The methods, one file each, and what the author of another one needs.

A method is a config, one or several kinds of parts, and a record of what it can do, which the decorator
`method` registers. Its parts stand at one of three kinds of site: beside a module (`ModulePart`), inside
attention (`AttendingPart`), or in front of a model's input (`InputPart`). CONTRIBUTING.md goes through one
from beginning to end.
"""

from grafts.config import AdapterConfig, config, option
from grafts.methods._registry import (
    Files,
    FileTarget,
    Method,
    Parts,
    Place,
    method,
    method_named,
    method_names,
    method_of,
    methods,
)
from grafts.methods._tensor_merging import TensorMerging
from grafts.sites.arguments import Kind
from grafts.sites.attention import AttendingPart, Attention
from grafts.sites.input import InputPart, TokenObserver
from grafts.sites.module import ModulePart
from grafts.sites.site import Part

__all__ = [
    "AdapterConfig",
    "AttendingPart",
    "Attention",
    "FileTarget",
    "Files",
    "InputPart",
    "Kind",
    "Method",
    "ModulePart",
    "Part",
    "Parts",
    "Place",
    "TensorMerging",
    "TokenObserver",
    "config",
    "method",
    "method_named",
    "method_names",
    "method_of",
    "methods",
    "option",
]
