"""AdaLoRA: the course of training against `peft`, and that it drives itself under every way of training."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from helpers.bases import BY_NAME, ids
from helpers.closeness import assert_all_rounded, assert_rounded
from helpers.peers import peft

LLAMA = BY_NAME["llama"]
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 4, "total_step": 14, "deltaT": 2}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings(
        "ignore:.*rank_pattern keys did not match.*:RuntimeWarning"
    ),  # of AdaLoRA's own files
]


def adapted(**options: object) -> nn.Module:
    torch.manual_seed(3)
    config = grafts.AdaLoraConfig(
        **(SCHEDULE | {"target_modules": ["q_proj", "v_proj", "down_proj"]} | options)
    )
    return grafts.add(LLAMA.model(), config, name="en")


def optimizer_of(model: nn.Module, lr: float = 5e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model: nn.Module, steps: int = 14, micro: int = 1) -> list[int]:
    """Train for some steps; how many ranks are left after each."""
    optimizer, left = optimizer_of(model), []
    for step in range(steps):
        for part in range(micro):
            batch = ids(rows=4).roll(step)[part * 4 // micro : (part + 1) * 4 // micro]
            (model(input_ids=batch, labels=batch).loss / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
        left.append(sum(grafts.rank_allocator(model, "en").ranks.values()))
    return left


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": p.detach().clone()
        for path, part in parts_of(model, "en")
        for name, p in part.named_parameters()
    }


def test_training_takes_the_course_of_peft(tmp_path: Path) -> None:
    """Same start, same data: `peft` with its penalty in the loss and its call after each step, and we with
    neither.
    """
    options = SCHEDULE | {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(LLAMA.model(), peft.AdaLoraConfig(**options))
    theirs.save_pretrained(tmp_path / "start")
    ours = LLAMA.model()
    grafts.load(ours, tmp_path / "start", name="en", train=True)
    left = train(ours)

    optimizer = optimizer_of(theirs)
    for step in range(14):
        batch = ids(rows=4).roll(step)
        theirs(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    grafts.save(ours, "en", tmp_path / "ours")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {key: x.shape for key, x in a.items()} == {key: x.shape for key, x in b.items()}
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
    masks = [
        json.loads((tmp_path / who / "adapter_config.json").read_text())["rank_pattern"]
        for who in ("ours", "theirs")
    ]
    assert masks[0] == masks[1]
    assert left[:3] == [24] * 3
    assert left[-1] == 12
    torch.testing.assert_close(LLAMA.output(ours.eval()), LLAMA.output(theirs.eval()), rtol=1e-4, atol=1e-4)


def test_penalty_is_the_gradient_of_its_formula() -> None:
    model = adapted(orth_reg_weight=0.7)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    parts = [part for _, part in parts_of(model, "en")]
    matrices = [p for part in parts for p in (part.lora_A, part.lora_B)]
    norms = [
        (m @ m.T - torch.eye(4)).norm() if m.shape[0] == 4 else (m.T @ m - torch.eye(4)).norm()
        for m in matrices
    ]
    wanted = torch.autograd.grad(0.7 * sum(norms) / len(norms), matrices)
    for p in matrices:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in matrices]
    optimizer.step()
    for p, old, gradient in zip(matrices, before, wanted, strict=True):
        torch.testing.assert_close(old - p, gradient)


def test_budget_falls_cubically_between_the_two_ends() -> None:
    allocator = grafts.rank_allocator(adapted(), "en")
    expected = [int((24 - 12) * (1 - (step - 3) / 7) ** 3 + 12) for step in range(4, 10)]
    assert [allocator.budget(step) for step in (0, 3)] == [24, 24]
    assert [allocator.budget(step) for step in range(4, 10)] == expected
    assert [allocator.budget(step) for step in (10, 14, 99)] == [12, 12, 12]


def test_pruned_file_loads_at_its_size_with_the_same_output_and_can_be_trained_further(
    tmp_path: Path,
) -> None:
    model = adapted()
    train(model)
    expected = LLAMA.output(model)
    grafts.save(model, "en", tmp_path)
    fresh = LLAMA.model()
    grafts.load(fresh, tmp_path, name="en", train=True)
    torch.testing.assert_close(LLAMA.output(fresh), expected, rtol=1e-5, atol=1e-6)
    assert sum(len(part.lora_E) for _, part in parts_of(fresh, "en")) == 12
    theirs = peft.PeftModel.from_pretrained(LLAMA.model(), tmp_path).eval()
    torch.testing.assert_close(LLAMA.output(theirs), expected, rtol=1e-5, atol=1e-5)
    before = tensors(fresh)
    assert train(fresh, steps=3)[-1] == 12
    assert not all(torch.equal(before[name], p) for name, p in tensors(fresh).items())
    grafts.save(fresh, "en", tmp_path / "again")
    grafts.load(LLAMA.model(), tmp_path / "again")


def test_saved_before_the_ranks_are_final_it_holds_all_of_them(tmp_path: Path) -> None:
    model = adapted()
    train(model, steps=7)
    grafts.save(model, "en", tmp_path)
    fresh = LLAMA.model()
    grafts.load(fresh, tmp_path, name="en")
    assert_rounded(LLAMA.output(fresh), LLAMA.output(model))


def test_accumulated_gradients_are_one_step() -> None:
    whole, split = adapted(), adapted()
    assert train(whole) == train(split, micro=2)
    for name, p in tensors(whole).items():
        torch.testing.assert_close(tensors(split)[name], p, rtol=1e-3, atol=1e-4)


def test_driving_by_hand_is_the_same_and_doing_both_is_an_error() -> None:
    model, twin = adapted(), adapted()
    train(model)
    allocator = grafts.rank_allocator(twin, "en")
    with pytest.raises(grafts.StateError, match="count each step twice"):
        allocator.update_and_allocate(1)
    allocator.drive_by_hand()
    optimizer = optimizer_of(twin)
    for step in range(14):
        batch = ids(rows=4).roll(step)
        twin(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        allocator.update_and_allocate(step + 1)
        optimizer.zero_grad()
    assert_all_rounded(tensors(twin), tensors(model))
    with pytest.raises(grafts.StateError, match="14 steps of the optimizer already"):
        grafts.rank_allocator(model, "en").drive_by_hand()


def test_a_step_without_known_length_is_an_error_that_trains_nothing() -> None:
    model = adapted(total_step=None)
    before = tensors(model)
    optimizer = optimizer_of(model)
    LLAMA.output(model).square().mean().backward()
    with pytest.raises(grafts.ConfigError, match="give total_step in AdaLoraConfig"):
        optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in tensors(model).items())
    grafts.rank_allocator(model, "en").set_total_step(20)
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, "leave no step of total_step=10"),
        ({"target_r": 8, "init_r": 4}, "at most init_r, which is 4"),
        ({"deltaT": 0}, "a whole number of at least 1"),
        ({"beta1": 1.0}, "above 0 and below 1"),
        ({"orth_reg_weight": -1}, "at least 0"),
        ({"use_dora": True}, "has no field 'use_dora'"),
    ],
)
def test_schedule_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.AdaLoraConfig(**options)


def test_optimizers_of_others_are_left_alone() -> None:
    model, other = adapted(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert grafts.rank_allocator(model, "en").step == 0
    with pytest.raises(grafts.AdapterNameError, match="no AdaLoRA adapter is called 'de'"):
        grafts.rank_allocator(model, "de")


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"]
)
def test_a_copy_in_the_middle_of_training_goes_on_as_the_first(how: object) -> None:
    model = adapted()
    train(model, steps=6)
    twin = how(model)  # type: ignore[operator]
    assert train(model, steps=8) == train(twin, steps=8)
    assert_all_rounded(tensors(twin), tensors(model))


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_loss_of_mixed_precision_changes_nothing_and_a_skipped_step_does_not_count(
    fused: bool,
) -> None:
    plain, scaled = adapted(), adapted()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, fused=fused)
        for model in (plain, scaled)
    ]
    for step in range(14):
        batch = ids(rows=4).roll(step)
        plain(input_ids=batch, labels=batch).loss.backward()
        optimizers[0].step()
        scaler.scale(scaled(input_ids=batch, labels=batch).loss).backward()
        if step == 2:  # once more, with a gradient that overflows
            first = next(p for p in scaled.parameters() if p.requires_grad)
            good = first.grad.clone()
            first.grad.fill_(float("inf"))
            scaler.step(optimizers[1])
            scaler.update(1024.0)
            assert grafts.rank_allocator(scaled, "en").step == 2
            first.grad.copy_(good)
            if not fused:
                scaler.scale(torch.zeros(()))
                for p in scaled.parameters():
                    p.grad = None
                scaler.scale(scaled(input_ids=batch, labels=batch).loss).backward()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert grafts.rank_allocator(scaled, "en").ranks == grafts.rank_allocator(plain, "en").ranks
    for name, p in tensors(plain).items():
        torch.testing.assert_close(tensors(scaled)[name], p, rtol=1e-3, atol=1e-4)


def test_autocast_trains_in_bfloat16() -> None:
    model = adapted()
    optimizer = optimizer_of(model)
    for step in range(14):
        batch = ids(rows=4).roll(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(grafts.rank_allocator(model, "en").ranks.values()) == 12


class TextData(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = ids(rows=16)[index]
        return {"input_ids": row, "labels": row}


def trainer(model: nn.Module, folder: Path, **options: object) -> object:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=TextData())


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_tells_the_length_where_it_is_not_given(tmp_path: Path) -> None:
    model = adapted(total_step=None, tinit=1, tfinal=2)
    trainer(model, tmp_path, num_train_epochs=3, gradient_accumulation_steps=2).train()
    allocator = grafts.rank_allocator(model, "en")
    assert (allocator.total_step, allocator.step) == (6, 6)
    assert sum(allocator.ranks.values()) == 12


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_that_is_too_short_is_an_error_before_training(tmp_path: Path) -> None:
    model = adapted(total_step=None)
    before = tensors(model)
    with pytest.raises(grafts.ConfigError, match="leave no step of total_step=4"):
        trainer(model, tmp_path, num_train_epochs=1).train()
    assert all(torch.equal(before[name], p) for name, p in tensors(model).items())


def _worker(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = adapted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    for step in range(14):
        batch = ids(rows=4).roll(step)[rank * 2 : rank * 2 + 2]
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(tensors(model), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(
        0
    )  # taking the group down can wait for ever for a thread of its own that wants the interpreter's lock


def test_two_processes_take_the_same_course_as_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = adapted()
    train(alone)
    for name, p in tensors(alone).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], p, rtol=1e-3, atol=1e-4)
