"""A Trainer on several processes that saves and resumes; started by `test_parallel`. ZERO_STAGE=2 or 3 has
DeepSpeed do it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import Trainer, TrainingArguments

import grafts
from grafts.lifecycle.sharding import is_main_process
from helpers import bases

torch.set_num_threads(1)
TEXTS = {
    "lora": "lora",
    "ia3": "ia3",
    "bottleneck": "seq_bn[reduction_factor=4]",
    "prefix_tuning": "prefix_tuning",
}


def rows() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(3, 50, (32, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def run(text: str, folder: Path, resume: Path | None = None) -> list[float]:
    model = grafts.init(bases.BY_NAME["llama"].model())
    torch.manual_seed(3)
    model.add_adapter(text)
    batch = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": batch,
        "optim": "sgd",
    }
    options |= {
        "learning_rate": 1.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    if stage := os.environ.get("ZERO_STAGE"):
        zero = {"stage": int(stage), "stage3_gather_16bit_weights_on_model_save": True}
        plan = {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": batch,
            "gradient_accumulation_steps": 1,
        }
        options["deepspeed"] = plan | {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    trainer = Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    folder, result = Path(sys.argv[1]), {}
    for name, text in TEXTS.items():
        result[name] = run(text, folder / name)
        result[f"{name}, resumed"] = run(text, folder / f"{name}-resumed", folder / name / "checkpoint-2")
    if is_main_process():
        (folder / "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)  # taking a gloo group down can wait for ever


if __name__ == "__main__":
    main()
