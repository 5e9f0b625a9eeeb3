"""Which modules of a model a config selects: by names, by roles, by layers. Reads a view of the model and
changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, UnmatchedTargetError, UnsupportedTargetError
from grafts.methods._registry import Method, Place, Roles, place_at
from grafts.modules.patterns import layer_index, matches, nearest_modules, unmatched, within
from grafts.modules.tree import base_parameters
from grafts.structure.residual_stream import OUTPUTS
from grafts.structure.roles import HEAD, ROUTER, roles_named
from grafts.structure.view import ModelView

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class FileFacts:
    """What reading a file knows besides its config.

    Patterns that select nothing pass there: the file's tensors are checked one by one.

    Attributes:
        replaced: paths of modules whose base weights the file brings along (a resized embedding); the adapter
            gets a copy of each, beneath its own part if it has one.
    """

    replaced: Sequence[str] = ()


class Selection:
    """What one config selects in one model.

    Attributes:
        view: the model.
        config: the config, of a single method.
        method: its method.
        file: what a file says besides, where the config is one of a file.
        copies: paths of the modules of which the adapter keeps a trainable copy.
    """

    def __init__(
        self, view: ModelView, config: AdapterConfig, method: Method[Any], file: FileFacts | None
    ) -> None:
        self.view = view
        self.config = config
        self.method = method
        self.file = file
        self.copies = self._copied_modules()
        # What lies inside a copy is trained as a whole, and so is no target.
        self._free = {path: role for path, role in view.roles.items() if not within(path, self.copies)}

    def names_say_enough(self) -> bool:
        """Whether the roles that names and sizes tell are those that the config needs, or it needs none; else
        an interface has to be worked out.
        """
        if self.config.target_modules is not None or self.method.places is not None:
            return True
        return all(self._has_role(roles) for roles in self._wanted_roles())

    def places(self) -> list[Place]:
        """Where the method's parts stand, in order.

        Raises:
            UnmatchedTargetError: a pattern selects no module, or nothing is selected at all; names the
                nearest.
            UnsupportedTargetError: a selected module is of a kind that the method cannot serve.
        """
        if self.method.places is not None:
            return self._stream_places()
        paths = self._selected()
        self._require_supported(paths)
        if self.method.narrow is None:
            return [place_at(self.view, path) for path in paths]
        candidates = {path: place_at(self.view, path) for path in self.view.layers}
        selected = [candidates[path] for path in paths]
        return list(self.method.narrow(self.config, selected, list(candidates.values())))

    # By names, roles and layers

    def _selected(self) -> list[str]:
        """Paths of the modules that the config selects.

        Raises:
            UnmatchedTargetError: a pattern selects none, or nothing is selected at all.
        """
        config = self.config
        paths = self._named()
        excluded = set(self._matched("exclude_modules", config.exclude_modules or ()))
        paths = self._in_chosen_layers([path for path in paths if path not in excluded])
        # A name may be that of attention, and of what stands around it: in BERT ``attention`` holds both
        # ``attention.self`` and its output, and only the former can be reached.
        if self.method.layers <= {"attending", "input"}:
            fitting = [path for path in paths if self._is_supported(path)]
            paths = fitting or paths
        if not paths and not self._may_have_no_targets():
            raise UnmatchedTargetError(
                f"{type(config).__name__} selects no module of {self.view.name} "
                f"(target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r}); "
                f"candidates: {self.view.candidates(self.method.layers)}"
            )
        return paths

    def _named(self) -> list[str]:
        """Paths of the modules that ``target_modules`` says, by names or by roles.

        Raises:
            UnmatchedTargetError: a pattern selects none, or the model has none of a role.
        """
        patterns = self.config.target_modules
        if patterns is None:
            return self._of_wanted_roles()
        if patterns == ALL_LINEAR:
            return [path for path, role in self._free.items() if self._is_common_linear(path, role)]
        return self._matched("target_modules", patterns, apart_from=self.copies)

    def _is_common_linear(self, path: str, role: str) -> bool:
        """Whether ``"all-linear"`` means a layer: every linear but heads and the routers of experts."""
        return self.view.layers[path].is_linear and role not in (HEAD, ROUTER)

    def _may_have_no_targets(self) -> bool:
        """Whether the adapter has something to train without any target: tokens, or the copies that a file
        holds.
        """
        trains_tokens_only = self.config.auxiliary().tokens is not None and self.config.target_modules == ()
        has_copies_only = self.file is not None and len(self.copies) > 0
        return trains_tokens_only or has_copies_only

    def _wanted_roles(self) -> Roles:
        """The roles of the targets where no names are given: some module of each set, and all modules of all
        sets.
        """
        if self.config.target_roles is None:
            return self.method.default_roles(self.config)
        return tuple(roles_named(name) for name in self.config.target_roles)

    def _has_role(self, roles: frozenset[str]) -> bool:
        return any(role in roles for role in self._free.values())

    def _of_wanted_roles(self) -> list[str]:
        """Paths of the modules of the wanted roles.

        Raises:
            UnmatchedTargetError: the model has none of a role.
        """
        wanted = self._wanted_roles()
        for roles in wanted:
            if not self._has_role(roles):
                raise UnmatchedTargetError(
                    f"{self.view.name} has no modules that are recognised as {' or '.join(sorted(roles))}: "
                    f"name them in target_modules; candidates: {self.view.candidates(self.method.layers)}"
                )
        result = []
        for path, role in self._free.items():
            if any(role in roles for roles in wanted):
                result.append(path)
        return result

    def _in_chosen_layers(self, paths: list[str]) -> list[str]:
        """Those of ``paths`` that lie in the layers asked for.

        Raises:
            UnmatchedTargetError: none lies in one of them.
        """
        chosen = self.config.layer_selection()
        if chosen is None:
            return paths
        layer_of = {path: layer_index(path, chosen.lists) for path in paths}
        missing = [index for index in chosen.indices if index not in layer_of.values()]
        if missing:
            present = sorted({index for index in layer_of.values() if index is not None})
            raise UnmatchedTargetError(
                f"no target lies in layers_to_transform={missing}; targets lie in layers {present}"
            )
        return [path for path, index in layer_of.items() if index in chosen.indices]

    def _is_supported(self, path: str) -> bool:
        """Whether a module is a layer of a kind that the method can stand beside."""
        return path in self.view.layers and self.view.layers[path].kind in self.method.layers

    def _require_supported(self, paths: Sequence[str]) -> None:
        """Refuse modules that the method cannot stand beside.

        Raises:
            UnsupportedTargetError: naming the first.
        """
        for path in paths:
            if not self._is_supported(path):
                raise UnsupportedTargetError(
                    f"{path!r} is a {type(self.view.modules[path]).__name__}, which {self.method.title} "
                    f"cannot stand beside; it takes {', '.join(sorted(self.method.layers))} layers: "
                    f"{self.view.candidates(self.method.layers)}"
                )

    def _matched(
        self,
        option: str,
        patterns: str | Sequence[str],
        *,
        apart_from: Sequence[str] = (),
        also_of_file: bool = False,
    ) -> list[str]:
        """Paths of the modules that patterns select.

        Args:
            option: of the config, for messages.
            patterns: its value.
            apart_from: modules that are left out, with what lies inside of them.
            also_of_file: a pattern that selects nothing is an error in a file's config too.

        Raises:
            UnmatchedTargetError: one of them selects nothing; names the nearest.
        """
        free = [path for path in self.view.modules if not within(path, apart_from)]
        names_root = not isinstance(patterns, str) and "" in patterns
        if not names_root:
            # The path of the model itself is empty, and would match whatever matches nothing.
            free = [path for path in free if path != ""]
        if self.file is None or also_of_file:
            missing = unmatched(free, patterns)
            if missing:
                raise self._unmatched(option, patterns, missing[0], free, apart_from)
        return [path for path in free if matches(path, patterns)]

    def _unmatched(
        self,
        option: str,
        patterns: str | Sequence[str],
        missing: str,
        free: Sequence[str],
        apart_from: Sequence[str],
    ) -> UnmatchedTargetError:
        """The error for a pattern that selects nothing.

        Args:
            option: of the config.
            patterns: its value.
            missing: the pattern.
            free: the paths that could have been selected.
            apart_from: modules that were left out.
        """
        outside = ""
        if missing not in unmatched(self.view.modules, patterns):
            outside = f" outside modules_to_save={list(apart_from)}"
        return UnmatchedTargetError(
            f"no module matches {option}={missing!r} in {self.view.name}{outside}\n"
            f"  nearest names: {nearest_modules(missing, free)}\n"
            "  see all targets with: grafts inspect <model>"
        )

    # On the residual stream

    def _stream_places(self) -> list[Place]:
        """The places of a method on the residual stream; ``target_modules`` and ``exclude_modules`` choose
        among them.

        Raises:
            UnmatchedTargetError: a pattern selects no module, or nothing is selected at all.
        """
        view, config, method = self.view, self.config, self.method
        assert method.places is not None
        assert view.stream is not None
        if config.target_roles is not None:
            raise ConfigError(
                f"target_roles has no meaning for {method.title}: its own options say where it stands"
            )
        candidates = [place_at(view, path) for path in view.layers]
        places = list(method.places(config, view, candidates))
        kept = places
        if config.target_modules is not None:
            matched = set(self._matched("target_modules", config.target_modules))
            kept = [place for place in kept if place.path in matched]
        if config.exclude_modules is not None:
            matched = set(self._matched("exclude_modules", config.exclude_modules))
            kept = [place for place in kept if place.path not in matched]
        if kept is not places:
            places = _with_what_serves(places, kept)
        if not any(place.role in OUTPUTS for place in places):
            raise UnmatchedTargetError(
                f"{type(config).__name__} selects no place on the stream of {view.name} "
                f"({len(view.stream.layers)} layers, {len(view.stream.sublayers())} steps; "
                f"target_modules={config.target_modules!r})"
            )
        return places

    # Copies and tokens

    def _copied_modules(self) -> list[str]:
        """Paths of the modules of which the adapter keeps a trainable copy; containers stand for what they
        hold.
        """
        config = self.config
        paths = self._matched("modules_to_save", config.modules_to_save or ())
        # A file names its heads itself.
        if self.file is None and config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
            paths += [path for path in self.view.heads if path not in paths]
        copies = []
        for path in paths:
            # What lies in another one that is copied comes with it.
            others = {*paths} - {path}
            if not within(path, others):
                copies += _callable_modules(path, self.view.modules)
        return copies

    def token_rows(self) -> dict[str, tuple[int, ...]]:
        """Which rows of which embeddings the adapter trains, by path.

        Raises:
            UnmatchedTargetError: a name selects no module, or there is no input embedding.
            ConfigError: two names are of one weight and have other rows.
        """
        tokens = self.config.auxiliary().tokens
        if not tokens:
            return {}
        if not isinstance(tokens, Mapping):
            path = self.view.input_embedding
            if path is None:
                raise UnmatchedTargetError(
                    f"{self.view.name} names no input embedding: give trainable_token_indices as a "
                    f"dictionary of names; candidates: {self.view.candidates({'embedding'})}"
                )
            return {path: tokens}

        rows_of: dict[str, tuple[int, ...]] = {}
        path_of: dict[object, str] = {}  # the first path at which each weight was met
        for name, rows in tokens.items():
            for path in self._matched("trainable_token_indices", [name], also_of_file=True):
                weight = self.view.modules[path]._parameters.get("weight")
                first = path_of.setdefault(path if weight is None else weight, path)
                if rows_of.setdefault(first, rows) != rows:
                    raise ConfigError(
                        f"trainable_token_indices: {first!r} and {path!r} share one weight; give both the "
                        "same rows"
                    )
        return rows_of


def _with_what_serves(places: Sequence[Place], kept: Sequence[Place]) -> list[Place]:
    """The places on the stream that are kept, and those that serve them: what observes the stream for a step,
    a norm.
    """
    # What belongs to no step serves all of them.
    steps = {None, *(place.sublayer for place in kept if place.role in OUTPUTS)}
    result = []
    for place in places:
        serves = place.role not in OUTPUTS and place.sublayer in steps
        if place in kept or serves:
            result.append(place)
    return result


def _callable_modules(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules with parameters that ``path`` stands for: itself, or what a container holds.

    A site is a child of its module, and a child added to a container would be run or counted as one of its
    members.
    """
    module = modules[path]
    if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        if base_parameters(module):
            return [path]
        return []
    leaves = []
    for name, _ in module.named_children():
        leaves += _callable_modules(f"{path}.{name}", modules)
    return leaves
