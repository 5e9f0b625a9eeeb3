"""A base and an adapter in one call, by the adapter's folder or repository."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from grafts.checkpoints import hub
from grafts.checkpoints import peft_format as peft
from grafts.checkpoints.load import read_checkpoint
from grafts.checkpoints.peft_format import Checkpoint
from grafts.errors import CheckpointError
from grafts.integrations import transformers_patches as integration
from grafts.integrations.transformers_init import init
from grafts.structure.interface import AdapterModelInterface

# The options of getting a base that say where it is, which its config needs too.
_FROM_HUB = ("revision", "token", "cache_dir", "local_files_only")
# The class of `transformers` for each task of an adapter.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def integrate() -> integration.Integration:
    """Let `transformers` open adapters with this library, whether or not `peft` is installed.

    From now on ``AutoModelFor....from_pretrained``, ``from_pretrained`` of a model class and ``pipeline``
    take the folder or repository of an adapter of any method: they load the base that it names and put the
    adapter on it, by the methods of `grafts.init`. So does ``load_adapter`` of every model.

    Returns:
        A handle, whose ``remove()`` switches that off again; it can be used in a ``with`` statement.
    """
    return integration.integrate(init)


def from_pretrained(
    adapter: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    base: str | os.PathLike[str] | None = None,
    model_class: Any = None,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    interface: AdapterModelInterface | None = None,
    **base_options: Any,
) -> nn.Module:
    """The base model that an adapter names, with the adapter on it, active, in evaluation mode.

    The class of the model comes from the adapter's ``task_type``, else from the class that the adapter was
    trained on, as far as `transformers` itself has it, else from what the base says. For classification the
    number of labels is that of the adapter's head.

    >>> model = grafts.from_pretrained("someone/an-adapter")  # doctest: +SKIP

    Args:
        adapter: a folder, or the id of a repository on the hub.
        adapter_name: what to call it.
        base: the base, where it is not to be the one that the adapter names.
        model_class: the model's class, where it is not to be worked out.
        is_trainable: make the adapter trainable.
        revision: of the adapter's repository; that of the base is in the adapter's config.
        token: for private and gated repositories.
        subfolder: where in the repository the adapter is.
        cache_dir: where files from the hub are kept.
        local_files_only: look only at what was downloaded before.
        allow_pickle: accept an ``adapter_model.bin``.
        interface: what the model's modules are.
        base_options: of the base's ``from_pretrained``: ``dtype``, ``device_map``, ``quantization_config``
            ...

    Returns:
        The model, with the methods of `grafts.init`.

    Raises:
        CheckpointError: the adapter cannot be had, names no base, or does not fit it.
    """
    # The adapter first: it says which base, of which class, with how many labels.
    where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = hub.fetch(adapter, revision=revision, subfolder=subfolder, **where)
    checkpoint = read_checkpoint(folder, allow_pickle=allow_pickle)
    config = checkpoint.config
    source = config.base_model_name_or_path if base is None else base
    if not source:
        raise CheckpointError(f"{os.fspath(adapter)!r} does not name its base model: give it with base=")
    options = {name: value for name, value in where.items() if value} | base_options
    # The revision is that of the base which the adapter names.
    if base is None and config.revision is not None:
        options.setdefault("revision", config.revision)
    labels = _labels(checkpoint)
    says_labels = not base_options.keys().isdisjoint({"num_labels", "id2label", "config"})
    if labels is not None and not says_labels:
        # A head for other labels is no use: the adapter has one of its own.
        options |= {"num_labels": labels, "ignore_mismatched_sizes": True}
    cls = model_class
    if cls is None:
        cls = _class_of(checkpoint, os.fspath(source), options)
    try:
        model = cls.from_pretrained(os.fspath(source), **options)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(
            f"the base {os.fspath(source)!r} of {os.fspath(adapter)!r} cannot be loaded: {first}"
        ) from error
    load: Any = init(model)
    load.load_adapter(
        folder,
        adapter_name,
        is_trainable=is_trainable,
        adapter_kwargs={"allow_pickle": allow_pickle},
        interface=interface,
    )
    return load  # type: ignore[no-any-return]


def _labels(checkpoint: Checkpoint) -> int | None:
    """How many labels the head of an adapter for classification tells apart; None without one."""
    config = checkpoint.config
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [*(config.modules_to_save or ()), "classifier", "score"]
    rows = []
    for name, tensor in checkpoint.tensors.items():
        path = name.removeprefix(peft.PREFIX).removeprefix("base_model.")
        is_in_head = path.split(".")[0] in heads
        if is_in_head and path.endswith(".weight") and tensor.dim() == 2:
            rows.append(tensor.shape[0])
    # A head of several linears ends with that of the labels, which are fewer than what it is made of.
    return min(rows, default=None)


def _class_of(checkpoint: Checkpoint, source: str, options: Mapping[str, Any]) -> Any:
    """The class that the base is to be of; only classes that `transformers` itself has are looked up by a
    name in a file.
    """
    transformers = importlib.import_module("transformers")
    config = checkpoint.config
    if config.task_type is not None:
        return getattr(transformers, AUTO_CLASSES[config.task_type])
    # The class that the adapter was trained on, then those that the base says it is of.
    names = [(config.auto_mapping or {}).get("base_model_class")]
    where = {name: options[name] for name in _FROM_HUB if name in options}
    try:
        names += transformers.AutoConfig.from_pretrained(source, **where).architectures or []
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the base {source!r} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    for name in names:
        cls = None
        if isinstance(name, str) and name.isidentifier():
            cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.AutoModel
