"""A hook of the docs' build: each method's page ends with what its registered record says that it can do."""

from __future__ import annotations

from typing import Any

from grafts.methods import Method, method_named


def capabilities(method: Method) -> str:
    """The record of a method as a section in Markdown."""
    rows = {
        "stands beside": ", ".join(sorted(method.layers)),
        "targets if none are named": " and ".join(", ".join(sorted(r)) for r in method.default_roles(method.config())),
        "a fresh adapter leaves the output bitwise": "yes" if method.inert else "no",
        "merge and unmerge": "yes" if method.mergeable else "no",
        "rows of a batch can choose": "yes" if method.routable else "no",
        "can be combined by": ", ".join(f"`{way}`" for way in method.combinations) or "nothing",
        "file type": f"`{method.peft_type}`, interchangeable with `peft` 0.21",
        "config": f"`grafts.{method.config.__name__}`",
        "source": method.source,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"\n## What it can do\n\n| | |\n|---|---|\n{table}\n"


def on_page_markdown(markdown: str, *, page: Any, **others: Any) -> str:
    """Called by mkdocs for each page."""
    folder, _, name = page.file.src_uri.rpartition("/")
    return markdown + capabilities(method_named(name.removesuffix(".md"))) if folder == "methods" else markdown
