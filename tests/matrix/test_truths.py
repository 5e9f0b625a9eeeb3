"""Every registered method, on every base model, over the properties that all methods share."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import grafts
from grafts.lifecycle.plan import Target
from grafts.lifecycle.registry import parts_of
from grafts.methods import Method
from helpers.adapters import any_config, randomise, tensors_of
from helpers.bases import BY_NAME, Base
from helpers.closeness import assert_bitwise, assert_rounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMERS = [BY_NAME[name] for name in ("llama", "gpt2", "bert", "sdpa")]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_transformer = pytest.mark.parametrize("base", TRANSFORMERS, ids=lambda base: base.name)


def identity(model: nn.Module) -> dict[str, object]:
    """Everything about a model that attaching and detaching must leave alone, by identity where there is
    one.
    """
    return {
        "class": type(model),
        "types": {path: type(module) for path, module in model.named_modules()},
        "tensors": {
            name: id(p) for name, p in itertools.chain(model.named_parameters(), model.named_buffers())
        },
        "storage": {name: p.data_ptr() for name, p in model.named_parameters()},
        "values": {name: p.detach().clone() for name, p in model.state_dict().items()},
        "keys": list(model.state_dict()),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": {
            path: (
                list(m._forward_hooks),
                list(m._forward_pre_hooks),
                list(m._forward_hooks_with_kwargs),
                "forward" in vars(m),
            )
            for path, m in model.named_modules()
        },
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "training": {path: module.training for path, module in model.named_modules()},
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    values, now = before.pop("values"), after.pop("values")
    assert before == after
    assert all(torch.equal(values[name], now[name]) for name in values)


@each_dtype
def test_fresh_adapter_of_inert_method_leaves_output_bitwise(
    method: Method, config: grafts.AdapterConfig, base: Base, dtype: torch.dtype
) -> None:
    model = base.model(dtype)
    before = base.output(model)
    grafts.add(model, config, name="en")
    equal = torch.equal(base.output(model), before)
    assert (
        equal if method.inert else (not equal or dtype != torch.float32)
    )  # small starts may be lost in half precision
    assert base.output(model).dtype == before.dtype


def test_deactivated_and_deleted_adapter_leaves_output_bitwise(
    model: nn.Module, base: Base, config: grafts.AdapterConfig
) -> None:
    before = base.output(model)
    grafts.add(model, config, name="en")
    randomise(model, "en")
    moved = base.output(model)
    assert not torch.allclose(moved, before)
    assert torch.equal(base.output(grafts.deactivate(model)), before)
    assert torch.equal(base.output(grafts.activate(model, "en")), moved)
    assert torch.equal(base.output(grafts.delete(model, "en")), before)


def test_detach_restores_everything_by_identity(
    model: nn.Module, base: Base, config: grafts.AdapterConfig
) -> None:
    model.requires_grad_(True)
    next(model.parameters()).requires_grad_(False)
    before = identity(model)
    grafts.add(model, config, name="en")
    grafts.add(model, config, name="v1.0 of train")
    randomise(model, "en")
    base.output(model)
    grafts.detach(model)
    assert_same(before, identity(model))
    assert grafts.adapters(model) == {}


def test_deleting_the_last_adapter_restores_everything(
    model: nn.Module, config: grafts.AdapterConfig
) -> None:
    before = identity(model)
    grafts.add(model, config, name="a")
    grafts.add(model, config, name="b")
    grafts.delete(grafts.delete(model, "a"), "b")
    assert_same(before, identity(model))


def test_base_parameter_names_and_tensors_stay_while_attached(
    model: nn.Module, config: grafts.AdapterConfig
) -> None:
    names = {name: id(p) for name, p in model.named_parameters()}
    keys = set(model.state_dict())
    types = {path: type(module) for path, module in model.named_modules()}
    grafts.add(model, config, name="en")
    assert names.items() <= {name: id(p) for name, p in model.named_parameters()}.items()
    assert types.items() <= {path: type(module) for path, module in model.named_modules()}.items()
    assert keys < set(model.state_dict())
    added = model.state_dict().keys() - keys
    assert all(".grafts" in f".{name}" and ".en" in name for name in added)


@each_dtype
@each_transformer
def test_merged_output_equals_unmerged_within_rounding(
    method: Method, config: grafts.AdapterConfig, base: Base, dtype: torch.dtype
) -> None:
    model = base.model(dtype)
    plain = base.output(model).float()
    grafts.add(model, config, name="en")
    randomise(model, "en")
    unmerged = base.output(model).float()
    if not method.can_merge(config):
        with pytest.raises(grafts.MergeError, match="no exact merge"):
            grafts.merge(model, "en")
        return
    merged = base.output(grafts.merge(model, "en")).float()
    share = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    effect = (unmerged - plain).abs().max()
    assert (merged - unmerged).abs().max() <= share * max(effect, unmerged.abs().max())
    assert effect > 3 * (merged - unmerged).abs().max()


@each_dtype
@each_transformer
def test_unmerge_restores_the_base_bitwise_after_many_cycles(
    method: Method, config: grafts.AdapterConfig, base: Base, dtype: torch.dtype
) -> None:
    if not method.can_merge(config):
        pytest.skip("declares that it cannot be merged")
    model = base.model(dtype)
    before = identity(model)
    grafts.add(model, config, name="en")
    for cycle in range(5):
        randomise(model, "en", seed=cycle)
        unmerged = base.output(model)
        grafts.merge(model, "en")
        grafts.unmerge(model)
        assert torch.equal(base.output(model), unmerged)
    assert_same(before, identity(grafts.detach(model)))


def test_saved_adapter_loads_into_fresh_base_bitwise(
    adapted: nn.Module, base: Base, config: grafts.AdapterConfig, tmp_path: Path
) -> None:
    expected = base.output(adapted)
    grafts.save(adapted, "en", tmp_path / "deep" / "en")
    fresh = base.model()
    report = grafts.load(fresh, tmp_path / "deep" / "en", name="other")
    assert_bitwise(tensors_of(fresh, "other"), tensors_of(adapted, "en"))
    assert_rounded(base.output(fresh), expected)
    assert "'other'" in str(report)
    with safe_open(tmp_path / "deep" / "en" / "adapter_model.safetensors", "pt") as file:
        assert report.tensors == len(file.keys())
    assert not any(p.requires_grad for p in fresh.parameters())


def test_only_the_trained_adapter_gets_gradients_and_each_parameter_does(
    adapted: nn.Module, base: Base, config: grafts.AdapterConfig
) -> None:
    grafts.add(adapted, config, name="idle", activate=False, train=False)
    adapted.train()
    base.output(adapted).float().square().mean().backward()
    own = {id(p) for _, part in parts_of(adapted, "en") for p in part.parameters()}
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        assert (parameter.grad is not None) == (id(parameter) in own), name


def test_a_training_step_moves_the_adapter_and_not_the_base(adapted: nn.Module, base: Base) -> None:
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    base.output(adapted).square().mean().backward()
    optimizer.step()
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_deepcopy_is_independent_and_equal(adapted: nn.Module, base: Base) -> None:
    expected = base.output(adapted)
    twin = copy.deepcopy(adapted)
    assert_bitwise(tensors_of(twin, "en"), tensors_of(adapted, "en"))
    assert_rounded(base.output(twin), expected)
    grafts.detach(twin)
    assert not torch.equal(base.output(twin), expected)
    assert torch.equal(base.output(adapted), expected)
    assert not any("grafts" in name for name in twin.state_dict())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in twin.modules())


def test_pickle_round_trip_keeps_adapters(adapted: nn.Module, base: Base) -> None:
    expected, bare = base.output(adapted), base.output(grafts.deactivate(adapted))
    twin = pickle.loads(pickle.dumps(grafts.activate(adapted, "en")))
    assert_bitwise(tensors_of(twin, "en"), tensors_of(adapted, "en"))
    assert_rounded(base.output(twin), expected)
    assert_rounded(base.output(grafts.deactivate(twin)), bare)
    buffer = io.BytesIO()
    torch.save(adapted, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert_rounded(base.output(grafts.detach(again)), bare)
    assert torch.equal(base.output(adapted), expected)


@each_transformer
def test_compiled_in_one_graph_a_setup_and_none_again_on_switching_back(
    adapted: nn.Module, base: Base, config: grafts.AdapterConfig
) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    grafts.add(adapted, config, name="de", activate=False)
    randomise(adapted, "de", seed=9)
    compiled = torch.compile(adapted, fullgraph=True, backend=backend, dynamic=False)
    setups = ["en", "de", ()]
    expected = [base.output(grafts.activate(adapted, setup)) for setup in setups]
    for _ in range(2):
        for setup, wanted in zip(setups, expected, strict=True):
            grafts.activate(compiled, setup)
            torch.testing.assert_close(base.output(compiled), wanted)
    assert len(graphs) == len(setups)


def test_activation_checkpointing_of_both_kinds_gives_the_same_gradients(
    config: grafts.AdapterConfig,
) -> None:
    base = BY_NAME["llama"]

    def gradients(reentrant: bool | None) -> list[torch.Tensor]:
        model = base.model()
        grafts.add(model, config, name="en")
        randomise(model, "en")
        model.train()
        if reentrant is not None:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        base.output(model).square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients(None)
    for reentrant in (True, False):
        torch.testing.assert_close(gradients(reentrant), plain)


@each_dtype
@each_transformer
def test_adapter_is_stored_in_float32_and_output_keeps_the_base_dtype(
    config: grafts.AdapterConfig, base: Base, dtype: torch.dtype
) -> None:
    model = base.model(dtype)
    expected = base.output(model).dtype
    grafts.add(model, config, name="en")
    randomise(model, "en")
    assert {p.dtype for _, part in parts_of(model, "en") for p in part.parameters()} == {torch.float32}
    output = base.output(model)
    assert output.dtype == expected
    output.float().square().mean().backward()


def test_float64_base_gets_a_float64_adapter(config: grafts.AdapterConfig) -> None:
    base = BY_NAME["llama"]
    model = grafts.add(base.model(torch.float64), config, name="en")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_autocast_keeps_the_dtype_that_the_base_gives_there(adapted: nn.Module, base: Base) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on = base.output(adapted)
        off = base.output(grafts.deactivate(adapted))
    assert on.dtype == off.dtype
    assert not torch.equal(on, off)


def test_several_active_adapters_act_in_order_and_each_alone_is_unchanged(
    adapted: nn.Module, base: Base, config: grafts.AdapterConfig
) -> None:
    alone = base.output(adapted)
    grafts.add(adapted, config, name="de")
    randomise(adapted, "de", seed=8)
    both = base.output(grafts.activate(adapted, ["en", "de"]))
    assert not torch.allclose(both, alone)
    assert torch.equal(base.output(grafts.activate(adapted, "en")), alone)


def test_a_failing_add_leaves_the_model_untouched(
    model: nn.Module, method: Method, monkeypatch: pytest.MonkeyPatch, config: grafts.AdapterConfig
) -> None:
    before = identity(model)
    with pytest.raises(grafts.UnmatchedTargetError, match="no_such_module"):
        grafts.add(model, any_config(method, target_modules=["no_such_module"]), name="en")
    last = len(grafts.plan(model, config).targets)
    monkeypatch.setattr("grafts.lifecycle.build.build_fresh", _out_of_memory_at(last))
    with pytest.raises(MemoryError):
        grafts.add(model, config, name="en")
    assert_same(before, identity(model))


def _out_of_memory_at(number: int) -> Callable[..., object]:
    from grafts.lifecycle.build import build_fresh

    built = []

    def build(target: Target, host: nn.Module) -> object:
        built.append(target)
        if len(built) == number:
            raise MemoryError
        return build_fresh(target, host)

    return build


@pytest.mark.parametrize("base", [BY_NAME["llama"]], ids=["llama"])
def test_adding_to_a_model_on_the_meta_device_plans_without_memory(
    base: Base, config: grafts.AdapterConfig
) -> None:
    with torch.device("meta"):
        model = base.build()
    made = grafts.plan(model, config)
    assert made.parameters == sum(
        p.numel()
        for _, part in parts_of(grafts.add(base.model(), config), "default")
        for p in part.parameters()
    )
    grafts.add(model, config, name="en")
    assert {p.device.type for p in model.parameters()} == {"meta"}
