"""The input site: at a stack's own call, where virtual tokens come in front of the input and go from the
output.

They are put in when a sequence begins (at an empty cache). Mask, positions and token types follow; their
positions are cut off what the stack gives, so that heads, labels and ``generate`` need to know nothing of
them. A cache that holds them says its length without them to everyone but the model. What happens in one call
stands in `grafts.sites.input_call`.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.errors import StateError
from grafts.sites.arguments import CallSignature, Kind, cache_in, is_cache, offset_parameter
from grafts.sites.cache_view import CacheView
from grafts.sites.input_call import InputCall, InputPart, PartsOfRows, TokenObserver, require_counted
from grafts.sites.input_output import require_positions, tokens_only
from grafts.sites.site import Site

__all__ = ["InputPart", "InputSite", "TokenObserver", "embeds_positions"]


class InputSite(Site):
    """All adapters at one module that takes the tokens' embeddings."""

    child = "grafts_model"
    # What happens in the present call; None outside of one, and where nothing acts.
    _call: InputCall | None = None

    def hooks(self, host: nn.Module) -> tuple[RemovableHandle, ...]:
        """Act before and after the module, and at the children of it that make embeddings and positions.

        Args:
            host: a module that takes tokens or their embeddings.
        """
        self.signature = CallSignature(type(host).forward)
        handles = [
            host.register_forward_pre_hook(self._before, with_kwargs=True),
            host.register_forward_hook(self._after, with_kwargs=True),
        ]
        embeddings = getattr(host, "embeddings", None)
        if isinstance(embeddings, nn.Module):
            handles.append(embeddings.register_forward_hook(self._embedded))
        if embeds_positions(host) and not self.signature.takes(Kind.POSITIONS):
            positions = host.get_submodule("embed_positions")
            self.embedded_signature = CallSignature(type(positions).forward)
            self.offset = offset_parameter(type(positions))
            handles.append(positions.register_forward_pre_hook(self._positions, with_kwargs=True))
        return tuple(handles)

    def _before(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._call = None
        arguments = self.signature.bind(args, kwargs)
        view = CacheView.of(arguments.get(Kind.CACHE))
        # A cache that holds virtual tokens has to be known also where nothing acts any more.
        if view is None and not self.acts():
            return None
        arguments.refuse_unknown_tokens(host)
        call = InputCall(host, arguments, self._parts_of_rows(), self.setup.rows, view)
        call.begin()
        self._call = call
        return arguments.passed_on()

    def _parts_of_rows(self) -> list[PartsOfRows]:
        """The parts that act now; where rows choose, those of each adapter apart, by its key."""
        rows = self.setup.rows
        if rows is None:
            return [(None, cast("list[InputPart]", self.running()))]
        parts: dict[str, list[InputPart]] = {key: [] for key in rows.keys}
        for key, part in self.routed(rows):
            parts[key].append(cast("InputPart", part))
        return list(parts.items())

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put virtual tokens among what the embeddings have become, where that is their place."""
        call = self._call
        if call is None or call.waiting is None:
            return output
        virtual, call.waiting = call.waiting, None
        assert call.layout is not None
        assert call.first is not None
        return call.layout.insert(output, virtual.to(output.dtype), call.first)

    def _positions(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Move the positions of a model that makes them itself."""
        shift = 0 if self._call is None else self._call.shift
        if isinstance(shift, Tensor):
            if bool((shift != shift[:1]).any()):
                raise StateError(
                    "adapter_names: this model makes its positions itself, so its rows cannot count other "
                    "prefixes"
                )
            shift = int(shift[0])
        if shift == 0:
            return None
        arguments = self.embedded_signature.bind(args, kwargs)
        positions = arguments.get(Kind.POSITIONS)
        if positions is not None:
            arguments.set(Kind.POSITIONS, positions + shift)
        else:
            assert self.offset is not None
            arguments.values[self.offset] = arguments.values.get(self.offset, 0) + shift
        return arguments.passed_on()

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call, self._call = self._call, None
        if call is None:
            return output
        layout = call.layout
        self._see_cache(host, call, output)
        if layout is None or call.tokens_at is None:
            return output
        require_positions(host, output, layout.count + layout.tokens)
        return tokens_only(output, call.tokens_at, layout.count + layout.tokens)

    @staticmethod
    def _see_cache(host: nn.Module, call: InputCall, output: Any) -> None:
        """Check the cache of a call that ends, and let it say to others how many tokens it holds.

        Raises:
            StateError: it holds something else than what was counted.
        """
        cache = call.arguments.get(Kind.CACHE)
        view = CacheView.of(cache)
        matters = call.layout is not None or call.counted is not None
        if cache is None and matters:
            cache = cache_in(output)  # the model has made one
        if call.counted is not None:
            require_counted(host, cache, call.counted)
        if call.layout is not None and view is None and is_cache(cache):
            view = CacheView(cache, call.layout)
        if view is not None:
            view.inside = False


InputPart.site = InputSite


def embeds_positions(host: nn.Module) -> bool:
    """Whether a module makes positions itself and embeds them in a child that can be told of others (BART's
    decoder).
    """
    child = getattr(host, "embed_positions", None)
    return isinstance(child, nn.Module) and offset_parameter(type(child)) is not None
