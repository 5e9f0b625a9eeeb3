"""The attention modules of a model and the modules that take its input: where adapters act that stand beside
no single layer.

Worked out from what a module's class does (which kernel it calls), its projections and its sizes; nothing is
run.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from grafts.modules.layers import Layer
from grafts.modules.patterns import owner_and_name
from grafts.sites.arguments import CallSignature, Kind
from grafts.sites.attention import real_config
from grafts.sites.attention_routes import route_of

SELF_ATTENTION, CROSS_ATTENTION, ENCODER_ATTENTION = (
    "self-attention",
    "cross-attention",
    "encoder self-attention",
)
INPUT, ENCODER_INPUT, DECODER_INPUT = "input", "encoder input", "decoder input"

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
_HEAD_DIM = (
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "head_size",
    "d_kv",
    "attention_head_dim",
    "dim_head",
)


def attending_modules(
    model: nn.Module, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer], roles: Mapping[str, str]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The modules whose attention kernel can be reached, described as layers, and their roles, by path.

    The sizes of such a layer are those of what it attends to: its input is what keys are projected from, its
    output the keys of all heads.
    """
    found, said = {}, {}
    children: dict[str, dict[str, Layer]] = defaultdict(dict)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for path, layer in layers.items():
        owner, name = owner_and_name(path)
        children[owner][roles[path]] = layer
        names[owner][roles[path]] = name
    for path, module in modules.items():
        if path in layers or route_of(type(module)) is None:  # type: ignore[arg-type]
            continue
        if getattr(module, "reorder_and_upcast_attn", False):
            continue  # it leaves out the kernel for one of its own
        below = [owner for owner in children if owner.startswith(f"{path}.") and "key" in children[owner]]
        own = children[path]
        if len(below) == 1 and not {"key", "key+value", "query+key+value"} & own.keys():
            own = {**own, **children[below[0]]}
        projection = next(
            (own[role] for role in ("key", "key+value", "query+key+value", "query") if role in own), None
        )
        latent = _latent(module)
        if projection is None and latent is None:
            continue
        projection = projection or next(iter(own.values()))
        heads = _said(module, _HEADS)
        head_dim = _said(module, _HEAD_DIM) or (projection.in_features // heads if heads else 0)
        width = _key_width(own, heads * head_dim) if latent is None else latent[0]
        if latent is not None:
            head_dim = latent[0] // heads
        found[path] = Layer(
            "attending",
            projection.in_features,
            width,
            projection.bias,
            type(module).__name__,
            heads=width // head_dim if head_dim and width % head_dim == 0 else 0,
            projections=_apart(module, names[path]),
            values=0 if latent is None else latent[1],
        )
        said[path] = _attention_role(model, path, module)
    return found, said


def _latent(module: nn.Module) -> tuple[int, int] | None:
    """The widths of all heads' keys and values where they differ: latent attention (DeepSeek-V2 2024, section
    2.1).
    """
    key, value, heads = (getattr(module, name, None) for name in ("qk_head_dim", "v_head_dim", "num_heads"))
    if not (isinstance(key, int) and isinstance(value, int)):
        return None
    heads = heads if isinstance(heads, int) else _said(module, _HEADS)
    return (heads * key, heads * value) if heads else None


def _apart(module: nn.Module, names: Mapping[str, str]) -> tuple[str, str] | None:
    """The names of the linears for keys and values of a module that does attention itself and norms its keys
    nowhere.
    """
    if route_of(type(module)) == "interface" or not {"key", "value"} <= set(names):  # type: ignore[arg-type]
        return None
    normed = any(
        re.search(r"(^|_)k(ey)?_?(norm|ln)|norm_?k(ey)?$", name) for name, _ in module.named_children()
    )
    return None if normed else (names["key"], names["value"])


def _key_width(own: Mapping[str, Layer], queries: int) -> int:
    """How wide the keys of all heads are, given the module's projections by role and the width of the
    queries.
    """
    if "key" in own:
        return own["key"].out_features
    if "key+value" in own:
        return own["key+value"].out_features // 2
    fused = own["query+key+value"].out_features
    return (fused if "query" in own else fused - (queries or fused // 3)) // 2


def _said(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first of the attributes ``names`` that the module, or its config, has as a number; 0 for none."""
    config = real_config(getattr(module, "config", None))
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _attention_role(model: nn.Module, path: str, module: nn.Module) -> str:
    if getattr(module, "is_cross_attention", False) or crosses(path):
        return CROSS_ATTENTION
    config = getattr(model, "config", None)
    both = bool(getattr(config, "is_encoder_decoder", False))
    return ENCODER_ATTENTION if both and "encoder" in path.split(".") else SELF_ATTENTION


def crosses(path: str) -> bool:
    """Whether the name of an attention module, or of what it stands in, says that it attends to an encoder.

    >>> crosses("decoder.layers.0.encoder_attn"), crosses("encoder.layers.0.self_attn")
    (True, False)
    """
    owner, _, last = path.rpartition(".")
    name = re.sub(r"[^a-z]", "", last.lower() + owner.rpartition(".")[2].lower())
    return any(word in name for word in ("cross", "encdec", "encoderattn"))


def input_modules(
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The modules that take the tokens' embeddings, described as layers, and their roles, by path.

    That is the base model of a `transformers` model, the encoder and the decoder where it has both, and any
    other model whose ``forward`` takes ``inputs_embeds``.
    """
    found, said = {}, {}
    for role, module in _input_modules(model):
        path = next((path for path, other in modules.items() if other is module), None)
        embedding = embedding_of(module)
        if path is None or embedding is None or not _takes_embeds(module):
            continue
        size = embedding.embedding_dim
        found[path] = Layer("input", size, size, False, type(module).__name__)
        said[path] = role
    return found, said


def _input_modules(model: nn.Module) -> list[tuple[str, Any]]:
    config = getattr(model, "config", None)
    if config is None:
        return [(INPUT, model)]
    base = getattr(model, "base_model", model)
    encoder, decoder = _ask(model, "get_encoder"), _ask(model, "get_decoder")
    if getattr(config, "is_encoder_decoder", False) and _takes_embeds(encoder):
        return [(ENCODER_INPUT, encoder), (DECODER_INPUT, decoder)]
    if (
        encoder is not None and encoder is not decoder and _takes_embeds(base)
    ):  # a tower beside it is no stack of its own
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        decoder = decoder if text is not config else None
    # where a model has a stack inside its base, its head may call that one
    within = [module for module in (decoder, getattr(base, "decoder", None)) if module in set(base.modules())]
    return [(INPUT, next((module for module in within if _takes_embeds(module)), base))]


def _takes_embeds(module: Any) -> bool:
    return isinstance(module, nn.Module) and CallSignature(type(module).forward).takes(Kind.EMBEDDINGS)


def _ask(model: nn.Module, getter: str) -> Any:
    return getattr(model, getter, lambda: None)()


def embedding_of(module: Any) -> nn.Embedding | None:
    """A module's token embedding."""
    if not isinstance(module, nn.Module):
        return None
    if hasattr(module, "get_input_embeddings"):
        named = named_embedding(module)
        return named if isinstance(named, nn.Embedding) else None
    return next((child for child in module.children() if isinstance(child, nn.Embedding)), None)


def named_embedding(model: nn.Module) -> nn.Module | None:
    """What a `transformers` model names as its input embedding; None where it names none."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        named = get() if callable(get) else None
    except NotImplementedError:  # models of several towers
        return None
    return named if isinstance(named, nn.Module) else None
