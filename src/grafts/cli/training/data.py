"""Rows from files, through `datasets`, with a clear word where a file is not what a task needs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import datasets

from grafts.errors import RunError, did_you_mean

_BUILDERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


def read_rows(path: str | Path) -> datasets.Dataset:
    """The rows of a file, held in memory.

    Raises:
        RunError: the file is not there, empty, of an unknown kind, or broken.
    """
    file = Path(path)
    if not file.is_file():
        raise RunError(f"no file {str(file)!r}")
    if file.suffix.lower() not in _BUILDERS:
        raise RunError(f"{str(file)!r} is of an unknown kind; known: {', '.join(_BUILDERS)}")
    if file.stat().st_size == 0:
        raise RunError(f"{str(file)!r} is empty")
    builder, options = _BUILDERS[file.suffix.lower()]
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = datasets.load_dataset(
                builder, data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True, **options
            )
        except Exception as error:
            cause = error.__cause__ or error
            raise RunError(
                f"{str(file)!r} cannot be read as {builder}: {' '.join(str(cause).split())[:300]}"
            ) from error
    if not len(rows):
        raise RunError(f"{str(file)!r} holds no rows")
    return rows


def require_column(rows: datasets.Dataset, column: str, file: str, setting: str) -> None:
    """Refuse rows without a column, or with empty cells in it.

    Raises:
        RunError: naming the file, the columns that are there and the setting to use; or the first row without
            a value.
    """
    if column not in rows.column_names:
        raise RunError(
            f"{file!r} has no column {column!r}; {did_you_mean(column, rows.column_names)} "
            f"(--{setting.replace('_', '-')} names another)"
        )
    missing = next((index for index, value in enumerate(rows[column]) if value is None), None)
    if missing is not None:
        raise RunError(f"{file!r}: row {missing + 1} has no value in column {column!r}")


def require_text(rows: datasets.Dataset, column: str, file: str, setting: str) -> None:
    """`require_column`, and every value is text.

    Raises:
        RunError: naming the first row whose value is not.
    """
    require_column(rows, column, file, setting)
    for index, value in enumerate(rows[column]):
        if not isinstance(value, str):
            raise RunError(f"{file!r}: row {index + 1} holds {value!r} in column {column!r}; it must be text")
