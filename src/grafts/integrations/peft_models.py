"""`peft`'s model classes: what their users know, delegated to the core."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from grafts.config import AdapterConfig
from grafts.errors import AdapterNameError, ConfigError
from grafts.lifecycle import activate, attach
from grafts.lifecycle import combine as combining
from grafts.lifecycle import merge as merging
from grafts.lifecycle.status import adapters
from grafts.methods._registry import method_named


class AdapterModel(nn.Module):
    """A model and its adapters of one method, called like the model itself.

    Attributes:
        model: the base model, with the adapters on it.
    """

    method: ClassVar[str]
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig | Mapping[str, AdapterConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Put the adapter on ``model``, in place, active and trainable.

        Args:
            model: the base model.
            config: the adapter's config, or configs by name, of which that of ``adapter_name`` is taken.
            adapter_name: what to call it.
            low_cpu_mem_usage: accepted for callers that give it; adapters are made once, where they live, in
                any case.
        """
        super().__init__()
        self.model = model
        self.add_adapter(adapter_name, config[adapter_name] if isinstance(config, Mapping) else config)

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The configs of the adapters, by name, in the order of adding; configs of this library and not of
        `peft`.
        """
        return {name: status.config for name, status in adapters(self.model).items()}

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in the order of adding; none while adapters are disabled."""
        return [name for name, status in adapters(self.model).items() if status.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, with whatever adapters are active.

        Args:
            args: the model's own.
            kwargs: the model's own.
        """
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the model has, where this class has nothing of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def add_adapter(self, adapter_name: str, config: AdapterConfig) -> None:
        """Put one more adapter on the model, active and trainable.

        Args:
            adapter_name: what to call it.
            config: of this class's method.

        Raises:
            AdapterNameError: the name is taken.
            ConfigError: it is the config of another method.
        """
        self._check_config(config)
        attach.add(self.model, config, name=adapter_name)

    def _check_config(self, config: AdapterConfig) -> None:
        """Refuse the config of another method.

        Raises:
            ConfigError: naming both classes.
        """
        wanted = method_named(self.method).config
        if type(config) is not wanted:
            raise ConfigError(f"{type(self).__name__} takes {wanted.__name__}, not {type(config).__name__}")

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; with the last one the model is as before the first came.

        Args:
            adapter_name: which.

        Raises:
            AdapterNameError: there is none of that name.
        """
        attach.delete(self.model, adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active, and trainable unless ``inference_mode``.

        To make one only active, and leave what is trainable as it is::

            grafts.activate(model, "en")

        Raises:
            AdapterNameError: a name is unknown.
        """
        activate.activate(self.model, adapter_name)
        activate.train_only(self.model, () if inference_mode else adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Make several adapters into a new one, frozen; what is active stays.

        Args:
            adapters: their names.
            weights: one for each.
            adapter_name: what to call the new one.
            combination_type: how; `grafts.combine` says which there are.

        Raises:
            AdapterNameError: a name is unknown, or the new one taken.
            ConfigError: there is no such way, or not one weight for each.
        """
        combining.combine(
            self.model, adapters, weights, adapter_name, method=combination_type, activate=False
        )

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights; the active ones if no names are given.

        Args:
            adapter_names: which.
            safe_merge: accepted for callers that give it; weights are always checked for NaN and infinity
                first.

        Raises:
            MergeError: nothing was merged.
        """
        merging.merge(self.model, adapter_names)

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bitwise: the inverse of `merge_adapter`.

        Raises:
            StateError: nothing is merged.
        """
        merging.unmerge(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The plain model with adapters folded into its weights.

        Args:
            progressbar: accepted for callers that give it; nothing is shown.
            safe_merge: accepted as well; weights are always checked for NaN and infinity first.
            adapter_names: which; the active ones if not given.

        Returns:
            The base model, without adapters.
        """
        # Merged ones may be there already, of a call of `merge_adapter`.
        if not any(status.merged for status in adapters(self.model).values()):
            merging.merge(self.model, adapter_names)
        elif adapter_names is not None:
            raise AdapterNameError(
                "adapters are merged already: call unmerge_adapter() first to choose others"
            )
        return attach.detach(self.model, keep_merged=True)

    def unload(self) -> nn.Module:
        """The base model as it was before the first adapter; what is merged is unmerged first, and nothing
        stays behind.
        """
        if any(status.merged for status in adapters(self.model).values()):
            merging.unmerge(self.model)
        return attach.detach(self.model)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the model compute as the bare base for the length of a ``with`` block."""
        with activate.active(self.model, ()):
            yield

    def get_peft_config_as_dict(self, inference: bool = False) -> dict[str, dict[str, Any]]:
        """The configs as plain data, by name.

        Args:
            inference: let each say that it is for inference.
        """
        changed: dict[str, Any] = {"inference_mode": True} if inference else {}
        result = {}
        for name, config in self.peft_config.items():
            result[name] = dataclasses.replace(config, **changed).to_dict()
        return result


class AdaptionPromptModel(AdapterModel):
    """A model with adaption prompts (LLaMA-Adapter, Zhang et al. 2023), as `peft` has it, on any model.

    All adapters stay where they are; switching is a pointer. The first one is active and trainable; adding
    another leaves that as it is.
    """

    method = "adaption_prompt"
    _resting: tuple[str, ...] | None = None

    def __init__(
        self,
        model: nn.Module,
        configs: AdapterConfig | Mapping[str, AdapterConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Put the adapter on ``model``, in place, active and trainable.

        Args:
            model: the base model.
            configs: the adapter's config, or configs by name, of which that of ``adapter_name`` is taken.
            adapter_name: what to call it.
            low_cpu_mem_usage: accepted for callers that give it; adapters are made once, where they live, in
                any case.
        """
        super().__init__(model, configs, adapter_name, low_cpu_mem_usage)

    def add_adapter(self, adapter_name: str, config: AdapterConfig) -> None:
        """Put one more adapter on the model; what is active stays active.

        Raises:
            AdapterNameError: the name is taken.
            ConfigError: it is the config of another method, or asks for more layers than the model has.
        """
        self._check_config(config)
        first = not adapters(self.model)
        attach.add(self.model, config, name=adapter_name, activate=first, train=first)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, another becomes active.

        Raises:
            AdapterNameError: there is none of that name.
        """
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        left = list(adapters(self.model))
        if self._resting is not None:
            self._resting = tuple(name for name in self._resting if name != adapter_name) or tuple(left[:1])
        elif was_active and left:
            activate.activate(self.model, left[0])

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter active, and trainable unless ``inference_mode``; while adapters are off, the one
        that comes back.

        Raises:
            AdapterNameError: the name is unknown.
        """
        resting = self._resting is not None
        super().set_adapter(adapter_name, inference_mode)
        if resting:
            self.disable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Let the model compute as the bare base."""
        active = tuple(self.active_adapters)
        if active:
            self._resting = active
            activate.deactivate(self.model)

    def enable_adapter_layers(self) -> None:
        """Let what was active before `disable_adapter_layers` be active again."""
        if self._resting:
            activate.activate(self.model, self._resting)
        self._resting = None


class IA3Model(AdapterModel):
    """A model with (IA)3 adapters (Liu et al. 2022), as `peft` has it.

    >>> from torch import nn
    >>> import grafts
    >>> config = grafts.IA3Config(target_modules=["0"], feedforward_modules=[])
    >>> model = IA3Model(nn.Sequential(nn.Linear(3, 2)), config)
    >>> sorted(model.peft_config)
    ['default']

    Its weighted adapters are the weighted sums of the vectors; ``combination_type="geometric"`` gives their
    weighted geometric mean, which is what scaling with one after the other means.
    """

    method = "ia3"
