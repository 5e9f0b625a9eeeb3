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

# The names that modules and configs give to how many heads there are, and to how wide a head is.
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
# The projections that say how wide keys are, the surest first.
_WITH_KEYS = ("key", "key+value", "query+key+value")


def attending_modules(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    layers: Mapping[str, Layer],
    roles: Mapping[str, str],
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The modules whose attention kernel can be reached, described as layers, and their roles, by path.

    The sizes of such a layer are those of what it attends to: its input is what keys are projected from, its
    output the keys of all heads.

    Args:
        model: the model.
        modules: all its modules by path.
        layers: its layers by path, without attending modules.
        roles: what those layers are there for, by path.
    """
    projections: dict[str, dict[str, Layer]] = defaultdict(dict)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    for path, layer in layers.items():
        owner, name = owner_and_name(path)
        projections[owner][roles[path]] = layer
        names[owner][roles[path]] = name

    attending, attention_roles = {}, {}
    for path, module in modules.items():
        if path in layers or route_of(type(module)) is None:
            continue
        # Such a module (GPT-2 in half precision) leaves out the kernel for one of its own.
        if getattr(module, "reorder_and_upcast_attn", False):
            continue
        as_layer = _as_layer(module, _projections_of(path, projections), names[path])
        if as_layer is not None:
            attending[path] = as_layer
            attention_roles[path] = _attention_role(model, path, module)
    return attending, attention_roles


def _projections_of(path: str, projections: Mapping[str, dict[str, Layer]]) -> dict[str, Layer]:
    """The layers at an attention module by role; where it has no keys, those of the only module below that
    has.
    """
    found_in_module = dict(projections.get(path, {}))
    with_keys = []
    for owner in projections:
        if owner.startswith(f"{path}.") and "key" in projections[owner]:
            with_keys.append(owner)
    if len(with_keys) == 1 and not any(role in found_in_module for role in _WITH_KEYS):
        found_in_module.update(projections[with_keys[0]])
    return found_in_module


def _as_layer(module: nn.Module, projections: Mapping[str, Layer], names: Mapping[str, str]) -> Layer | None:
    """An attention module as a layer; None where its sizes cannot be told.

    Args:
        module: the module.
        projections: its projections by role.
        names: their names in it by role.
    """
    latent = _latent_widths(module)
    # What reads the input: the projection with keys, where there is one.
    known = [projections[role] for role in (*_WITH_KEYS, "query") if role in projections]
    if not known and latent is None:
        return None
    projection = next(iter(known or projections.values()))

    heads = _number_at(module, _HEADS)
    if latent is not None:
        key_width, value_width = latent
        head_dim = key_width // heads
    else:
        head_dim = _number_at(module, _HEAD_DIM)
        if head_dim == 0 and heads > 0:
            head_dim = projection.in_features // heads
        key_width = _key_width(projections, heads * head_dim)
        value_width = 0
    key_heads = 0
    if head_dim > 0 and key_width % head_dim == 0:
        key_heads = key_width // head_dim
    return Layer(
        "attending",
        projection.in_features,
        key_width,
        projection.bias,
        type(module).__name__,
        heads=key_heads,
        projections=_plain_projections(module, names),
        values=value_width,
    )


def _latent_widths(module: nn.Module) -> tuple[int, int] | None:
    """The widths of all heads' keys and values where they differ: latent attention (DeepSeek-V2 2024, section
    2.1).
    """
    key = getattr(module, "qk_head_dim", None)
    value = getattr(module, "v_head_dim", None)
    if not isinstance(key, int) or not isinstance(value, int):
        return None
    heads = getattr(module, "num_heads", None)
    if not isinstance(heads, int):
        heads = _number_at(module, _HEADS)
    if heads == 0:
        return None
    return heads * key, heads * value


def _plain_projections(module: nn.Module, names: Mapping[str, str]) -> tuple[str, str] | None:
    """The names of the linears for keys and values of a module that does attention itself and norms no keys.

    Of a module that fetches its kernel from `transformers` they are not needed: it can be run over a prompt.
    """
    if route_of(type(module)) == "interface" or "key" not in names or "value" not in names:
        return None
    for name, _ in module.named_children():
        if re.search(r"(^|_)k(ey)?_?(norm|ln)|norm_?k(ey)?$", name):
            return None
    return names["key"], names["value"]


def _key_width(projections: Mapping[str, Layer], query_width: int) -> int:
    """How wide the keys of all heads are.

    Args:
        projections: the module's projections by role.
        query_width: how wide the queries of all heads are; 0 where that is not known.
    """
    if "key" in projections:
        return projections["key"].out_features
    if "key+value" in projections:
        return projections["key+value"].out_features // 2
    fused = projections["query+key+value"].out_features
    if "query" in projections:  # it holds keys and values only
        return fused // 2
    # Queries may be wider than keys (fewer heads of keys); where that is not known all three are taken for
    # alike.
    return (fused - (query_width or fused // 3)) // 2


def _number_at(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first of the attributes that the module, or else its config, has as a positive number; 0 for
    none.
    """
    config = real_config(getattr(module, "config", None))
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _attention_role(model: nn.Module, path: str, module: nn.Module) -> str:
    """Whether an attention module attends to its own input, and in which stack."""
    if getattr(module, "is_cross_attention", False) or crosses(path):
        return CROSS_ATTENTION
    config = getattr(model, "config", None)
    has_both = bool(getattr(config, "is_encoder_decoder", False))
    if has_both and "encoder" in path.split("."):
        return ENCODER_ATTENTION
    return SELF_ATTENTION


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
    inputs, roles = {}, {}
    for role, module in _input_candidates(model):
        embedding = embedding_of(module)
        if embedding is None or not _takes_embeddings(module):
            continue
        for path, other in modules.items():
            if other is module:
                size = embedding.embedding_dim
                inputs[path] = Layer("input", size, size, False, type(module).__name__)
                roles[path] = role
                break
    return inputs, roles


