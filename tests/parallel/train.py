"""Train adapters of several methods for a few steps, on one process or several; started by `test_parallel`.

torchrun --nproc-per-node 2 tests/parallel/train.py {ddp,fsdp} FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from torch import nn

import grafts
from helpers import bases

torch.set_num_threads(1)
STEPS = 4
CONFIGS = {
    "lora": grafts.LoraConfig(r=4, target_modules="all-linear"),
    "ia3": grafts.IA3Config(),
    "bottleneck": grafts.BnConfig(
        mh_adapter=True, output_adapter=True, reduction_factor=4, non_linearity="relu"
    ),
    "prefix_tuning": grafts.PrefixTuningConfig(num_virtual_tokens=4),
    "lora with a head": grafts.LoraConfig(r=4, modules_to_save=["lm_head"]),
}


def built(config: grafts.AdapterConfig, saved: Path | None) -> nn.Module:
    model = bases.BY_NAME["llama"].model()
    torch.manual_seed(1)
    if saved is None:
        grafts.add(model, config)
    else:
        grafts.load(model, saved, train=True)
    return model.train()


def spread(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def steps(model: nn.Module, how: str, first: int, last: int) -> list[float]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if how != "single" else (0, 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
    losses = []
    for step in range(first, last):
        tokens = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(step))
        own = tokens[rank::world]
        optimizer.zero_grad()
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def main() -> None:
    how, folder = sys.argv[1], Path(sys.argv[2])
    if how != "single":
        dist.init_process_group("gloo")
    result: dict[str, object] = {}
    for name, config in CONFIGS.items():
        own = folder / name.replace(" ", "_")
        model = spread(built(config, None), how)
        losses = steps(model, how, 0, STEPS // 2)
        save(model, how, own / "middle")
        losses += steps(model, how, STEPS // 2, STEPS)
        save(model, how, own / "end")
        result[name] = losses
        resumed = spread(built(config, own / "middle"), how)
        result[f"{name}, resumed"] = steps(resumed, how, STEPS // 2, STEPS)
        save(resumed, how, own / "resumed")
        if how == "fsdp" and name == "lora":
            try:
                grafts.merge(model)
                result["merge"] = "done"
            except grafts.MergeError as error:
                result["merge"] = str(error)
            other = bases.BY_NAME["llama"].model()
            spread(other, how)
            try:
                grafts.add(other, config)
                result["add"] = "done"
            except grafts.StateError as error:
                result["add"] = str(error)
            grafts.load(other, own / "end")
            with torch.no_grad():
                loaded, trained = other.eval()(bases.ids()).logits, model.eval()(bases.ids()).logits
            result["loaded into a sharded base"] = float((loaded - trained).abs().max())
    if how == "single" or dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    if how != "single":
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # taking a gloo group down can wait for ever


def save(model: nn.Module, how: str, folder: Path) -> None:
    if how == "ddp":
        if dist.get_rank() == 0:
            grafts.save(model, "default", folder)
        dist.barrier()
    else:
        grafts.save(model, "default", folder)


if __name__ == "__main__":
    main()
