"""What each layer of a model is there for: the words for it, and how it is told from the model's modules.

Roles are read off the module tree: which linears are siblings, how their names divide into words, which sizes
they have, and what a `transformers` model says about its own head. There is no list of model types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from grafts.errors import ConfigError, did_you_mean
from grafts.modules.layers import Layer
from grafts.modules.patterns import owner_and_name, within

QUERY, KEY, VALUE, KEY_VALUE, FUSED = "query", "key", "value", "key+value", "query+key+value"
ATTENTION_OUT, HEAD, ROUTER, EMBEDDING, LINEAR = "attention out", "head", "router", "embedding", "linear"
CONVOLUTION, ATTENTION = "convolution", "attention"
FFN_IN, FFN_GATE, FFN_OUT = "ffn in", "ffn gate", "ffn out"

# The words in a linear's name that say which projection of attention it is.
_PROJECTION_WORDS = {
    QUERY: {"q", "wq", "query", "queries"},
    KEY: {"k", "wk", "key", "keys"},
    VALUE: {"v", "wv", "value", "values", "val"},
    KEY_VALUE: {"kv", "wkv"},
    FUSED: {"qkv", "wqkv"},
}
# Names of fused projections in which no such word stands (GPT-2, OLMo, MPT, `nn.MultiheadAttention`,
# Baichuan).
_FUSED_NAMES = {"c_attn", "att_proj", "attn_proj", "in_proj", "W_pack"}
# Names that a mixture of experts gives its router; elsewhere ``gate`` is a gate of the feed-forward.
_ROUTER_NAMES = {"gate", "router", "wg", "gating", "shared_expert_gate"}

# What a config's ``target_roles`` may say -> the roles that it stands for.
_SHORT_NAMES = {
    "q": {QUERY, FUSED},
    "k": {KEY, KEY_VALUE, FUSED},
    "v": {VALUE, KEY_VALUE, FUSED},
    "qkv": {FUSED},
    "o": {ATTENTION_OUT},
    "intermediate": {FFN_IN},
    "gate": {FFN_GATE},
    "output": {FFN_OUT},
    "embedding": {EMBEDDING},
    "head": {HEAD},
}


def roles_named(name: str) -> frozenset[str]:
    """The roles that a short name of ``target_roles`` stands for.

    >>> sorted(roles_named("v"))
    ['key+value', 'query+key+value', 'value']

    Raises:
        ConfigError: there is no such name.
    """
    if name not in _SHORT_NAMES:
        raise ConfigError(f"target_roles names {name!r}; {did_you_mean(name, _SHORT_NAMES)}")
    return frozenset(_SHORT_NAMES[name])


def layer_roles(
    layers: Mapping[str, Layer], modules: Mapping[str, nn.Module], heads: tuple[str, ...]
) -> dict[str, str]:
    """What each layer is there for.

    Args:
        layers: the layers of the model by path.
        modules: all modules of the model by path.
        heads: paths of the modules that make the model's output from its hidden states.

    Returns:
        One of the words above for each layer, by path.
    """
    in_attention = _attention_roles(layers)
    roles = {}
    for path, layer in layers.items():
        if within(path, heads):
            roles[path] = HEAD
        elif path in in_attention:
            roles[path] = in_attention[path]
        else:
            roles[path] = _role_outside_attention(path, layer, modules)
    return roles


def head_paths(
    model: nn.Module, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]
) -> tuple[str, ...]:
    """Paths of the modules that make the model's output from its hidden states.

    A `transformers` model names its output embeddings; where it has none, everything with parameters outside
    its base model is head (a classifier). Elsewhere it is a linear outside the repeated layers that has the
    shape of the token embedding.
    """
    output_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(output_embeddings):
        named = output_embeddings()
        if named is not None:
            return tuple(path for path, module in modules.items() if module is named)
    base = getattr(model, "base_model", model)
    if isinstance(base, nn.Module) and base is not model:
        return _children_with_parameters(modules, apart_from=base)
    return _linears_undoing_embeddings(layers)


def _linears_undoing_embeddings(layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """Paths of the linears outside the repeated layers that have the shape of an embedding of the model."""
    vocabularies = set()
    for layer in layers.values():
        if layer.kind == "embedding":
            vocabularies.add((layer.in_features, layer.out_features))
    heads = []
    for path, layer in layers.items():
        undoes_embedding = layer.is_linear and (layer.out_features, layer.in_features) in vocabularies
        in_repeated_layer = re.search(r"(^|\.)\d+\.", path) is not None
        if undoes_embedding and not in_repeated_layer:
            heads.append(path)
    return tuple(heads)


def _children_with_parameters(modules: Mapping[str, nn.Module], apart_from: nn.Module) -> tuple[str, ...]:
    """The direct children of the model that hold parameters, without one of them."""
    paths = []
    for path, module in modules.items():
        is_child = path != "" and "." not in path
        if is_child and module is not apart_from and next(module.parameters(), None) is not None:
            paths.append(path)
    return tuple(paths)


def loses_rows(path: str, layer_kind: str) -> bool:
    """Whether the first dimension of a module's input is known not to be the batch.

    Experts get the tokens of all rows together; an embedding inside attention looks up distances, not tokens.

    >>> loses_rows("layers.0.mlp.experts.3.w1", "linear"), loses_rows("layers.0.mlp.w1", "linear")
    (True, False)
    """
    steps = path.lower().split(".")
    if "experts" in steps:
        return True
    return layer_kind == "embedding" and any("att" in step for step in steps)


def _words(name: str) -> set[str]:
    """The words of a module's name: ``q_proj`` -> q, proj; ``queryProj`` -> query, proj; ``Wqkv`` -> wqkv."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _projection_named(name: str) -> str | None:
    """Which projection of attention a linear's name speaks of; None for none."""
    words = _words(name)
    named = []
    for role, known in _PROJECTION_WORDS.items():
        if words & known:
            named.append(role)
    # ``q_k_v_proj`` names all three, ``k_v_proj`` two.
    if {QUERY, KEY, VALUE} <= set(named) or FUSED in named or name in _FUSED_NAMES:
        return FUSED
    if {KEY, VALUE} <= set(named) or KEY_VALUE in named:
        return KEY_VALUE
    if named:
        return named[0]
    return None


