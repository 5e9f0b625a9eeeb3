"""Directories that are written whole or not at all.

A write first stands complete in a folder of its own inside the directory; one rename commits it, and moving
the files to their places is the rest. A process killed before the rename has written nothing; one killed
after it has written
everything: readers look into the committed folder first, and the next write finishes the move.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from grafts.errors import CheckpointError

_STAGED, _COMMITTED = ".writing-", ".committed"


def write_all(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write these files, by their path in it, into ``directory`` together; other files there stay.

    A file that has these bytes already is not written, so the usual case (new tensors, same config) is a
    single rename.

    Raises:
        CheckpointError: the directory cannot be written to (rights, space); what was there before is still
            there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # What a write before this one has left: committed but not moved, or not even committed.
        _finish(directory)
        for leftover in directory.glob(f"{_STAGED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=directory))
        try:
            for name, content in files.items():
                if not _holds(directory / name, content):
                    (staged / name).parent.mkdir(parents=True, exist_ok=True)
                    _write_through(staged / name, content)
            # Others may read what is written, which a folder for temporary files does not allow.
            staged.chmod(0o755)
            _sync(staged)
            # From here on the new files are what there is.
            staged.rename(directory / _COMMITTED)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        _finish(directory)
    except OSError as error:
        raise CheckpointError(f"cannot write to {str(directory)!r}: {error.strerror or error}") from error


def find(directory: Path, name: str) -> Path | None:
    """The path of the file ``name`` of a directory that `write_all` wrote, itself or with others beside it,
    or None.
    """
    # Newest first: what was committed here, what was committed for several adapters above, what was moved.
    for path in (
        directory / _COMMITTED / name,
        directory.parent / _COMMITTED / directory.name / name,
        directory / name,
    ):
        if path.is_file():
            return path
    return None


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file has these bytes; one of another size is not read."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _write_through(path: Path, content: bytes) -> None:
    """Write a file, down to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Have a directory's entries on disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _finish(directory: Path) -> None:
    """Move what is committed to its place."""
    committed = directory / _COMMITTED
    if committed.is_dir():
        for path in sorted(path for path in committed.rglob("*") if not path.is_dir()):
            place = directory / path.relative_to(committed)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        shutil.rmtree(committed)
        _sync(directory)
