"""A hook of the docs' build: each method's page ends with what its registered record says that it can do."""

from __future__ import annotations

from typing import Any

from peft import PeftType

from grafts.errors import ConfigError
from grafts.methods import Method, method_named
from grafts.methods.adapterhub import layout_of


def capabilities(method: Method) -> str:
    """The record of a method as a section in Markdown."""
    roles = () if method.members is not None else method.default_roles(method.config())
    targets = " and ".join(", ".join(sorted(role)) for role in roles)
    stream = "worked out from the model's [interface](../interface.md)"
    shared = [
        name for name, there in (("`peft` 0.21", peft_has(method)), ("AdapterHub", hub_has(method))) if there
    ]
    rows = {
        "stands beside": ", ".join(sorted(method.layers)) or "what its parts stand beside",
        "targets if none are named": stream if method.places is not None else targets or "those of its parts",
        "a fresh adapter leaves the output bitwise": "yes" if method.inert else "no",
        "merge and unmerge": merging(method),
        "rows of a batch can choose": rows_choosing(method),
        "can be combined by": ", ".join(f"`{way}`" for way in method.combinations) or "nothing",
        "file type": f"`{method.peft_type}`"
        + (f", interchangeable with {' and '.join(shared)}" if shared else ""),
        "config": f"`grafts.{method.config.__name__}`",
        "source": method.source,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"\n## What it can do\n\n| | |\n|---|---|\n{table}\n"


def merging(method: Method) -> str:
    """Whether adapters of a method can be merged, in words."""
    if method.members is not None:
        return "where all of its members can"
    if not method.mergeable:
        return "no"
    if method.merges is not None:
        return "where it is linear"
    return "yes"


def rows_choosing(method: Method) -> str:
    """Whether rows of a batch can choose among adapters of a method, in words."""
    if method.members is not None:
        return "where they can choose all of its members"
    if method.routable:
        return "yes"
    return "no"


def peft_has(method: Method) -> bool:
    """Whether `peft` knows files of that type."""
    return method.peft_type in PeftType.__members__


def hub_has(method: Method) -> bool:
    """Whether AdapterHub has a place for adapters of that method."""
    if method.members is not None:
        return True
    try:
        layout_of(method.example())
    except ConfigError:
        return False
    return True


def on_page_markdown(markdown: str, *, page: Any, **others: Any) -> str:
    """Called by mkdocs for each page."""
    folder, _, name = page.file.src_uri.rpartition("/")
    return (
        markdown + capabilities(method_named(name.removesuffix(".md"))) if folder == "methods" else markdown
    )
