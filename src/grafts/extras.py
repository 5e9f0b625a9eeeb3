"""Parts that an adapter of any method may have beside its own: trainable copies of modules, and trainable biases."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grafts.errors import ConfigError, UnsupportedTargetError
from grafts.sites.module import CHILD, Part, sites_in
from grafts.weights import describe


class TrainableCopy(Part):
    """A copy of a whole module that is used instead of it while its adapter is active (``modules_to_save``).

    Like every part it is stored in float32 and computes in the base's own dtype, so a fresh copy gives the base's output
    bitwise and training does not round its updates away.
    """

    def __init__(self, host: nn.Module, file_prefix: str = "") -> None:
        super().__init__()
        self.when = "instead"
        self.file_prefix = file_prefix
        self.module = copy_without_sites(host)
        self.dtypes = {name: parameter.dtype for name, parameter in self.module.named_parameters()}
        for name, parameter in self.module.named_parameters():
            if parameter.device.type == "meta":
                raise ConfigError(f"its {name!r} is on the meta device (offloaded), so it cannot be copied for training")
            if not parameter.is_floating_point():
                raise ConfigError(f"its {name!r} holds {parameter.dtype}, which cannot be trained")
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output for the module's own arguments."""
        cast = {
            name: p.to(self.dtypes[name])
            for name, p in self.module.named_parameters()
            if p.dtype.itemsize > self.dtypes[name].itemsize  # not where the whole model was made narrower since
        }
        return torch.func.functional_call(self.module, cast, args, kwargs) if cast else self.module(*args, **kwargs)

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The copy's parameters under the module's own names."""
        return {f"{self.file_prefix}{name}": p for name, p in self.module.named_parameters(remove_duplicate=False)}

    def merged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The copy in place of the module."""
        transposed = (layer := describe(self.module)) is not None and layer.kind == "transposed-linear"
        own = {name: p.detach().to(tensors[name].dtype) for name, p in self.module.named_parameters()}
        return {name: p.T.clone() if transposed and name == "weight" else p.clone() for name, p in own.items()}


def copy_without_sites(module: nn.Module) -> nn.Module:
    """A deep copy of ``module`` without the adapters in it; hooks of others come along."""
    shared = {id(site): site for _, site in sites_in(module)}
    twin: nn.Module = copy.deepcopy(module, dict(shared))
    for host, site in list(sites_in(twin)):
        for hooks in (host._forward_hooks, host._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is site]:
                del hooks[key]
                host._forward_hooks_with_kwargs.pop(key, None)
                host._forward_pre_hooks_with_kwargs.pop(key, None)
        del host._modules[CHILD]
    return twin


class BiasOffset(Part):
    """A trainable value of a module's bias: the output moves by its difference to the base's own.

    Attributes:
        value: the bias that the adapter trains, ``(out_features,)``.
    """

    base: Tensor

    def __init__(self, host: nn.Module, file_name: str) -> None:
        super().__init__()
        assert isinstance(host.bias, Tensor)
        self.channels = isinstance(host, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
        if not self.channels and describe(host) is None and "Norm" not in type(host).__name__:
            raise UnsupportedTargetError(f"a {type(host).__name__} is not known to add its bias to its output")
        self.file_name = file_name
        start = host.bias.detach().to(torch.promote_types(host.bias.dtype, torch.float32), copy=True)
        self.value = nn.Parameter(start)
        self.register_buffer("base", start.clone(), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` plus how far the bias has moved; ``y`` is ``(*batch, out_features)``, or ``(batch, channels, *space)``."""
        moved = (self.value - self.base).to(y.dtype)
        return y + (moved.view(-1, *[1] * (y.dim() - 2)) if self.channels else moved)

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The bias, under the name that the file format gives it."""
        return {self.file_name: self.value}

    def merged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The base's bias, moved as far as this one has moved."""
        moved = self.value.detach() - self.base
        return {"bias": tensors["bias"] + moved.to(tensors["bias"].dtype)}