def _input_candidates(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that may take the embeddings, each with its role."""
    config = getattr(model, "config", None)
    if config is None:
        return [(INPUT, model)]
    base = getattr(model, "base_model", model)
    encoder, decoder = _ask(model, "get_encoder"), _ask(model, "get_decoder")
    if getattr(config, "is_encoder_decoder", False) and _takes_embeddings(encoder):
        return [(ENCODER_INPUT, encoder), (DECODER_INPUT, decoder)]

    # The encoder may be a tower for images or sound. Where the text has no config of its own, the base is the
    # stack.
    has_tower = encoder is not None and encoder is not decoder
    if has_tower and _takes_embeddings(base) and not _has_text_config(config):
        decoder = None
    # Where a model has a stack inside its base (OPT), its head may call that one and not the base.
    inside = set(base.modules())
    for module in (decoder, getattr(base, "decoder", None)):
        if module in inside and _takes_embeddings(module):
            return [(INPUT, module)]
    return [(INPUT, base)]


def _has_text_config(config: Any) -> bool:
    """Whether a model's config has another one in it for its text."""
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def _takes_embeddings(module: Any) -> bool:
    """Whether something is a module that can be called with embeddings in place of token ids."""
    return isinstance(module, nn.Module) and CallSignature(type(module).forward).takes(Kind.EMBEDDINGS)


def _ask(model: nn.Module, getter: str) -> Any:
    """What a getter of the model gives; None where it has no such getter."""
    get = getattr(model, getter, None)
    if get is None:
        return None
    return get()


def embedding_of(module: Any) -> nn.Embedding | None:
    """A module's token embedding: the one that it names, else the first among its children.

    Args:
        module: anything; None for what is no module, or has no embedding.
    """
    if not isinstance(module, nn.Module):
        return None
    if hasattr(module, "get_input_embeddings"):
        named = named_embedding(module)
        if isinstance(named, nn.Embedding):
            return named
        return None
    for child in module.children():
        if isinstance(child, nn.Embedding):
            return child
    return None


def named_embedding(model: nn.Module) -> nn.Module | None:
    """What a `transformers` model names as its input embedding; None where it names none."""
    get = getattr(model, "get_input_embeddings", None)
    if not callable(get):
        return None
    try:
        named = get()
    except NotImplementedError:  # models of several towers name none
        return None
    if isinstance(named, nn.Module):
        return named
    return None
