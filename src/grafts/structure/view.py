"""`ModelView`: one look at a base model, which planning, saving, loading and merging share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from grafts.errors import InterfaceError
from grafts.modules.layers import Layer, describe, only_read
from grafts.modules.patterns import collapsed, join
from grafts.modules.tree import base_modules, base_parameters
from grafts.structure.attention_modules import attending_modules, input_modules, named_embedding
from grafts.structure.interface import AdapterModelInterface
from grafts.structure.residual_stream import ResidualStream
from grafts.structure.roles import HEAD, ROUTER, head_paths, layer_roles


@dataclass(frozen=True)
class ModelView:
    """A base model as adapters see it; paths are those of `nn.Module.named_modules`, without adapters' own.

    Attributes:
        name: the model's class.
        modules: every module by path, the model itself under ``""``.
        layers: every module that an adapter can stand at, by path.
        heads: paths of the modules that make the output from the hidden states.
        roles: what each layer is there for, by path (the words of `grafts.structure.roles`).
        input_embedding: the path of the embedding that the model says its tokens go through, or None.
        interface: what says where the layers, attention and the residual stream are; None where nobody has
            said it and it was not worked out.
        stream: the residual stream, as the interface says it; None without an interface.
    """

    name: str
    modules: Mapping[str, nn.Module]
    layers: Mapping[str, Layer]
    heads: tuple[str, ...]
    roles: Mapping[str, str]
    input_embedding: str | None
    interface: AdapterModelInterface | None = None
    stream: ResidualStream | None = None

    @property
    def model(self) -> nn.Module:
        """The model that was looked at: the same object, to be read or changed by those who may."""
        return self.modules[""]

    @cached_property
    def base(self) -> str:
        """The path of the base model, that is a `transformers` model without its head; ``""`` where the model
        is its own base.
        """
        base = getattr(self.model, "base_model", self.model)
        for path, module in self.modules.items():
            if module is base:
                return path
        return ""

    @cached_property
    def order(self) -> Mapping[str, int]:
        """The place of each module in the model's order, by path: 0 for the model itself, its children behind
        it.
        """
        return {path: index for index, path in enumerate(self.modules)}

    @cached_property
    def parameter_count(self) -> int:
        """How many parameters the base holds, without those of adapters; one that stands under several names
        is counted once.
        """
        return sum(parameter.numel() for parameter in set(base_parameters(self.model).values()))

    def candidates(self, kinds: Collection[str]) -> str:
        """The layers of these kinds as a list for messages, those of repeated layers once with their count.

        Args:
            kinds: of layers that a method can stand beside.
        """
        counts = Counter(collapsed(path) for path, layer in self.layers.items() if layer.kind in kinds)
        return ", ".join(f"{path!r} ({count})" for path, count in counts.items()) or "none"

    def through(self, interface: AdapterModelInterface) -> ModelView:
        """The view of the same model with what an interface says of it.

        The interface's roles take the place of those that were told by names, but for heads and routers;
        attention may be recognised by them that was not before.

        Raises:
            InterfaceError: it is none, or does not fit the model.
        """
        if not isinstance(interface, AdapterModelInterface):
            raise InterfaceError(
                f"interface is a {type(interface).__name__}; it must be an AdapterModelInterface"
            )
        stream = interface.resolve(self)

        roles = dict(self.roles)
        for path, role in stream.roles.items():
            if roles.get(path) not in (HEAD, ROUTER):
                roles[path] = role

        # Attention is described anew by its projections, which the interface may have named.
        plain = {path: layer for path, layer in self.layers.items() if layer.kind != "attending"}
        attending, attention_roles = attending_modules(self.model, self.modules, plain, roles)
        for path, role in attention_roles.items():
            roles.setdefault(path, role)
        return replace(
            self, layers={**self.layers, **attending}, roles=roles, interface=interface, stream=stream
        )


def look_at(model: nn.Module, interface: AdapterModelInterface | None = None) -> ModelView:
    """Look at how ``model`` is built; nothing is run, and nothing is changed.

    Args:
        model: the base model, with or without adapters, which are not looked at.
        interface: what its modules are, where that is known.

    Raises:
        InterfaceError: the interface does not fit the model.
    """
    modules = dict(base_modules(model))
    layers = _layers(modules)
    heads = head_paths(model, modules, layers)
    roles = layer_roles(layers, modules, heads)
    embedding = _input_embedding(model, layers, modules)
    attending, attention_roles = attending_modules(model, modules, layers, roles)
    inputs, input_roles = input_modules(model, modules)
    view = ModelView(
        name=type(model).__name__,
        modules=modules,
        layers={**layers, **attending, **inputs},
        heads=heads,
        roles={**roles, **attention_roles, **input_roles},
        input_embedding=embedding,
    )
    if interface is None:
        return view
    return view.through(interface)


def _layers(modules: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """The modules that adapters can stand beside, by path."""
    layers = {}
    for path, module in modules.items():
        layer = describe(module)
        if layer is not None:
            layers[path] = layer
    # A linear of which its owner reads the weight and which it never calls: beside it nothing would act.
    for path, module in modules.items():
        children = {join(path, name) for name in module._modules}
        if not children.isdisjoint(layers):
            for name in only_read(type(module)):
                layers.pop(join(path, name), None)
    return layers


def _input_embedding(
    model: nn.Module, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module]
) -> str | None:
    """The path of the embedding that a `transformers` model names, else of the only one that there is."""
    embeddings = [path for path, layer in layers.items() if layer.kind == "embedding"]
    named = named_embedding(model)
    if named is not None:
        for path in embeddings:
            if modules[path] is named:
                return path
        return None
    if len(embeddings) == 1:
        return embeddings[0]
    return None