def _attention_roles(layers: Mapping[str, Layer]) -> dict[str, str]:
    """The roles of linears in attention: siblings that project queries and values, or one fused linear."""
    siblings = _linears_by_owner(layers)
    roles = {}
    for owner, paths in siblings.items():
        projections = _projections_among(owner, paths, layers)
        if not _make_attention(set(projections.values())):
            continue
        for name, role in projections.items():
            roles[paths[name]] = role
        # BERT keeps the projections in ``attention.self`` and what they come to in ``attention.output``.
        candidates = paths
        if owner.endswith(".self"):
            candidates = siblings.get(f"{owner.rpartition('.')[0]}.output", {})
        for path in _ways_out(candidates, paths, projections, layers):
            roles[path] = ATTENTION_OUT
    return roles


def _linears_by_owner(layers: Mapping[str, Layer]) -> dict[str, dict[str, str]]:
    """The linears that are children of each module: its path -> their names -> their paths."""
    siblings: dict[str, dict[str, str]] = {}
    for path, layer in layers.items():
        if layer.is_linear:
            owner, name = owner_and_name(path)
            siblings.setdefault(owner, {})[name] = path
    return siblings


def _make_attention(projections: set[str]) -> bool:
    """Whether siblings with these roles are the projections of attention: queries and values, or one for
    all.
    """
    if FUSED in projections:
        return True
    return QUERY in projections and (VALUE in projections or KEY_VALUE in projections)


def _projections_among(owner: str, paths: Mapping[str, str], layers: Mapping[str, Layer]) -> dict[str, str]:
    """Which of a module's linears are projections of attention, by name.

    Args:
        owner: the module's path.
        paths: the paths of its linears by name.
        layers: all layers by path.
    """
    projections = {}
    for name, path in paths.items():
        role = _projection_named(name)
        if role is None:
            continue
        if role != FUSED or _is_fused_projection(owner, name, layers[path]):
            projections[name] = role
    return projections


def _is_fused_projection(owner: str, name: str, layer: Layer) -> bool:
    """Whether a linear that is called like a fused projection of attention is one.

    ``in_proj`` and the like are names of other things too: a fused projection makes more of its input, and
    stands in what is called attention unless its name says q, k and v.
    """
    in_attention = "att" in owner.lower()
    says_so = bool(_words(name) & (_PROJECTION_WORDS[FUSED] | _PROJECTION_WORDS[QUERY]))
    widens = layer.out_features > layer.in_features
    return widens and (in_attention or says_so)


def _ways_out(
    candidates: Mapping[str, str],
    paths: Mapping[str, str],
    projections: Mapping[str, str],
    layers: Mapping[str, Layer],
) -> list[str]:
    """The linears that what attention gives goes through, of those beside its projections.

    Where one module holds attention and feed-forward, the way out of attention is what undoes the queries'
    sizes.

    Args:
        candidates: paths by name, the projections possibly among them.
        paths: paths by name of the linears where the projections are.
        projections: which of those are projections.
        layers: all layers by path.
    """
    queries = [layers[paths[name]] for name, role in projections.items() if role == QUERY]
    undone = {(query.out_features, query.in_features) for query in queries}
    rest = [path for name, path in candidates.items() if name not in projections]
    undoing = [path for path in rest if (layers[path].in_features, layers[path].out_features) in undone]
    return undoing or rest


def _role_outside_attention(path: str, layer: Layer, modules: Mapping[str, nn.Module]) -> str:
    """What a layer is there for that is neither head nor in attention."""
    if layer.kind == "embedding":
        return EMBEDDING
    if layer.kind == "convolution":
        return CONVOLUTION
    if not layer.is_linear:
        return ATTENTION
    if _is_router(path, modules):
        return ROUTER
    in_repeated_layer = re.search(r"(^|\.)\d+(\.|$)", path) is not None
    if not in_repeated_layer:
        return LINEAR
    return _feed_forward_role(path, layer)


def _feed_forward_role(path: str, layer: Layer) -> str:
    """What a linear of a repeated layer is there for: told by its name, else by whether it widens or
    narrows.
    """
    if "gate" in _words(path.rpartition(".")[2]):
        return FFN_GATE
    if layer.out_features > layer.in_features:
        return FFN_IN
    if layer.out_features < layer.in_features:
        return FFN_OUT
    return LINEAR


def _is_router(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a linear chooses among experts: it says so, or stands beside them under one of the usual
    names.
    """
    if "router" in path.split("."):
        return True
    owner, _, name = path.rpartition(".")
    return name in _ROUTER_NAMES and _has_experts(modules[owner])


def _has_experts(module: nn.Module) -> bool:
    """Whether a child of a module is called after experts."""
    return any("expert" in name.lower() for name, _ in module.named_children())
