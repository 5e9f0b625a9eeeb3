"""The model's own calls: arguments that are meant for its adapters (which one each row of the batch wants,
and for prompts), and outputs that cannot be trained by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grafts.errors import StateError
from grafts.sites.arguments import SPELLINGS, Kind, output_values
from grafts.sites.attention import AttendingPart
from grafts.sites.input import InputSite
from grafts.sites.setup import Rows, Setup
from grafts.sites.site import sites_in

# The arguments of a model's call that are meant for its adapters.
ADAPTER_NAMES, PROMPT_BIAS = "adapter_names", "prompt_bias"
# The name of a flag at the model: a call has come through its hooks and is on its way to ``forward``.
ENTERED = "_adapters_entered"
Choose = Callable[[Sequence[str | None]], Rows]


class RootCallHooks:
    """Takes ``adapter_names`` and ``prompt_bias`` out of the model's calls, and tells the sites of them.

    Attributes:
        setup: the model's shared setup.
        choose: checks names and makes them rows.
        trains: whether something trainable acts in the present call of a model.
    """

    def __init__(self, setup: Setup, choose: Choose, trains: Callable[[nn.Module], bool]) -> None:
        self.setup = setup
        self.choose = choose
        self.trains = trains
        self._begin: RemovableHandle | None = None
        self._end: RemovableHandle | None = None
        self._guard: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Hook the model's calls, and its ``generate`` if it has one."""
        self._begin = model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        self.stay_last(model)
        model.__dict__[ENTERED] = False
        if callable(getattr(type(model), "generate", None)):
            model.__dict__["generate"] = AdaptedGenerate(self, model)

    def stay_last(self, model: nn.Module) -> None:
        """Look at the model's output after all sites have."""
        if self._guard is not None:
            self._guard.remove()
        self._guard = model.register_forward_hook(self._guarded, with_kwargs=True)

    def detach(self, model: nn.Module) -> None:
        """The exact inverse of `attach`: the model's calls are no longer hooked, and its ``generate`` is its
        class's again.
        """
        for handle in (self._begin, self._end, self._guard):
            if handle is not None:
                handle.remove()
        self._begin = self._end = self._guard = None
        model.__dict__.pop("generate", None)
        model.__dict__.pop(ENTERED, None)

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not torch.compiler.is_compiling():
            model.__dict__[ENTERED] = True
        if ADAPTER_NAMES in kwargs or PROMPT_BIAS in kwargs:
            self._take_choices(model, args, kwargs)
        # Compilers guard on what is assigned, so only where it changes.
        setup = self.setup
        if setup.routed != (setup.rows is not None):
            setup.routed = setup.rows is not None
        if ADAPTER_NAMES not in kwargs and PROMPT_BIAS not in kwargs:
            return None
        of_model = {}
        for name, value in kwargs.items():
            if name not in (ADAPTER_NAMES, PROMPT_BIAS):
                of_model[name] = value
        return args, of_model

    def _take_choices(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a call asks for, until it ends.

        Raises:
            AdapterNameError: a name is unknown.
            StateError: rows cannot choose now, or nothing takes the bias.
        """
        names, bias = kwargs.get(ADAPTER_NAMES), kwargs.get(PROMPT_BIAS)
        if names is not None:
            self.setup.rows = self.rows(model, names, args, kwargs)
        if bias is not None:
            self.require_bias(model)
            self.setup.prompt_bias = bias
        has_rows = ADAPTER_NAMES in kwargs and self.setup.rows is not None
        if not has_rows and bias is None:
            return
        if self._end is not None:
            self._end.remove()
        # Only for such a call, because compilers do not like hooks that are called come what may.
        self._end = model.register_forward_hook(self._after, always_call=True)

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.setup.rows = None
        self.setup.prompt_bias = None
        # Where the call has failed there is no output, and PyTorch is walking over its hooks.
        if output is not None and self._end is not None:
            self._end.remove()
            self._end = None

    def _guarded(self, *call: Any) -> Any:
        """Let an output that nothing trainable has made say so when it is trained by.

        Args:
            call: the model, its positional and its named arguments, and its output; in one, because the
                compiler of PyTorch looks at each argument of a hook and warns of tensors that are no leaves.
        """
        if not call[0].training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        model, args, kwargs, output = call
        floats = _floats_among(output_values(output))
        if not floats:
            return None
        # Who gives inputs that want gradients has something of his own to train.
        if _any_wants_gradient([*args, *kwargs.values()]):
            return None
        # Embeddings may have been made to want gradients (for reentrant checkpointing), so that alone says
        # nothing.
        if _any_wants_gradient(floats) and self.trains(model):
            return None
        anchor = torch.empty(0, requires_grad=True)
        return _replaced(output, lambda value: Untrainable.apply(value, anchor, self.setup))  # type: ignore[no-untyped-call]

    def require_bias(self, model: nn.Module) -> None:
        """Refuse a ``prompt_bias`` that nothing would read.

        Args:
            model: the model that is called.

        Raises:
            StateError: no adapter that acts now takes it.
        """
        for _, site in sites_in(model):
            for part in site.acting():
                if isinstance(part, AttendingPart) and part.takes_bias:
                    return
        raise StateError("prompt_bias was given, and no adapter that acts in this call takes it")

    def rows(
        self, model: nn.Module, names: Sequence[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Rows:
        """What the rows of a call ask for.

        Args:
            model: the model that is called.
            names: which adapter each row wants, None for the bare base.
            args: the call's arguments.
            kwargs: likewise.

        Raises:
            AdapterNameError: a name is unknown.
            StateError: there is not one name a row, or rows cannot choose now.
        """
        rows = self.choose(names)
        # The batch is the first dimension of the first argument, of the model's main input, or of any other.
        preferred = [kwargs.get(name) for name in SPELLINGS[Kind.EMBEDDINGS]]
        main_input = getattr(model, "main_input_name", None)
        if main_input:
            preferred.insert(0, kwargs.get(main_input))
        for value in (*args, *preferred, *kwargs.values()):
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape[0] != len(rows.names):
                raise StateError(
                    f"adapter_names has {len(rows.names)} names for a batch of {value.shape[0]} rows"
                )
            break
        return rows


def _floats_among(values: Iterable[Any]) -> list[Tensor]:
    """The floating-point tensors among some values."""
    floats = []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            floats.append(value)
    return floats


def _any_wants_gradient(values: Iterable[Any]) -> bool:
    """Whether a tensor among some values wants a gradient."""
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _replaced(output: Any, change: Callable[[Tensor], Any]) -> Any:
    """An output with its floating-point tensors changed: itself one, or the values of a dictionary or
    tuple.
    """

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return change(value)
        return value

    if isinstance(output, Mapping):
        for name, value in list(output.items()):
            output[name] = changed(value)  # type: ignore[index]
        return output
    if type(output) is tuple:
        return tuple(changed(value) for value in output)
    return changed(output)


class Untrainable(torch.autograd.Function):
    """The identity, whose backward pass says that there is nothing to train."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, setup: Setup) -> Tensor:
        """A copy of ``value``.

        Args:
            ctx: what the backward pass gets.
            value: one of the model's outputs.
            anchor: a tensor that wants a gradient, so that there is a backward pass.
            setup: the model's.
        """
        ctx.setup = setup
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """No gradient: an error in its place, since whoever calls ``backward`` expects to train something.

        Raises:
            StateError: saying what is active.
        """
        raise StateError(
            "nothing is trainable: no parameter that acts in this call gets a gradient; active are "
            f"{list(ctx.setup.active)}. A loaded adapter is frozen: grafts.train_only(model, name) makes it "
            "trainable, as train=True does on loading"
        )


class AdaptedGenerate:
    """A model's ``generate`` with what is meant for its adapters: beams follow their row, virtual tokens have
    their mask.
    """

    def __init__(self, hooks: RootCallHooks, model: nn.Module) -> None:
        self.hooks = hooks
        self.model = model

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The class's own method, for those who look at its signature."""
        return functools.partial(type(self.model).generate, self.model)  # type: ignore[attr-defined]

    def __call__(
        self,
        *args: Any,
        adapter_names: Sequence[str | None] | None = None,
        prompt_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate; see the model's own ``generate``.

        Args:
            args: its arguments.
            adapter_names: which adapter each row of the inputs wants, None for the bare base.
            prompt_bias: what is added to the prompts of each row inside attention,
                ``(batch, 1 or length, hidden)``.
            kwargs: its arguments.

        Raises:
            AdapterNameError: a name is unknown.
            StateError: there is not one name a row, or rows cannot choose now.
        """
        setup, attributes = self.hooks.setup, self.model.__dict__
        bias_before = setup.prompt_bias
        if adapter_names is not None:
            setup.rows = self.hooks.rows(self.model, adapter_names, args, kwargs)
        if prompt_bias is not None:
            self.hooks.require_bias(self.model)
            setup.prompt_bias = prompt_bias.repeat_interleave(_copies_of_rows(kwargs), 0)
        # Static caches have their masks made outside of the model, where nothing is known of virtual tokens.
        makes_masks_inside = self._puts_virtual_tokens()
        if makes_masks_inside:
            attributes["create_masks_for_generate"] = _mask_as_it_is
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            if makes_masks_inside:
                attributes.pop("create_masks_for_generate", None)
            if adapter_names is not None:
                setup.rows = None
            setup.prompt_bias = bias_before

    def _puts_virtual_tokens(self) -> bool:
        """Whether an adapter may act in front of an input of the model now."""
        return any(isinstance(site, InputSite) and site.acts() for _, site in sites_in(self.model))


def _copies_of_rows(kwargs: Mapping[str, Any]) -> int:
    """How many rows ``generate`` makes of each row of its inputs: beams, or sequences that are sampled."""
    beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
    if int(beams) > 1:
        return int(beams)
    return int(kwargs.get("num_return_sequences") or 1)


def _mask_as_it_is(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask
