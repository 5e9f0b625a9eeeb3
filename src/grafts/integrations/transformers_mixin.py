"""The methods of `transformers`' adapter mixin: the same names on a model, over the core, for every
method.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from grafts.checkpoints import hub
from grafts.checkpoints import peft_format as peft
from grafts.checkpoints.atomic_write import write_all
from grafts.checkpoints.hotswap import check_reservable, reserve, reserve_rank
from grafts.checkpoints.hotswap import hotswap as swap
from grafts.checkpoints.load import LoadReport, prepare
from grafts.checkpoints.model_card import About, table
from grafts.checkpoints.save import adapter_tensors, checkpoint_files, folder_name, save, training_files
from grafts.config import AdapterConfig
from grafts.errors import AdapterNameError, ConfigError, StateError, did_you_mean
from grafts.integrations.device_map import dispatch
from grafts.integrations.load_arguments import checkpoint_of, config_of
from grafts.integrations.transformers_patches import wrap_trainer
from grafts.lifecycle import activate, attach, registry
from grafts.lifecycle import merge as merging
from grafts.lifecycle.registry import find_registry
from grafts.lifecycle.sharding import gathered
from grafts.structure.interface import AdapterModelInterface


@dataclass
class MixinState:
    """What the mixin of one model has to remember besides what the core knows.

    Attributes:
        disabled: what `enable_adapters` makes active again, while adapters are disabled; else None.
        reserved_rank: the rank that `enable_peft_hotswap` asked for, or None.
    """

    disabled: tuple[str, ...] | None = None
    reserved_rank: int | None = None


class PeftAdapterMixin:
    """The methods of `transformers`' own adapter mixin, for all methods of this library and without `peft`.

    `grafts.init` gives them to a model that is there; a model class of one's own inherits from this one
    first::

        class MyModel(grafts.PeftAdapterMixin, LlamaForCausalLM): ...
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Let the Trainer load adapters back into models of this class."""
        super().__init_subclass__(**options)
        wrap_trainer()

    def _carried(self) -> registry.Registry | None:
        """What the model carries; nothing while it is only being made."""
        if "_modules" in self.__dict__:
            return find_registry(cast("nn.Module", self))
        return None

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether adapters are attached and not merged, which is what `transformers` asks by this name."""
        known = self._carried()
        return known is not None and not known.setup.merged

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The configs of the adapters by name; empty where there are none."""
        known = self._carried()
        if known is None:
            return {}
        return {name: plan.config for name, plan in known.plans.items()}

    @property
    def _mixin_state(self) -> MixinState:
        return cast("MixinState", self.__dict__.setdefault("_adapter_mixin_state", MixinState()))

    def _registry(self, names: Sequence[str] = ()) -> registry.Registry:
        """What the model carries.

        Raises:
            AdapterNameError: there is no adapter, or none of one of these names.
        """
        known = find_registry(cast("nn.Module", self))
        if known is None:
            raise AdapterNameError("No adapter loaded. Please load an adapter first.")
        for name in names:
            if name not in known.plans:
                raise AdapterNameError(
                    f"no adapter is called {name!r}; {did_you_mean(str(name), known.plans)}"
                )
        return known

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        device_map: str | Mapping[str, Any] = "auto",
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
        offload_index: Any = None,
        peft_config: AdapterConfig | Mapping[str, Any] | None = None,
        adapter_state_dict: Mapping[str, Tensor] | None = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        adapter_kwargs: Mapping[str, Any] | None = None,
        *,
        hotswap: bool | Literal["auto"] = "auto",
        local_files_only: bool = False,
        load_config: Any = None,
        interface: AdapterModelInterface | None = None,
    ) -> LoadReport:
        """Put an adapter from a folder, from the hub, or from memory on the model, and make it the active
        one.

        Args:
            peft_model_id: a folder, or the id of a repository on the hub.
            adapter_name: what to call it; "default" if not given.
            revision: of the repository: a branch, tag or commit.
            token: for a private or gated repository.
            device_map: where the model is to be, as `accelerate` takes it; "auto" alone leaves the model
                where it is, and the adapter comes to where its modules compute.
            max_memory: how much each device may hold; the model is spread over them anew.
            offload_folder: where weights go that no device can hold.
            offload_index: of weights that lie in such a folder already.
            peft_config: the adapter's config, where it does not come from a folder.
            adapter_state_dict: its tensors, likewise, by the names of `get_adapter_state_dict` or of a file.
            low_cpu_mem_usage: accepted; adapters are always planned without memory and made once, where they
                live.
            is_trainable: make it what is trained; else it stays frozen.
            adapter_kwargs: ``revision``, ``token``, ``subfolder``, ``cache_dir``, ``local_files_only``,
                ``force_download`` of the repository; ``allow_pickle=True`` to read an ``adapter_model.bin``;
                ``key_mapping``, regular expressions for parts of module paths that the model calls otherwise
                today.
            hotswap: True puts it into the tensors of the adapter that has the name; "auto" does so after
                `enable_peft_hotswap`.
            local_files_only: look only at what was downloaded before.
            load_config: how `from_pretrained` was called, where it calls this.
            interface: what the model's modules are; by default what the folder says, else what is worked out.

        Returns:
            What was loaded; nothing in it is missing or unexpected, since that is an error.

        Raises:
            AdapterNameError: the name is taken, or, to be hotswapped, is not there.
            CheckpointError: it cannot be had, is broken, or does not fit the model.
            ConfigError: its config cannot be, neither an id nor config and tensors were given, or it cannot
                be hotswapped.
        """
        model, name = cast("nn.Module", self), adapter_name if adapter_name is not None else "default"
        swaps = self._swaps(name, hotswap)
        # What to load, before anything is changed.
        options = {"revision": revision, "token": token, "local_files_only": local_files_only or None}
        sources = (peft_model_id, peft_config, adapter_state_dict)
        checkpoint = checkpoint_of(
            registry.unwrapped(model), *sources, options, adapter_kwargs or {}, load_config
        )
        moves = device_map != "auto" or any(
            value is not None for value in (max_memory, offload_folder, offload_index)
        )
        if swaps:
            if moves:
                raise ConfigError(
                    "an adapter that is hotswapped takes the place of another, where the model is: leave "
                    "device_map out"
                )
            return swap(model, checkpoint, name=name, interface=interface)

        # Made once to see that it fits, and again where the model has moved: the parts have to lie where it
        # lies then.
        state = self._mixin_state
        adapter = prepare(registry.unwrapped(model), name, checkpoint, interface)
        check_reservable(adapter.parts, state.reserved_rank)
        if moves:
            dispatch(model, device_map, max_memory, offload_folder, offload_index)
            adapter = prepare(registry.unwrapped(model), name, checkpoint, interface)
        reserve_rank(adapter.parts, state.reserved_rank)
        # While adapters are disabled, it becomes what comes back.
        adapter.attach(activate=state.disabled is None, train=is_trainable)
        if state.disabled is not None:
            state.disabled = (name,)
        return adapter.report

    def _swaps(self, name: str, hotswap: bool | Literal["auto"]) -> bool:
        """Whether an adapter that is loaded takes the place of the one that has its name.

        Args:
            name: the adapter's.
            hotswap: as `load_adapter` has it.

        Raises:
            AdapterNameError: the name is taken, or, to be hotswapped, is not there.
        """
        is_taken = name in self.peft_config
        if hotswap == "auto":
            swaps = is_taken and self._mixin_state.reserved_rank is not None
        else:
            swaps = bool(hotswap)
        if swaps and not is_taken:
            raise AdapterNameError(
                "To hotswap an adapter, there must already be an existing adapter with the same adapter name."
            )
        if is_taken and not swaps:
            raise AdapterNameError(f"Adapter with name {name} already exists. Please use a different name.")
        return swaps

    def add_adapter(self, adapter_config: AdapterConfig | str, adapter_name: str | None = None) -> None:
        """Put a new adapter on the model, active and trainable.

        Args:
            adapter_config: a config of this library or of `peft`, or a text as `grafts.config_from` takes it.
            adapter_name: what to call it; "default" if not given.

        Raises:
            AdapterNameError: the name is taken.
            TypeError: it is no config.
            ConfigError: it does not fit the model; nothing was touched.
        """
        name = adapter_name or "default"
        if name in self.peft_config:
            raise AdapterNameError(f"Adapter with name {name} already exists. Please use a different name.")
        attach.add(
            cast("nn.Module", self),
            config_of(adapter_config),
            name=name,
            activate=self._mixin_state.disabled is None,
        )
        if self._mixin_state.disabled is not None:
            self._mixin_state.disabled = (name,)

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make adapters active and no others; of them those are trainable that were added or loaded to be
        trained.

        Raises:
            AdapterNameError: there is no adapter, or none of that name.
        """
        names = activate.as_names(adapter_name)
        known = self._registry(names)
        if self._mixin_state.disabled is None:
            activate.activate(cast("nn.Module", self), names)
        else:
            self._mixin_state.disabled = names
        activate.train_only(cast("nn.Module", self), [name for name in names if name in known.trainees])

    def train_adapter(self, adapter_name: str | list[str]) -> None:
        """Make adapters active, and them the only trainable ones, also where they were loaded frozen.

        Raises:
            AdapterNameError: there is no adapter, or none of that name.
        """
        if isinstance(adapter_name, str):
            names = [adapter_name]
        else:
            names = list(adapter_name)
        self._registry(names)
        activate.train_only(cast("nn.Module", self), names)
        self.set_adapter(names)

    def disable_adapters(self) -> None:
        """Let the model compute as its base, trained heads included, until `enable_adapters`.

        Raises:
            AdapterNameError: there is no adapter.
        """
        known = self._registry()
        if self._mixin_state.disabled is None:
            before = known.setup.active
            activate.deactivate(cast("nn.Module", self))
            self._mixin_state.disabled = before

    def enable_adapters(self) -> None:
        """The inverse of `disable_adapters`.

        Raises:
            AdapterNameError: there is no adapter.
        """
        self._registry()
        if self._mixin_state.disabled is not None:
            activate.activate(cast("nn.Module", self), self._mixin_state.disabled)
            self._mixin_state.disabled = None

    def active_adapters(self) -> list[str]:
        """The names of the adapters that are set; while adapters are disabled, of those that come back.

        Raises:
            AdapterNameError: there is no adapter.
        """
        known = self._registry()
        return list(known.setup.active if self._mixin_state.disabled is None else self._mixin_state.disabled)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Remove adapters, all or none. When the last one goes, the model is as before the first came.

        Raises:
            AdapterNameError: there is no adapter, or none of that name.
        """
        if isinstance(adapter_names, str):
            names = [adapter_names]
        else:
            names = list(dict.fromkeys(adapter_names))
        self._registry(names).require_unmerged(f"delete {names}")
        for name in names:
            attach.delete(cast("nn.Module", self), name)
        if self._mixin_state.disabled is not None:
            left = self.peft_config
            self._mixin_state.disabled = (
                tuple(name for name in self._mixin_state.disabled if name in left) if left else None
            )

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of an adapter, by their names in a file, those of modules without ``base_model.model.``
        in front.

        Args:
            adapter_name: which; the first active one if not given.
            state_dict: the model's state dict to take them from, where the model itself does not hold them
                whole.

        Raises:
            AdapterNameError: there is no adapter, or none of that name.
            StateError: the state dict does not hold it.
        """
        known = self._registry(() if adapter_name is None else (adapter_name,))
        if adapter_name is not None:
            name = adapter_name
        else:
            name = next(iter([*self.active_adapters(), *known.plans]))
        plan = known.plans[name]
        with gathered(cast("nn.Module", self), [part for _, part in known.parts[name]], state_dict):
            tensors = {}
            for member, single in enumerate(plan.single_plans):
                for key, tensor in adapter_tensors(known, name, single, member).items():
                    # Of a union the whole name, behind the member's number, as its file has it.
                    own_key = f"{member}.{key}" if plan.members else key.removeprefix(peft.PREFIX)
                    tensors[own_key] = tensor.detach()
            return tensors

    def enable_peft_hotswap(
        self, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
    ) -> None:
        """Make room in adapters that are loaded from now on for others, of any rank up to ``target_rank``, in
        their place.

        Args:
            target_rank: the highest rank that is to come.
            check_compiled: what to do where adapters are there already: "error", "warn", or "ignore".

        Raises:
            StateError: adapters are there already, and that is to be an error.
            ConfigError: ``check_compiled`` is none of these, or the rank is not above 0.
        """
        if check_compiled not in ("error", "warn", "ignore"):
            raise ConfigError(
                f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} "
                f"instead."
            )
        is_number = isinstance(target_rank, int) and not isinstance(target_rank, bool)
        if not is_number or target_rank < 1:
            raise ConfigError(f"target_rank is {target_rank!r}; it must be a whole number above 0")
        # Compiled code holds on to the tensors that were there when it was compiled.
        if self.peft_config:
            if check_compiled == "error":
                raise StateError("Call `enable_peft_hotswap` before loading the first adapter.")
            if check_compiled == "warn":
                _warn(
                    "It is recommended to call `enable_peft_hotswap` before loading the first adapter: these "
                    "get new tensors"
                )
            for name in self.peft_config:
                reserve(cast("nn.Module", self), name, target_rank)
        self._mixin_state.reserved_rank = target_rank

    def merge_adapter(self, adapter_names: str | list[str] | None = None) -> None:
        """Fold adapters into the base weights; the active ones if no names are given.

        Raises:
            MergeError: nothing was merged.
            AdapterNameError: there is none of that name.
        """
        names = None if adapter_names is None else activate.as_names(adapter_names)
        self._registry(names or ())
        merging.merge(cast("nn.Module", self), names)

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bitwise, and make active again what was before `merge_adapter`.

        Raises:
            StateError: nothing is merged.
        """
        self._registry()
        merging.unmerge(cast("nn.Module", self))

    def save_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | list[str] | None = None,
        layout: Literal["peft", "adapterhub"] = "peft",
    ) -> None:
        """Write an adapter into a folder; several each into the folder of its name.

        Args:
            save_directory: made if needed.
            adapter_name: which; what is active if not given.
            layout: of the files.

        Raises:
            AdapterNameError: there is no adapter, or none of that name.
        """
        names: str | list[str] = self._chosen() if adapter_name is None else adapter_name
        if not isinstance(names, str) and len(names) == 1:
            names = names[0]  # one adapter goes into the folder itself
        self._registry(activate.as_names(names))
        save(cast("nn.Module", self), names, save_directory, layout=layout)

    def _chosen(self) -> list[str]:
        """The adapters that the model is about: the active and the trainable ones, or all where there are
        none.
        """
        known = self._registry()
        trained = [name for name in known.trained if name in known.plans]
        chosen = dict.fromkeys([*self.active_adapters(), *trained])
        return list(chosen or known.plans)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Write the adapters alone: one into the folder itself, several each into the folder of its name.

        Written are those that are active or trainable. A model without adapters is written as ever. While
        adapters are merged, the plain merged model is written, which loads with no library for adapters.

        Args:
            save_directory: made if needed.
            is_main_process: whether this process writes.
            state_dict: the model's state dict, where the model itself does not hold its tensors whole.
            args: of the class's own ``save_pretrained``.
            kwargs: of the class's own; ``push_to_hub=True`` with ``repo_id``, ``token``, ``private``,
                ``commit_message``, ``create_pr`` and ``revision`` uploads what was written.

        Raises:
            StateError: there is no adapter, and the class has no ``save_pretrained`` of its own.
        """
        known = find_registry(cast("nn.Module", self))
        if known is None:
            if not hasattr(super(), "save_pretrained"):
                raise StateError(
                    f"there is no adapter to save, and a {type(self).__name__} cannot save itself"
                )
            return super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)  # type: ignore[misc]
        # A merged model is a plain one: it is written as its class does, while the sites are not there.
        if known.setup.merged:
            with attach.set_apart(cast("nn.Module", self)):
                return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        # Every process takes part in gathering the tensors; one writes them.
        files = self._files(state_dict, training=True)
        if is_main_process:
            write_all(Path(save_directory), files)
            if kwargs.get("push_to_hub"):
                hub.upload(
                    files,
                    kwargs.get("repo_id") or Path(save_directory).name,
                    revision=kwargs.get("revision"),
                    token=kwargs.get("token"),
                    subfolder=None,
                    private=kwargs.get("private"),
                    create_pr=bool(kwargs.get("create_pr")),
                    commit={"commit_message": kwargs.get("commit_message") or "Upload adapter"},
                )
        return None

    def _files(
        self, state: Mapping[str, Tensor] | None = None, about: About | None = None, *, training: bool = False
    ) -> dict[str, bytes]:
        """The files of what the model is about, by their path; those of one adapter lie in no folder of their
        own.

        Args:
            state: the model's state dict, to take the tensors from.
            about: what the cards say besides.
            training: with those that training goes on from.
        """
        model, names = cast("nn.Module", self), self._chosen()
        files: dict[str, bytes] = {}
        for name in names:
            own_files = checkpoint_files(model, name, state=state, about=about)
            if training and name in self._registry().trained:
                own_files |= training_files(model, name)
            folder = "" if len(names) == 1 else f"{folder_name(name)}/"
            for file, data in own_files.items():
                files[folder + file] = data
        return files

    def push_to_hub(
        self,
        repo_id: str,
        *,
        about: About | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> str:
        """Put the adapters into a repository on the hub, with a model card; a model without adapters as its
        class does.

        Args:
            repo_id: the repository; made if needed.
            about: what the card is to say besides method, base and options: data, figures, license.
            commit_message: "Upload adapter" if not given.
            commit_description: more words.
            private: whether a new repository is.
            token: the one that ``hf auth login`` has stored if not given.
            revision: the branch; made if needed.
            create_pr: ask for the change instead of making it.
            tags: more tags for the card.
            kwargs: of the class's own ``push_to_hub``.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: the hub refuses, or cannot be reached.
        """
        known = find_registry(cast("nn.Module", self))
        commit = {"commit_message": commit_message, "commit_description": commit_description}
        where: dict[str, Any] = {
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
        }
        if known is None or known.setup.merged:
            return cast("str", super().push_to_hub(repo_id, tags=tags, **commit, **where, **kwargs))  # type: ignore[misc]
        about = about or About()
        about = dataclasses.replace(about, tags=(*about.tags, *(tags or ())))
        commit["commit_message"] = commit_message or "Upload adapter"
        return hub.upload(self._files(about=about), repo_id, subfolder=None, commit=commit, **where)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Say in the card that a Trainer has written what the adapters are; a Trainer calls this before it
        pushes.

        Args:
            output_dir: the folder with the card.
        """
        from huggingface_hub import ModelCard  # noqa: PLC0415 (an optional backend)

        file = Path(output_dir) / peft.CARD_FILE
        card, known = ModelCard.load(file), self._registry()
        own_source = getattr(getattr(self, "config", None), "name_or_path", None)
        for name in self._chosen():
            plan = known.plans[name]
            base = plan.config.base_model_name_or_path or own_source or None
            card.data.library_name = "peft"
            card.data.base_model = card.data.base_model or base
            card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), "grafts", plan.method.name]))
            card.text += "\n".join(["", f"## Adapter {name}", "", *table(plan, base, About())])
        card.save(file)


def _warn(message: str) -> None:
    """Warn, as from the line that has called a method of the mixin."""
    warnings.warn(message, UserWarning, stacklevel=3)
