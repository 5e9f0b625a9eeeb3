"""Parts that an adapter of any method may have beside its own: trainable copies of modules, trainable biases
and tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grafts.errors import ConfigError, UnsupportedTargetError
from grafts.modules.layers import describe, row_scale
from grafts.modules.weights import read_weights
from grafts.sites.module import ModulePart
from grafts.sites.site import sites_in


class TrainableCopy(ModulePart):
    """A copy of a whole module that is used instead of it while its adapter is active (``modules_to_save``).

    Like every part it is stored in float32 and computes in the base's own dtype, so a fresh copy gives the
    base's output bitwise and training does not round its updates away.
    """

    def __init__(self, host: nn.Module, file_prefix: str = "") -> None:
        super().__init__()
        self.when = "instead"
        self.file_prefix = file_prefix
        self.module = copy_without_sites(host)
        self.dtypes = {name: parameter.dtype for name, parameter in self.module.named_parameters()}
        for name, parameter in self.module.named_parameters():
            if parameter.device.type == "meta":
                raise ConfigError(
                    f"its {name!r} is on the meta device (offloaded), so it cannot be copied for training"
                )
            if not parameter.is_floating_point():
                raise ConfigError(f"its {name!r} holds {parameter.dtype}, which cannot be trained")
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output for the module's own arguments."""
        narrowed = {}
        for name, parameter in self.module.named_parameters():
            # Not where the whole model was made narrower since.
            if parameter.dtype.itemsize > self.dtypes[name].itemsize:
                narrowed[name] = parameter.to(self.dtypes[name])
        if not narrowed:
            return self.module(*args, **kwargs)
        return torch.func.functional_call(self.module, narrowed, args, kwargs)

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The copy's parameters under the module's own names."""
        tensors = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            tensors[f"{self.file_prefix}{name}"] = parameter
        return tensors

    def tied(self, host: nn.Module) -> TrainableCopy:
        """A copy of a module that shares this one's weight, sharing it as well."""
        twin = TrainableCopy(host, self.file_prefix)
        weight = self.module.get_parameter("weight")
        if twin.module.get_parameter("weight").shape != weight.shape:
            raise ConfigError("only modules whose weights have one shape can share a trained copy")
        twin.module._parameters["weight"] = weight
        return twin

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The copy in place of the module."""
        layer = describe(self.module)
        is_transposed = layer is not None and layer.kind == "transposed-linear"
        result = {}
        for name, parameter in self.module.named_parameters():
            tensor = parameter.to(tensors[name].dtype)
            if is_transposed and name == "weight":
                tensor = tensor.T
            result[name] = tensor.clone()
        return result


def copy_without_sites(module: nn.Module) -> nn.Module:
    """A deep copy of ``module`` without the adapters in it; hooks of others come along."""
    # Sites are not copied but shared at first, which costs nothing, and then taken out of the copy.
    sites: dict[int, Any] = {id(site): site for _, site in sites_in(module)}
    twin: nn.Module = copy.deepcopy(module, sites)
    for host, site in list(sites_in(twin)):
        _remove_hooks_of(site, host)
        del host._modules[site.child]
    return twin


def _remove_hooks_of(site: nn.Module, host: nn.Module) -> None:
    """Take a site's hooks off a copy of its host, which has handles to none of them."""
    for hooks in (host._forward_hooks, host._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__self__", None) is site:
                del hooks[key]
                host._forward_hooks_with_kwargs.pop(key, None)
                host._forward_pre_hooks_with_kwargs.pop(key, None)


class BiasOffset(ModulePart):
    """A trainable value of a module's bias: the output moves by its difference to the base's own.

    Attributes:
        value: the bias that the adapter trains, ``(out_features,)``.
    """

    base: Tensor

    def __init__(self, host: nn.Module, file_name: str) -> None:
        super().__init__()
        assert isinstance(host.bias, Tensor)
        # The bias of these lies along the second dimension of the output, that of all others along the last.
        self.is_by_channel = isinstance(
            host, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
        )
        is_norm = "Norm" in type(host).__name__
        if not self.is_by_channel and not is_norm and describe(host) is None:
            raise UnsupportedTargetError(
                f"a {type(host).__name__} is not known to add its bias to its output"
            )
        self.file_name = file_name
        start = host.bias.detach().to(torch.promote_types(host.bias.dtype, torch.float32), copy=True)
        self.value = nn.Parameter(start)
        self.register_buffer("base", start.clone(), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` plus how far the bias has moved; ``y`` is ``(*batch, out_features)``, or
        ``(batch, channels, *space)``.
        """
        moved = (self.value - self.base).to(y.dtype)
        if self.is_by_channel:
            moved = moved.view(-1, *[1] * (y.dim() - 2))
        return y + moved

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The bias, under the name that the file format gives it."""
        return {self.file_name: self.value}

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The base's bias, moved as far as this one has moved."""
        moved = self.value - self.base
        return {"bias": tensors["bias"] + moved.to(tensors["bias"].dtype)}


class TrainableTokens(ModulePart):
    """Trainable values of some rows of an embedding (``trainable_token_indices``), and of the same rows of a
    tied head.

    Attributes:
        trainable_tokens_delta: the rows' values, not their differences, ``(tokens, dim)``; the name is that
            of the files.
        tokens: which rows, ``(tokens,)``.
        slots: row -> its place among `tokens`, or -1; ``(rows,)``.
        base: the rows' values in the base, ``(tokens, dim)``.
    """

    tokens: Tensor
    slots: Tensor
    base: Tensor

    def __init__(self, host: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        layer = describe(host)
        if layer is None or layer.kind not in ("embedding", "linear"):
            raise UnsupportedTargetError(f"a {type(host).__name__} has no rows for trainable_token_indices")
        self.embeds = layer.kind == "embedding"
        if self.embeds:
            self.scale = row_scale(host)
            rows, dim = layer.in_features, layer.out_features
        else:
            self.scale = 1.0
            rows, dim = layer.out_features, layer.in_features
        if max(tokens) >= rows:
            raise ConfigError(
                f"trainable_token_indices has {max(tokens)}, and there are {rows} rows: "
                "enlarge the vocabulary first (resize_token_embeddings)"
            )
        self.trainable_tokens_delta = nn.Parameter(torch.zeros(len(tokens), dim))
        self.indices = tuple(tokens)
        self.rows = rows
        self.follows = (
            False  # whether it takes its values from another module's, of which it shares the weight
        )
        self.register_buffer("tokens", torch.tensor(self.indices), persistent=False)
        self.register_buffer("slots", torch.full((rows,), -1), persistent=False)
        self.register_buffer("base", torch.zeros(len(tokens), dim), persistent=False)

    def from_base(self, host: nn.Module, *, fresh: bool) -> None:
        """Start with the base's rows."""
        device = self.trainable_tokens_delta.device
        self.tokens = torch.tensor(self.indices, device=device)
        self.slots = torch.full((self.rows,), -1, device=device)
        self.slots[self.tokens] = torch.arange(len(self.indices), device=device)
        self.base = read_weights(host)["weight"].to(device, self.trainable_tokens_delta.dtype)[self.tokens]
        if fresh:
            with torch.no_grad():
                self.trainable_tokens_delta.copy_(self.base)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Put the rows' own values where the base's were.

        Args:
            x: token ids, ``(*batch)``; for a head hidden states, ``(*batch, dim)``.
            y: embeddings, ``(*batch, dim)``; for a head logits, ``(*batch, rows)``.

        Returns:
            ``y`` with the embeddings, or the logits, of these tokens.
        """
        if not self.embeds:
            moved = self.trainable_tokens_delta - self.base
            return y.index_add(-1, self.tokens, F.linear(x, moved.to(x.dtype)).to(y.dtype))
        slot = self.slots[x]
        values = (self.trainable_tokens_delta * self.scale).to(y.dtype)
        return torch.where((slot >= 0)[..., None], F.embedding(slot.clamp_min(0), values), y)

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The values, under the name that the file format gives them; a head that follows an embedding adds
        none.
        """
        if self.follows:
            return {}
        return {"token_adapter.trainable_tokens_delta": self.trainable_tokens_delta}

    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weight with these rows."""
        weight = tensors["weight"]
        return {"weight": weight.index_copy(0, self.tokens, self.trainable_tokens_delta.to(weight.dtype))}

    def tied(self, host: nn.Module) -> TrainableTokens:
        """The same values as rows of a head."""
        twin = TrainableTokens(host, self.indices)
        twin.follows = True
        twin.trainable_tokens_delta = self.trainable_tokens_delta
        return twin
