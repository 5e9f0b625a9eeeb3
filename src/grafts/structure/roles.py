"""What each layer of a model is there for, worked out from how the model is built.

Roles are read off the module tree: which linears are siblings, how their names divide into words, which sizes
they have, and what a `transformers` model says about its own head. No list of model types.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from grafts.errors import ConfigError, did_you_mean
from grafts.modules.layers import Layer, describe, only_read
from grafts.modules.patterns import collapsed, join, owner_and_name, within
from grafts.modules.tree import base_modules
from grafts.structure.attention_modules import attending_modules, input_modules, named_embedding

QUERY, KEY, VALUE, KEY_VALUE, FUSED = "query", "key", "value", "key+value", "query+key+value"
ATTENTION_OUT, HEAD, ROUTER, EMBEDDING, LINEAR = "attention out", "head", "router", "embedding", "linear"
CONVOLUTION, ATTENTION = "convolution", "attention"
FFN_IN, FFN_GATE, FFN_OUT = "ffn in", "ffn gate", "ffn out"

_WORDS = {
    QUERY: {"q", "wq", "query", "queries"},
    KEY: {"k", "wk", "key", "keys"},
    VALUE: {"v", "wv", "value", "values", "val"},
    KEY_VALUE: {"kv", "wkv"},
    FUSED: {"qkv", "wqkv"},
}
_FUSED_NAMES = {"c_attn", "att_proj", "attn_proj", "in_proj", "W_pack"}
_ROUTER_NAMES = {"gate", "router", "wg", "gating", "shared_expert_gate"}


_NAMED = {
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
    """The roles that a short name stands for.

    >>> sorted(roles_named("v"))
    ['key+value', 'query+key+value', 'value']

    Raises:
        ConfigError: there is no such name.
    """
    if name not in _NAMED:
        raise ConfigError(f"target_roles names {name!r}; {did_you_mean(name, _NAMED)}")
    return frozenset(_NAMED[name])


@dataclass(frozen=True)
class ModelView:
    """A base model as adapters see it; paths are those of `nn.Module.named_modules`, without adapters' own.

    Attributes:
        name: the model's class.
        modules: every module by path.
        layers: every module that an adapter can stand at, by path.
        heads: paths of the modules that make the output from the hidden states.
        roles: what each layer is there for, by path.
        input_embedding: the path of the embedding that the model says its tokens go through, or None.
    """

    name: str
    modules: Mapping[str, nn.Module]
    layers: Mapping[str, Layer]
    heads: tuple[str, ...]
    roles: Mapping[str, str]
    input_embedding: str | None

    @property
    def base(self) -> str:
        """The path of the base model, as `transformers` says; ``""`` where the model is its own."""
        model = self.modules[""]
        base = getattr(model, "base_model", model)
        return next((path for path, module in self.modules.items() if module is base), "")

    def candidates(self, kinds: Collection[str]) -> str:
        """The layers of these kinds as a list for messages, repeated ones once."""
        counts = Counter(collapsed(path) for path, layer in self.layers.items() if layer.kind in kinds)
        return ", ".join(f"{path!r} ({count})" for path, count in counts.items()) or "none"


def look_at(model: nn.Module) -> ModelView:
    """Look at how ``model`` is built; nothing is run."""
    modules = dict(base_modules(model))
    layers = {path: layer for path, module in modules.items() if (layer := describe(module)) is not None}
    for path, module in modules.items():
        if any(join(path, name) in layers for name in module._modules):
            for name in only_read(type(module)):  # type: ignore[arg-type]
                layers.pop(join(path, name), None)  # beside what is never called nothing would act
    heads = _heads(model, modules, layers)
    attention = _attention_roles(layers)
    roles = {
        path: HEAD if within(path, heads) else attention.get(path) or _other_role(path, layer, modules)
        for path, layer in layers.items()
    }
    embedding = _input_embedding(model, layers, modules)
    for more, said in (attending_modules(model, modules, layers, roles), input_modules(model, modules)):
        layers |= more
        roles |= said
    return ModelView(type(model).__name__, modules, layers, heads, roles, embedding)


def with_roles(view: ModelView, roles: Mapping[str, str]) -> ModelView:
    """``view`` with what is known of its modules from elsewhere; attention may be recognised by that."""
    roles = {
        **view.roles,
        **{path: role for path, role in roles.items() if view.roles.get(path) not in (HEAD, ROUTER)},
    }
    layers = {path: layer for path, layer in view.layers.items() if layer.kind != "attending"}
    more, said = attending_modules(view.modules[""], view.modules, layers, roles)
    attending = {path: role for path, role in said.items() if path not in roles}
    return replace(view, layers={**view.layers, **more}, roles={**roles, **attending})


def _input_embedding(
    model: nn.Module, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module]
) -> str | None:
    """What a `transformers` model says, else the only embedding that there is."""
    named = named_embedding(model)
    embeddings = [path for path, layer in layers.items() if layer.kind == "embedding"]
    if named is None:
        return embeddings[0] if len(embeddings) == 1 else None
    return next((path for path in embeddings if modules[path] is named), None)


def _heads(
    model: nn.Module, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]
) -> tuple[str, ...]:
    """Paths of the modules that make the model's output from its hidden states.

    A `transformers` model names its output embeddings; where it has none, everything with parameters outside
    its base model is head (a classifier). Elsewhere a linear outside the repeated layers that has the shape
    of the token embedding.
    """
    output_embeddings = getattr(model, "get_output_embeddings", None)
    named = output_embeddings() if callable(output_embeddings) else None
    if named is not None:
        return tuple(path for path, module in modules.items() if module is named)
    base = getattr(model, "base_model", model)
    if isinstance(base, nn.Module) and base is not model:
        children = [(path, child) for path, child in modules.items() if path and "." not in path]
        return tuple(
            path
            for path, child in children
            if child is not base and next(child.parameters(), None) is not None
        )
    vocabularies = {(x.in_features, x.out_features) for x in layers.values() if x.kind == "embedding"}
    return tuple(
        path
        for path, layer in layers.items()
        if layer.is_linear
        and (layer.out_features, layer.in_features) in vocabularies
        and not re.search(r"(^|\.)\d+\.", path)
    )


def loses_rows(path: str, layer_kind: str) -> bool:
    """Whether the first dimension of a module's input is known not to be the batch.

    Experts get the tokens of all rows together; an embedding inside attention looks up distances, not tokens.

    >>> loses_rows("layers.0.mlp.experts.3.w1", "linear"), loses_rows("layers.0.mlp.w1", "linear")
    (True, False)
    """
    steps = path.lower().split(".")
    return "experts" in steps or (layer_kind == "embedding" and any("att" in step for step in steps))


def _words(name: str) -> set[str]:
    """The words of a module's name: ``q_proj`` -> q, proj; ``queryProj`` -> query, proj; ``Wqkv`` -> wqkv."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _projection(name: str) -> str | None:
    """Which projection of attention a linear's name speaks of; None for none."""
    words = _words(name)
    said = [role for role, known in _WORDS.items() if words & known]
    if {QUERY, KEY, VALUE} <= set(said) or FUSED in said or name in _FUSED_NAMES:
        return FUSED
    if {KEY, VALUE} <= set(said) or KEY_VALUE in said:
        return KEY_VALUE
    return said[0] if said else None


