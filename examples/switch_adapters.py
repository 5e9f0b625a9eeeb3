"""Two adapters on one frozen transformer, trained on two tasks, switched per request, one shipped merged.

python examples/switch_adapters.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import grafts

torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
TASKS = {"upwards": torch.arange(1, 17).repeat(4, 1), "downwards": torch.arange(16, 0, -1).repeat(4, 1)}


def train(name: str, ids: torch.Tensor, steps: int = 60) -> float:
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        loss = base(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{name}: loss {loss.item():.4f}")
    return loss.item()


for task, sequence in TASKS.items():
    grafts.add(
        base,
        grafts.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"]),
        name=task,
    )
    assert train(task, sequence) < 0.2
print(*grafts.adapters(base).values(), sep="\n")

base.eval()
for task, sequence in TASKS.items():
    with grafts.active(base, task):
        made = base.generate(sequence[:1, :4], max_new_tokens=6, do_sample=False)
    print(f"{task}: {made[0].tolist()}")
    assert torch.equal(made[0], sequence[0, :10])

with tempfile.TemporaryDirectory() as folder:
    grafts.save(base, "upwards", Path(folder) / "upwards")
    print(grafts.load(base, Path(folder) / "upwards", name="again"))
    plain = grafts.detach(grafts.merge(base, "again"), keep_merged=True)
    plain.save_pretrained(Path(folder) / "plain")
    shipped = LlamaForCausalLM.from_pretrained(Path(folder) / "plain").eval()
    made = shipped.generate(TASKS["upwards"][:1, :4], max_new_tokens=6, do_sample=False)
assert torch.equal(made[0], TASKS["upwards"][0, :10])
print(f"merged, saved and loaded without grafts: {made[0].tolist()}")
