"""The module site beside modules that carry hooks of others or a ``forward`` of their own."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grafts
from helpers.adapters import randomise
from helpers.bases import BY_NAME

LLAMA = BY_NAME["llama"]


def adapted(model: nn.Module, **options: object) -> nn.Module:
    torch.manual_seed(0)
    grafts.add(model, grafts.LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options), name="en")
    randomise(model, "en")
    return model


@pytest.fixture
def expected() -> Tensor:
    return LLAMA.output(adapted(LLAMA.model()))


def test_module_with_an_instance_level_forward_keeps_it(expected: Tensor) -> None:
    model = LLAMA.model()
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            original = module.forward

            @functools.wraps(original)
            def forward(x: Tensor, original: object = original) -> Tensor:
                calls.append(1)
                return original(x)  # type: ignore[operator]

            module.forward = forward  # type: ignore[method-assign]
    instance = {path: vars(m)["forward"] for path, m in model.named_modules() if "forward" in vars(m)}
    adapted(model)
    torch.testing.assert_close(LLAMA.output(model), expected)
    assert len(calls) == len(instance)
    grafts.detach(model)
    assert {path: vars(m)["forward"] for path, m in model.named_modules() if "forward" in vars(m)} == instance


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_others_go_on_and_stay(when: str) -> None:
    model = LLAMA.model()
    seen: list[Tensor] = []
    if when == "after":
        adapted(model)
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda m, args, y: seen.append(y.clone())
    )
    if when == "before":
        adapted(model)
    LLAMA.output(model)
    assert len(seen) == 1
    grafts.detach(model)
    LLAMA.output(model)
    assert len(seen) == 2
    hook.remove()
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


def dispatched(model: nn.Module, offload: str, folder: Path) -> nn.Module:
    """The model with parts on CPU, run from the meta device or from disk, as `device_map` leaves it."""
    import accelerate

    if offload == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_model_dispatched_by_accelerate_gives_the_same_output_and_trains(
    offload: str, expected: Tensor, tmp_path: Path
) -> None:
    model = dispatched(LLAMA.model(), offload, tmp_path)
    bare = LLAMA.output(model)
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    adapted(model)
    torch.testing.assert_close(LLAMA.output(model), expected)
    LLAMA.output(model).mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(grafts.MergeError, match="offloaded"):
        grafts.merge(model)
    assert torch.equal(LLAMA.output(grafts.detach(model)), bare)


def test_adapted_model_can_be_dispatched_afterwards(expected: Tensor, tmp_path: Path) -> None:
    model = dispatched(adapted(LLAMA.model()), "cpu", tmp_path)
    torch.testing.assert_close(LLAMA.output(model), expected)


def test_offloaded_head_cannot_be_copied_and_says_so(tmp_path: Path) -> None:
    model = dispatched(LLAMA.model(), "cpu", tmp_path)
    with pytest.raises(grafts.ConfigError, match=r"adapter 'en': 'lm_head'.*offloaded"):
        grafts.add(model, grafts.LoraConfig(modules_to_save=["lm_head"]), name="en")
    assert grafts.adapters(model) == {}


def test_copy_follows_activation_and_takes_any_arguments() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.scale + shift, shift

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), Head()

        def forward(self, x: Tensor) -> Tensor:
            y, shift = self.head(self.body(x), shift=x)
            return y + shift

    model, x = Model(), torch.randn(2, 4)
    before = model(x)
    grafts.add(model, grafts.LoraConfig(target_modules=["body"], modules_to_save=["head"]), name="en")
    assert torch.equal(model(x), before)
    model.head.grafts.parts("en")[0].module.scale.data.fill_(2.0)
    assert not torch.equal(model(x), before)
    with grafts.active(model, ()):
        assert torch.equal(model(x), before)


def test_copy_of_a_half_precision_head_is_stored_in_float32_and_bitwise_inert() -> None:
    bert = BY_NAME["bert"]
    model = bert.model(torch.bfloat16)
    before = bert.output(model)
    grafts.add(model, grafts.LoraConfig(task_type="SEQ_CLS"), name="en")
    assert torch.equal(bert.output(model), before)
    assert model.classifier.grafts.parts("en")[0].module.weight.dtype == torch.float32
    bert.output(model).float().sum().backward()
    assert model.classifier.grafts.parts("en")[0].module.weight.grad is not None


def test_second_copy_starts_from_the_base_and_not_from_the_first() -> None:
    bert = BY_NAME["bert"]
    model = bert.model()
    before = bert.output(model)
    grafts.add(model, grafts.LoraConfig(task_type="SEQ_CLS"), name="en")
    randomise(model, "en")
    trained = bert.output(model)
    grafts.add(model, grafts.LoraConfig(task_type="SEQ_CLS"), name="de")
    assert torch.equal(bert.output(model), before)
    assert not any(
        ".grafts." in name for name, _ in model.classifier.grafts.parts("de")[0].module.named_modules()
    )
    assert torch.equal(bert.output(grafts.activate(model, "en")), trained)


def test_bias_of_a_module_that_may_not_add_it_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.bias

    model = nn.Sequential(nn.Linear(4, 4), Odd())
    with pytest.raises(
        grafts.UnsupportedTargetError, match=r"adapter 'en': '1'.*Odd is not known to add its bias"
    ):
        grafts.add(model, grafts.LoraConfig(target_modules=["0"], bias="all"), name="en")


def test_output_is_written_into_only_where_nobody_else_holds_it() -> None:
    """A hook that came first, an instance-level forward or a class of its own may keep the output: then it
    stays.
    """

    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    x = torch.randn(2, 3, 5)
    for how in ("plain", "hook", "global hook", "instance", "class"):
        torch.manual_seed(0)
        layer = Keeping(5, 7) if how == "class" else nn.Linear(5, 7)
        held: list[Tensor] = []
        hooks = []
        if how == "hook":
            hooks.append(layer.register_forward_hook(lambda m, args, y, held=held: held.append(y)))
        if how == "global hook":
            hooks.append(
                nn.modules.module.register_module_forward_hook(lambda m, args, y, held=held: held.append(y))
            )
        if how == "instance":
            original = layer.forward

            def forward(x: Tensor, original: object = original, held: list[Tensor] = held) -> Tensor:
                held.append(original(x))  # type: ignore[operator]
                return held[-1]

            layer.forward = forward  # type: ignore[method-assign]
        with torch.no_grad():
            bare = nn.functional.linear(x, layer.weight, layer.bias)
        adapted(layer)
        held.clear()
        moved = layer(x)
        for hook in hooks:
            hook.remove()
        kept = [layer.kept] if how == "class" else held[:1]
        assert not torch.allclose(moved, bare)
        assert all(torch.equal(y, bare) for y in kept), how
        assert len(kept) == (how != "plain")


@pytest.mark.filterwarnings("ignore")
def test_fused_encoder_of_pytorch_does_not_pass_the_adapter_by() -> None:
    """In evaluation without gradients `nn.TransformerEncoder` reads weights and calls no linear, unless there
    are hooks.
    """
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        bare = model(x)
    adapted(model, target_modules=["linear1", "linear2"])
    with torch.no_grad():
        without = model(x)
    torch.testing.assert_close(without, model(x).detach())
    assert not torch.allclose(without, bare, atol=1e-3)


def test_model_made_narrower_after_adding_still_runs() -> None:
    bert = BY_NAME["bert"]
    model = adapted(bert.model(), task_type="SEQ_CLS").to(torch.bfloat16)
    assert bert.output(model).dtype == torch.bfloat16
