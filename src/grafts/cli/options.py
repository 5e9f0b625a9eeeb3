"""Flags made from the dataclasses that they set, so that a flag, its YAML key and its help cannot drift
apart.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer
import yaml

from grafts.config import AdapterConfig
from grafts.errors import RunError
from grafts.methods._registry import Method, methods

ADAPTER = "Adapter options"
_NOT_FLAGS = {f.name for f in dataclasses.fields(AdapterConfig)} - {
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "target_roles",
}


def parameter(name: str, kind: Any, help: str, panel: str, *, default: Any = None) -> inspect.Parameter:
    """A keyword parameter that typer shows as ``--name``."""
    option = typer.Option(f"--{name.replace('_', '-')}", help=help, rich_help_panel=panel, show_default=False)
    if kind is bool:
        flag = name.replace("_", "-")
        option = typer.Option(f"--{flag}/--no-{flag}", help=help, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind | None, option]
    )


def settings_parameters(cls: type[Any], without: Iterable[str] = ()) -> list[inspect.Parameter]:
    """A flag for each field of a settings dataclass; None where it is not given."""
    hints = typing.get_type_hints(cls)
    parameters = []
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        hint = hints[field.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        # A list is written with commas.
        kind = str if typing.get_origin(options[0]) is list else options[0]
        help = field.metadata["help"]
        if field.default not in (None, ""):
            help += f" [dim](default: {field.default})[/dim]"
        parameters.append(parameter(field.name, kind, help, field.metadata["panel"]))
    return parameters


def adapter_parameters() -> list[inspect.Parameter]:
    """A flag for each option of any method, its help saying which methods have it."""
    having: dict[str, list[Method[Any]]] = {}
    fields: dict[str, dataclasses.Field[Any]] = {}
    for method in methods():
        for field in dataclasses.fields(method.config):
            if field.name not in _NOT_FLAGS:
                having.setdefault(field.name, []).append(method)
                fields.setdefault(field.name, field)
    return [
        parameter(
            name,
            str,
            f"{field.metadata['help']} [dim]({', '.join(m.name for m in having[name])})[/dim]",
            ADAPTER,
        )
        for name, field in fields.items()
    ]


def adapter_options(values: Mapping[str, str | None]) -> dict[str, Any]:
    """The given options as values: text is read as YAML, and ``a,b`` as a list.

    >>> values = {"r": "8", "target_modules": "q_proj,v_proj", "rank_pattern": "{q_proj: 4}", "bias": None}
    >>> adapter_options(values)
    {'r': 8, 'target_modules': ['q_proj', 'v_proj'], 'rank_pattern': {'q_proj': 4}}
    """
    result: dict[str, Any] = {}
    for name, text in values.items():
        if text is None:
            continue
        if name.endswith(("_modules", "_roles")) or name == "modules_to_save":
            result[name] = _module_names(text)
            continue
        try:
            result[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RunError(f"--{name.replace('_', '-')} is {text!r}, which is not YAML") from error
    return result


def _module_names(text: str) -> str | list[str]:
    """A regular expression or ``all-linear`` as it is; names, one or several with commas, as a list."""
    names = [name.strip() for name in text.strip("[]").split(",")]
    plain = all(name.replace("_", "").replace(".", "").replace("-", "").isalnum() for name in names)
    if plain and text != "all-linear":
        return names
    return text


def with_signature(
    function: Callable[..., Any], parameters: Iterable[inspect.Parameter]
) -> Callable[..., Any]:
    """Give ``function``, which takes ``**values``, the signature that typer reads, after its own named
    parameters.
    """
    own_parameters = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    everything = [*own_parameters, *parameters]
    function.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in everything}
    return function
