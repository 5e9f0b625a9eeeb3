"""Adapters on a hub: `fetch` gets one as a folder, `push` puts one there. Nothing else of this package opens
a connection.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from grafts.checkpoints import adapterhub_format as adapterhub
from grafts.checkpoints import peft_format as peft
from grafts.checkpoints.interface_file import INTERFACE_FILE
from grafts.checkpoints.model_card import About
from grafts.checkpoints.save import checkpoint_files
from grafts.errors import CheckpointError

_FILES = (
    peft.CONFIG_FILE,
    peft.TENSOR_FILE,
    peft.PICKLE_FILE,
    peft.CARD_FILE,
    INTERFACE_FILE,
    adapterhub.TENSOR_FILE,
    adapterhub.PICKLE_FILE,
    "head_config.json",
)


def fetch(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of an adapter: one on this machine, or that of a repository on the hub, all of one revision.

    >>> grafts.load(model, grafts.fetch("someone/an-adapter", revision="v1.0"))  # doctest: +SKIP

    Args:
        source: a folder, or the id of a repository.
        revision: a branch, tag or commit; the main branch if not given.
        token: for private and gated repositories; the one that ``hf auth login`` has stored if not given.
        subfolder: where in the folder or repository the adapter is.
        cache_dir: where files are kept; the cache of `huggingface_hub` if not given.
        local_files_only: look only at what is in the cache.
        force_download: get the files again.

    Raises:
        CheckpointError: there is no such folder, repository, revision or adapter, or it cannot be reached or
            read.
    """
    inside = Path(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise CheckpointError(f"subfolder={subfolder!r} must be a folder inside of {os.fspath(source)!r}")
    # A folder on this machine goes before a repository of the same name.
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser() / inside
    name = os.fspath(source)
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (an optional backend)
    except ImportError as error:
        raise CheckpointError(
            f"there is no folder {name!r}; to look on the hub: pip install huggingface_hub"
        ) from error
    try:
        root = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=[(inside / file).as_posix() for file in _FILES],
        )
    except Exception as error:
        raise CheckpointError(_reason(name, revision, error)) from error
    folder = Path(root) / inside
    if not (folder / peft.CONFIG_FILE).is_file():
        where = f" in {subfolder!r}" if subfolder else ""
        raise CheckpointError(f"the repository {name!r} holds no {peft.CONFIG_FILE}{where}, so no adapter")
    return folder


def _reason(name: str, revision: str | None, error: BaseException) -> str:
    """One sentence on why a repository could not be had.

    Args:
        name: the repository's.
        revision: what was asked for.
        error: what `huggingface_hub` raised; its classes are told by their names, which have changed their
            places.
    """
    error = _telling(error)
    kinds = _class_names(error)
    shown = str(error).strip().split("\n")[0][:200]
    sentences = {
        "GatedRepoError": (
            f"the repository {name!r} is gated: ask for access on its page, then give token= "
            "or run hf auth login"
        ),
        "RepositoryNotFoundError": (
            f"there is no folder and no repository {name!r} (a private one needs token= or hf auth login)"
        ),
        "RevisionNotFoundError": f"the repository {name!r} has no revision {revision!r}",
        "HFValidationError": (
            f"there is no folder {name!r}, and it cannot be the id of a repository ({shown})"
        ),
    }
    not_reached = (
        f"there is no folder {name!r}, the cache does not hold the repository, "
        f"and the hub was not reached ({shown})"
    )
    sentences |= dict.fromkeys(("LocalEntryNotFoundError", "OfflineModeIsEnabled"), not_reached)
    # The first that fits: a gated repository is also one that was not found.
    for kind, sentence in sentences.items():
        if kind in kinds:
            return sentence
    if any("Timeout" in kind for kind in kinds):
        return (
            f"the hub did not answer in time for {name!r}: try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more "
            "seconds"
        )
    return f"the repository {name!r} could not be read: {type(error).__name__}: {shown}"


def _telling(error: BaseException) -> BaseException:
    """Of an error and what caused it the one that says why; `huggingface_hub` ends many calls with an error
    that only says that the cache does not help.
    """
    cause = error.__cause__
    if cause is None:
        return error
    shown = " ".join(_class_names(cause))
    if any(word in shown for word in ("RevisionNotFound", "Timeout", "Validation")):
        return cause
    return error


def _class_names(error: BaseException) -> set[str]:
    """The names of an error's class and of those that it inherits from."""
    return {kind.__name__ for kind in type(error).__mro__}


def push(
    model: nn.Module,
    name: str,
    repo_id: str,
    *,
    about: About | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put an adapter into a repository on the hub, in one commit, with a model card.

    Args:
        model: the model that carries the adapter.
        name: which adapter.
        repo_id: the repository; made if needed.
        about: what the card is to say besides method, base and options.
        revision: the branch; made if needed.
        token: the one that ``hf auth login`` has stored if not given.
        subfolder: where in the repository.
        private: whether a new repository is.
        commit_message: "Upload adapter NAME" if not given.
        commit_description: more words.
        create_pr: ask for the change instead of making it.

    Returns:
        The address of the commit.

    Raises:
        AdapterNameError: there is no such adapter.
        CheckpointError: the hub refuses, or cannot be reached.
    """
    files = checkpoint_files(model, name, about=about)
    return upload(
        files,
        repo_id,
        revision=revision,
        token=token,
        subfolder=subfolder,
        private=private,
        create_pr=create_pr,
        commit={
            "commit_message": commit_message or f"Upload adapter {name}",
            "commit_description": commit_description,
        },
    )


def upload(
    files: dict[str, bytes],
    repo_id: str,
    *,
    revision: str | None,
    token: str | bool | None,
    subfolder: str | None,
    private: bool | None,
    create_pr: bool,
    commit: dict[str, Any],
) -> str:
    """Put files into a repository in one commit.

    Args:
        files: what to put there, by path below the subfolder.
        repo_id: and what follows, as `push` has it.
        revision: the branch.
        token: for the hub.
        subfolder: where in the repository.
        private: whether a new repository is.
        create_pr: ask for the change.
        commit: the message and description of the commit, as `huggingface_hub` calls them.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415 (an optional backend)
    except ImportError as error:
        raise CheckpointError("to reach the hub: pip install huggingface_hub") from error
    api = HfApi(token=token, library_name="grafts")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # A pull request is a branch that is there already.
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = []
        for file, data in files.items():
            operations.append(
                CommitOperationAdd(
                    path_in_repo=(Path(subfolder or "") / file).as_posix(), path_or_fileobj=data
                )
            )
        info = api.create_commit(repo_id, operations, revision=revision, create_pr=create_pr, **commit)
    except Exception as error:
        raise CheckpointError(
            f"the adapter could not be put into {repo_id!r}: {_first_line(error)}"
        ) from error
    return str(info.commit_url)


def _first_line(error: BaseException) -> str:
    """An error in one line: its class, and at most 200 characters of what it says."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {first[:200]}"
