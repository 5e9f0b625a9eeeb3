"""`check_method`: the properties that a method has to have, and those that its record claims."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grafts.checkpoints.load import load
from grafts.checkpoints.save import save
from grafts.config import AdapterConfig
from grafts.errors import ConfigError
from grafts.lifecycle.activate import activate, active, deactivate
from grafts.lifecycle.attach import add, delete, detach
from grafts.lifecycle.combine import combine
from grafts.lifecycle.merge import merge, unmerge
from grafts.lifecycle.registry import parts_of
from grafts.lifecycle.resolve import plan
from grafts.lifecycle.status import adapters
from grafts.methods._registry import Method, method_named
from grafts.testing.models import small_model, words


@dataclass
class MethodReport:
    """What `check_method` has looked at.

    Attributes:
        method: the method's name.
        held: the properties that were checked and hold.
        not_claimed: those that the method does not claim, each with the reason.
    """

    method: str
    held: list[str] = field(default_factory=list)
    not_claimed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line a property."""
        lines = [f"{self.method}:"]
        lines += [f"  holds        {name}" for name in self.held]
        lines += [f"  not claimed  {name} ({reason})" for name, reason in self.not_claimed.items()]
        return "\n".join(lines)


def check_method(name: str, build: Callable[[], nn.Module] | None = None, **options: Any) -> MethodReport:
    """Run a method through the properties that every method has, and those that its record claims.

    Args:
        name: the method's, as it is registered.
        build: makes a fresh base model, the same each time, frozen and in evaluation mode, which is called
            with ``input_ids`` and gives one tensor; by default a small transformer in which every kind has a
            place.
        options: fields of the config, over those of the method's own example.

    Returns:
        What was checked; ``print`` it.

    Raises:
        AssertionError: a property does not hold; names it, and the method.
        ConfigError: there is no such method, or its example config does not fit the model.
    """
    method = method_named(name)
    check = _Check(method, build or small_model, options)
    report = MethodReport(name)
    for prop in _PROPERTIES:
        reason = prop.not_claimed(method, check.config)
        if reason is not None:
            report.not_claimed[prop.what] = reason
            continue
        try:
            prop.check(check)
        except AssertionError as error:
            raise AssertionError(f"{name}: {prop.what} does not hold: {error}") from error
        except Exception as error:
            error.add_note(f"grafts.testing.check_method({name!r}) met this while it checked: {prop.what}")
            raise
        report.held.append(prop.what)
    return report