def _attention_roles(layers: Mapping[str, Layer]) -> dict[str, str]:
    """The roles of linears that stand in attention: siblings that project queries and values, or one fused
    linear.
    """
    siblings: dict[str, dict[str, str]] = defaultdict(dict)
    for path, layer in layers.items():
        if layer.is_linear:
            parent, name = owner_and_name(path)
            siblings[parent][name] = path
    result = {}
    for parent, children in siblings.items():
        said = {name: role for name in children if (role := _projection(name)) is not None}
        for name in [n for n, role in said.items() if role == FUSED]:
            layer = layers[children[name]]
            in_attention = "att" in parent.lower() or _words(name) & (_WORDS[FUSED] | _WORDS[QUERY])
            if layer.out_features <= layer.in_features or not in_attention:
                del said[name]
        split = QUERY in said.values() and ({VALUE, KEY_VALUE} & set(said.values()))
        if not split and FUSED not in said.values():
            continue
        result.update({children[name]: role for name, role in said.items()})
        outputs = (
            siblings.get(f"{parent.rpartition('.')[0]}.output", {}) if parent.endswith(".self") else children
        )
        rest = {name: path for name, path in outputs.items() if name not in said}
        queries = [layers[children[name]] for name, role in said.items() if role == QUERY]
        back = {
            name: path
            for name, path in rest.items()
            if any(
                (layers[path].in_features, layers[path].out_features) == (q.out_features, q.in_features)
                for q in queries
            )
        }
        # where one module holds attention and feed-forward, the way out of attention is what undoes the
        # queries' sizes
        result.update(dict.fromkeys((back or rest).values(), ATTENTION_OUT))
    return result


def _other_role(path: str, layer: Layer, modules: Mapping[str, nn.Module]) -> str:
    if not layer.is_linear:
        return {"embedding": EMBEDDING, "convolution": CONVOLUTION}.get(layer.kind, ATTENTION)
    parent, _, name = path.rpartition(".")
    if "router" in path.split(".") or (name in _ROUTER_NAMES and _has_experts(modules[parent])):
        return ROUTER
    if not re.search(r"(^|\.)\d+(\.|$)", path):
        return LINEAR
    if "gate" in _words(name):
        return FFN_GATE
    if layer.out_features > layer.in_features:
        return FFN_IN
    return FFN_OUT if layer.out_features < layer.in_features else LINEAR


def _has_experts(module: nn.Module) -> bool:
    return any("expert" in name.lower() for name, _ in module.named_children())