class _Check:
    """One method on one base model."""

    def __init__(self, method: Method[Any], build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
        self.method = method
        self.build = build
        self.config: AdapterConfig = method.example(**options)

    def adapted(self, name: str = "one", seed: int = 5) -> nn.Module:
        """A fresh model with an adapter that is as after training."""
        model = self.build()
        add(model, self.config, name=name)
        randomise(model, name, seed)
        return model

    def output(self, model: nn.Module, rows: int = 3, **arguments: Any) -> Tensor:
        """The model's output, without gradients."""
        with torch.no_grad():
            result: Tensor = model(input_ids=words(rows), **arguments)
        return result


def randomise(model: nn.Module, name: str, seed: int = 5, scale: float = 0.3) -> None:
    """Give an adapter values as training would: nothing is zero any more, and the output moves.

    Args:
        model: the model that carries it.
        name: the adapter's.
        seed: of the random numbers.
        scale: their deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, part in parts_of(model, name):
            for key, parameter in part.named_parameters():
                if key not in part.frozen:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise.to(parameter) * scale)


def _require_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Compare what was computed in another order: a thousand roundings of the largest number."""
    reach = 1000 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    distance = float((actual - expected).abs().max())
    assert distance <= reach, f"{what} differ by {distance:.2g}, and {reach:.2g} is what rounding explains"


def _require_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Compare bit for bit what the same tensors compute."""
    assert torch.equal(actual, expected), f"{what} are not bitwise the same"


# The properties


def _documents_its_options(check: _Check) -> None:
    for option in dataclasses.fields(check.config):
        assert option.metadata.get("help"), f"{option.name} has no documentation"
    again = type(check.config).from_dict(check.config.to_dict())
    assert again == check.config, "the config is not what its plain data gives again"
    unknown: dict[str, Any] = {"no_such_option": 1}
    try:
        type(check.config)(**unknown)
    except ConfigError:
        return
    raise AssertionError("an unknown option is accepted")


def _plans_without_touching(check: _Check) -> None:
    model = check.build()
    before = list(model.state_dict())
    planned = plan(model, check.config)
    assert planned.parameters > 0, "the plan has no parameters"
    assert list(model.state_dict()) == before, "planning changed the model"
    assert not adapters(model), "planning attached something"


def _is_inert(check: _Check) -> None:
    model = check.build()
    expected = check.output(model)
    add(model, check.config, name="one")
    _require_same(check.output(model), expected, "outputs with a fresh adapter")


def _acts(check: _Check) -> None:
    bare = check.output(check.build())
    changed = check.output(check.adapted())
    assert changed.shape == bare.shape, f"the output is {tuple(changed.shape)}, and was {tuple(bare.shape)}"
    assert not torch.equal(changed, bare), "an adapter that is not zero changes nothing"


def _leaves_nothing_behind(check: _Check) -> None:
    model = check.build()
    names = list(model.state_dict())
    tensors = dict(model.named_parameters())
    expected = check.output(model)
    add(model, check.config, name="one")
    # A fresh adapter may change nothing, and so show nothing.
    randomise(model, "one")
    deactivate(model)
    _require_same(check.output(model), expected, "outputs while no adapter is active")
    activate(model, "one")
    delete(model, "one")
    _require_same(check.output(model), expected, "outputs after the adapter was deleted")
    add(model, check.config, name="two")
    detach(model)
    assert list(model.state_dict()) == names, "detaching leaves tensors"
    for name, parameter in model.named_parameters():
        assert parameter is tensors[name], f"{name} is another tensor after detaching"


def _trains_itself_only(check: _Check) -> None:
    model = check.build()
    base = dict(model.named_parameters())
    add(model, check.config, name="one")
    randomise(model, "one")
    model.train()
    model(input_ids=words()).square().mean().backward()
    for name, parameter in base.items():
        assert parameter.grad is None, f"{name} of the base got a gradient"
    for path, part in parts_of(model, "one"):
        for name, parameter in part.named_parameters():
            trained = name not in part.frozen
            assert (parameter.grad is not None) == trained, (
                f"{path}: {name} has no gradient, or should have none"
            )


def _saves_and_loads(check: _Check) -> None:
    model = check.adapted()
    expected = check.output(model)
    with tempfile.TemporaryDirectory() as folder:
        save(model, "one", Path(folder))
        again = check.build()
        load(again, Path(folder), name="one")
    _require_close(check.output(again), expected, "outputs of the loaded adapter")
    values = {}
    for path, part in parts_of(model, "one"):
        for name, tensor in part.file_tensors().items():
            values[path, name] = tensor
    for path, part in parts_of(again, "one"):
        for name, tensor in part.file_tensors().items():
            assert torch.equal(tensor, values[path, name]), f"{path}: {name} is not what was saved"


def _copies_and_pickles(check: _Check) -> None:
    model = check.adapted()
    expected = check.output(model)
    twin = copy.deepcopy(model)
    _require_close(check.output(twin), expected, "outputs of a copy")
    randomise(twin, "one", seed=6)
    _require_same(check.output(model), expected, "outputs after the copy was changed")
    again = pickle.loads(pickle.dumps(model))
    _require_close(check.output(again), expected, "outputs of the unpickled model")


def _keeps_formats(check: _Check) -> None:
    model = check.build().to(torch.bfloat16)
    add(model, check.config, name="one")
    for path, part in parts_of(model, "one"):
        for name, parameter in part.named_parameters():
            stays = name in part.own_dtypes
            assert stays or parameter.dtype == torch.float32, f"{path}: {name} is stored as {parameter.dtype}"
    output = check.output(model)
    assert output.dtype == torch.bfloat16, f"the output of a bfloat16 model is {output.dtype}"


def _stacks(check: _Check) -> None:
    model = check.adapted()
    alone = check.output(model)
    add(model, check.config, name="two")
    randomise(model, "two", seed=6)
    both = check.output(activate(model, ["one", "two"]))
    assert not torch.equal(both, alone), "a second active adapter changes nothing"
    with active(model, "one"):
        _require_same(check.output(model), alone, "outputs of the first adapter alone")


def _serves_rows(check: _Check) -> None:
    model = check.adapted()
    add(model, check.config, name="two", activate=False)
    randomise(model, "two", seed=6)
    # One row with each adapter, and one with none between them.
    mixed = check.output(model, adapter_names=["one", None, "two"])
    for row, names in enumerate(("one", (), "two")):
        with active(model, names):
            expected = check.output(model)[row]
        _require_close(mixed[row], expected, f"row {row} and the same row by itself")


def _merges(check: _Check) -> None:
    model = check.adapted()
    expected = check.output(model)
    weights = {name: value.clone() for name, value in check.build().state_dict().items()}
    # Twice, so that what the first time leaves behind shows in the second.
    for _ in range(2):
        merge(model)
        _require_close(check.output(model), expected, "outputs merged and unmerged")
        unmerge(model)
    detach(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), f"{name} is not what it was before merging"


def _combines(check: _Check) -> None:
    for way in check.method.combinations:
        model = check.adapted()
        expected = check.output(model)
        options: dict[str, Any] = {}
        if way.removesuffix("_svd") in ("ties", "dare_linear", "dare_ties", "magnitude_prune"):
            options["density"] = 1.0
        combine(model, ["one"], [1.0], name="same", method=way, **options)
        # The square roots and decompositions of some ways round more than a product does.
        distance = float((check.output(model) - expected).abs().max())
        reach = 1e-3 * float(expected.abs().max())
        assert distance <= reach, f"{way!r} of one adapter with weight 1 is off by {distance:.2g}"


@dataclass(frozen=True)
class _Property:
    """One property: what it says, how it is checked, and when a method does not claim it."""

    what: str
    check: Callable[[_Check], None]
    not_claimed: Callable[[Method[Any], AdapterConfig], str | None] = lambda method, config: None


def _unless(holds: Callable[[Method[Any], AdapterConfig], bool], reason: str) -> Any:
    """The property is claimed where ``holds``."""
    return lambda method, config: None if holds(method, config) else reason


_PROPERTIES = (
    _Property("every option is documented, checked and plain data", _documents_its_options),
    _Property("planning touches nothing", _plans_without_touching),
    _Property(
        "a fresh adapter leaves the output bitwise as it was",
        _is_inert,
        _unless(lambda method, config: method.inert, "its record does not say inert"),
    ),
    _Property("an adapter that is not zero changes the output", _acts),
    _Property("nothing is left behind by deactivating, deleting and detaching", _leaves_nothing_behind),
    _Property("all of its parameters are trained, and none of the base's", _trains_itself_only),
    _Property("what was saved loads into a fresh base", _saves_and_loads),
    _Property("copies and pickles are independent and equal", _copies_and_pickles),
    _Property("tensors are stored in float32, and the output keeps the base's format", _keeps_formats),
    _Property("several adapters act one after the other", _stacks),
    _Property(
        "rows of a batch with other adapters give what they give alone",
        _serves_rows,
        _unless(lambda method, config: method.routable, "its record says that rows cannot choose"),
    ),
    _Property(
        "merging computes the same, and unmerging gives the base back bitwise",
        _merges,
        _unless(lambda method, config: method.can_merge(config), "it has no exact merge"),
    ),
    _Property(
        "one adapter with weight 1 is that adapter, in every way of combining",
        _combines,
        _unless(lambda method, config: bool(method.combinations), "its record names no way"),
    ),
)
