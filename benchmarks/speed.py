"""How fast training steps and the verbs are, as ratios to the frozen base, to the limit, and to `peft`, in
one run.

    python -m benchmarks.speed [--rounds 15] [--sizes small medium large] [--methods lora ia3 ...]
    [--only-steps]

- floor: the frozen base's own forward, and forward + backward down to its input embeddings.
- limit: the floor plus the adapter's own floating-point work on the same shapes: for LoRA six matrix products
  a target, for (IA)3 one multiplication forward and backward and one of the gradient with the activation,
  summed over the batch; inside attention the products of queries with the keys and of weights with the values
  of the prompt or prefix, and for a prompt its projections.
- grafts, peft: the same model with LoRA or DoRA r=16 on every linear, or (IA)3 on every key, value and down
  projection; no dropout. DoRA is measured beside LoRA. An adaption prompt has 10 tokens in every layer, a
  prefix 20.

With --only-steps what today's file holds of other methods and of the verbs stays in it.

Every round measures all of them, in an order that rotates, and a figure is the median of the rounds' ratios.
On a CPU one thread and the process's CPU time; on a GPU device events. Writes
benchmarks/results/DATE-speed-DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import grafts
from grafts.lifecycle.registry import parts_of

RANK = 16
METHODS = ["lora", "ia3", "dora", "adaption_prompt", "prefix_tuning"]
SIZES = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "rows": 4,
    },
    "medium": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "rows": 4,
    },
    "large": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "rows": 2,
    },
}
LENGTH, VOCABULARY = 128, 1000
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
Step = Callable[[], object]


def cost(step: Step, repeat: int = 1) -> float:
    """Seconds of one call: device events on a GPU, CPU time of the process elsewhere."""
    if CUDA:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeat
    before = time.process_time()
    for _ in range(repeat):
        step()
    return (time.process_time() - before) / repeat


def interleaved(steps: dict[str, Step], rounds: int, repeat: int = 1) -> dict[str, list[float]]:
    """The cost of each step in each round; the order rotates from round to round."""
    names = list(steps)
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(cost(steps[name], repeat))
    return found


def ratio(found: dict[str, list[float]], name: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(found[name], found[to], strict=True))


def llama(size: str) -> nn.Module:
    sizes = {key: value for key, value in SIZES[size].items() if key != "rows"}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, num_key_value_heads=sizes["num_attention_heads"])
    return LlamaForCausalLM(config).to(DEVICE, DTYPE).requires_grad_(False)


def config(library: object, method: str = "lora", layers: int | None = None) -> object:
    if method == "ia3":
        targets = ["k_proj", "v_proj", "down_proj"]
        return library.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])  # type: ignore[attr-defined]
    if method == "adaption_prompt":
        return library.AdaptionPromptConfig(adapter_len=10, adapter_layers=layers, task_type="CAUSAL_LM")  # type: ignore[attr-defined]
    if method == "prefix_tuning":
        return library.PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")  # type: ignore[attr-defined]
    options = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return library.LoraConfig(**options, use_dora=method == "dora")  # type: ignore[attr-defined]


def forward(model: nn.Module, embeddings: Tensor) -> Step:
    def step() -> None:
        with torch.no_grad():
            model(inputs_embeds=embeddings)

    return step


def training(model: nn.Module, embeddings: Tensor) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        embeddings.grad = None
        for parameter in trained:
            parameter.grad = None
        model(inputs_embeds=embeddings).logits.sum().backward()

    return step


def products(model: nn.Module, rows: int, *, backward: bool) -> Step:
    """The adapter's matrix products alone, into buffers that are there: two a target forward, four more
    backward.
    """
    jobs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _, part in parts_of(model, "default"):
        a, b = (p.detach().to(DTYPE) for p in (part.lora_A, part.lora_B))
        x, y = (
            torch.randn(rows * LENGTH, width, device=DEVICE, dtype=DTYPE)
            for width in (a.shape[1], b.shape[0])
        )
        u = torch.randn(rows * LENGTH, RANK, device=DEVICE, dtype=DTYPE)
        pairs = [(x, a.T), (u, b.T)]
        if backward:
            pairs += [(y, b), (y.T, u), (u, a), (u.T, x)]
        jobs += [
            (left, right, torch.empty(left.shape[0], right.shape[1], device=DEVICE, dtype=DTYPE))
            for left, right in pairs
        ]

    def step() -> None:
        for left, right, result in jobs:
            torch.mm(left, right, out=result)

    return step


def scalings(model: nn.Module, rows: int, *, backward: bool) -> Step:
    """(IA)3's multiplications alone, into buffers that are there."""
    jobs = []
    for _, part in parts_of(model, "default"):
        vector = part.ia3_l.detach().flatten().to(DTYPE)
        y, g = (torch.randn(rows, LENGTH, len(vector), device=DEVICE, dtype=DTYPE) for _ in range(2))
        jobs.append((vector, y, g, torch.empty_like(y), torch.empty_like(vector)))

    def step() -> None:
        for vector, y, g, result, total in jobs:
            torch.mul(y, vector, out=result)
            if backward:
                torch.mul(g, vector, out=result)
                torch.mul(g, y, out=result)
                torch.sum(result, (0, 1), out=total)

    return step


def attention_products(model: nn.Module, rows: int, *, backward: bool) -> Step:
    """What a prompt or a prefix multiplies in attention, alone, into buffers that are there."""
    jobs: list[tuple[Tensor, Tensor, Tensor]] = []

    def job(left: Tensor, right: Tensor) -> None:
        shape = (*left.shape[:-1], right.shape[-1])
        jobs.append((left, right, torch.empty(shape, device=DEVICE, dtype=DTYPE)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=DTYPE)

    heads, size = model.config.num_attention_heads, model.config.head_dim
    for path, part in parts_of(model, "default"):
        if not hasattr(part, "beside"):
            continue
        prompt = getattr(part, "adaption_prompt", None)
        length = 20 if prompt is None else prompt.shape[1]
        query, keys, weights = (
            random(rows * heads, *shape) for shape in ((LENGTH, size), (length, size), (LENGTH, length))
        )
        job(query, keys.mT)
        job(weights, keys)
        if backward:  # to the weights and the values, to the queries and the keys
            job(query, keys.mT)
            job(weights.mT, query)
            job(weights, keys)
            job(weights.mT, query)
        if prompt is not None:
            attention = model.get_submodule(path)
            for linear in (attention.k_proj, attention.v_proj):
                job(prompt[0].detach().to(DTYPE), linear.weight.T)
                if backward:
                    job(random(length, linear.out_features), linear.weight)

    def step() -> None:
        for left, right, result in jobs:
            torch.matmul(left, right, out=result)

    return step


def peak_bytes(step: Step) -> int:
    """The most that one step holds beyond what was there before it."""
    step()
    if CUDA:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def steps(size: str, rounds: int, method: str) -> dict[str, float]:
    base = llama(size)
    rows = SIZES[size]["rows"]
    embeddings = torch.randn(
        rows, LENGTH, SIZES[size]["hidden_size"], device=DEVICE, dtype=DTYPE, requires_grad=True
    )
    models = {
        "floor": base,
        "grafts": grafts.add(copy.deepcopy(base), config(grafts, method)),
        "peft": peft.get_peft_model(copy.deepcopy(base), config(peft, method, base.config.num_hidden_layers)),
    }
    if method == "dora":
        models |= {"grafts LoRA": grafts.add(copy.deepcopy(base), config(grafts))}
        models |= {"peft LoRA": peft.get_peft_model(copy.deepcopy(base), config(peft))}
    result: dict[str, float] = {}
    for kind, make in (("forward", forward), ("training", training)):
        measured: dict[str, Step] = {name: make(model, embeddings) for name, model in models.items()}
        if method != "dora":
            work = {"lora": products, "ia3": scalings}.get(method, attention_products)
            measured["work"] = work(models["grafts"], rows, backward=kind == "training")
            measured["idle"] = make(grafts.deactivate(copy.deepcopy(models["grafts"])), embeddings)
        found = interleaved(measured, rounds)
        if method == "dora":
            result |= {
                f"{kind} {name} DoRA / its LoRA": ratio(found, name, f"{name} LoRA")
                for name in ("grafts", "peft")
            }
        else:
            found["limit"] = [a + b for a, b in zip(found["floor"], found["work"], strict=True)]
            result |= {
                f"{kind} {name} / floor": ratio(found, name, "floor")
                for name in ("limit", "grafts", "peft", "idle")
            }
            result |= {f"{kind} {name} / limit": ratio(found, name, "limit") for name in ("grafts", "peft")}
        result[f"{kind} grafts / peft"] = ratio(found, "grafts", "peft")
        if kind == "training":
            result |= {f"peak MiB {name}": peak_bytes(measured[name]) / 2**20 for name in models}
    return result


def verbs(rounds: int) -> dict[str, float]:
    """Milliseconds of each verb, with `peft`'s counterpart, on the small model."""
    size = "small"
    base = llama(size)
    ours, theirs = copy.deepcopy(base), peft.get_peft_model(copy.deepcopy(base), config(peft))
    grafts.add(ours, config(grafts), name="default")
    grafts.add(ours, config(grafts), name="other")
    theirs.add_adapter("other", config(peft))
    toggles = {"grafts": 0, "peft": 0}

    def switch(library: str) -> None:
        toggles[library] += 1
        name = ("default", "other")[toggles[library] % 2]
        grafts.activate(ours, name) if library == "grafts" else theirs.set_adapter(name)

    with tempfile.TemporaryDirectory() as folder:
        paths = {library: f"{folder}/{library}" for library in ("grafts", "peft")}
        grafts.save(ours, "default", paths["grafts"])
        theirs.save_pretrained(paths["peft"], selected_adapters=["default"])
        fresh = {"grafts": copy.deepcopy(base), "peft": theirs}

        def load(library: str) -> None:
            if library == "grafts":
                grafts.load(fresh["grafts"], paths["grafts"], name="loaded")
                grafts.delete(fresh["grafts"], "loaded")
            else:
                theirs.load_adapter(paths["peft"], "loaded")
                theirs.delete_adapter("loaded")

        def add(library: str) -> None:
            if library == "grafts":
                grafts.detach(grafts.add(fresh["grafts"], config(grafts)))
            else:
                theirs.add_adapter("added", config(peft))
                theirs.delete_adapter("added")

        def merge(library: str) -> None:
            if library == "grafts":
                grafts.unmerge(grafts.merge(ours, "default"))
            else:
                theirs.merge_adapter(["default"])
                theirs.unmerge_adapter()

        def save(library: str) -> None:
            if library == "grafts":
                grafts.save(ours, "default", paths["grafts"])
            else:
                theirs.save_pretrained(paths["peft"], selected_adapters=["default"])

        result = {}
        works = {
            "add and remove": add,
            "activate": switch,
            "save": save,
            "load and delete": load,
            "merge and unmerge": merge,
        }
        for name, work in works.items():
            found = interleaved(
                {library: lambda w=work, b=library: w(b) for library in ("grafts", "peft")}, rounds
            )  # type: ignore[misc]
            result |= {f"{name} {library} ms": statistics.median(found[library]) * 1e3 for library in found}
    for library, used in (("grafts", "grafts.add"), ("peft", "peft.get_peft_model")):
        use = f"import {library}; {used}; {library}.LoraConfig"
        code = f"import time; t = time.process_time(); {use}; print(time.process_time() - t)"
        seconds = [
            float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
            for _ in range(3)
        ]
        result[f"import {library} ms"] = statistics.median(seconds) * 1e3
    return result


def deep(hidden: int) -> nn.Module:
    """A Llama of 32 layers, 224 linears in them; above a small size its weights have shapes but no memory of
    their own.
    """
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": 32}
    with torch.device("cpu" if hidden <= 256 else "meta"):
        model = LlamaForCausalLM(
            LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, vocab_size=VOCABULARY)
        )
    for module in model.modules() if hidden > 256 else ():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.zeros(1).expand(parameter.shape), requires_grad=False
                )
    return model.requires_grad_(False)


def crowd(adapters: int) -> dict[str, float]:
    """Adding adapter after adapter to 224 modules, and switching among all of them."""
    result = {}
    for library in ("grafts", "peft"):
        model, added = deep(256), []
        for number in range(adapters):
            gc.collect()
            before = time.process_time()
            if library == "grafts":
                grafts.add(model, config(grafts), name=f"a{number}")
            elif number == 0:
                model = peft.get_peft_model(model, config(peft), adapter_name="a0")
            else:
                model.add_adapter(f"a{number}", config(peft))
                model.set_adapter(f"a{number}")
            added.append((time.process_time() - before) * 1e3)
        switch = (
            model.set_adapter if library == "peft" else lambda name, model=model: grafts.activate(model, name)
        )
        names = iter([f"a{number % adapters}" for number in range(1000)])
        count = 500 if library == "grafts" else 5
        seconds = cost(lambda switch=switch, names=names: switch(next(names)), count)
        result |= {
            f"add first of {adapters} {library} ms": statistics.median(added[:3]),
            f"add last of {adapters} {library} ms": statistics.median(added[-3:]),
            f"activate among {adapters} {library} ms": seconds * 1e3,
        }
    return result


def loading(rounds: int) -> dict[str, float]:
    """Loading a file of rank 16 for 224 modules, beside reading its tensors into memory with `safetensors`
    alone.
    """
    result = {}
    for hidden in (256, 2048, 4096):
        model = grafts.add(deep(hidden), config(grafts))
        with tempfile.TemporaryDirectory() as folder:
            file = grafts.save(model, "default", folder) / "adapter_model.safetensors"
            grafts.detach(model)
            megabytes = file.stat().st_size / 1e6
            found: dict[str, list[float]] = {"read": [], "load": [], "map": []}
            for _ in range(rounds):
                found["map"].append(cost(lambda file=file: load_file(file)))
                found["read"].append(
                    cost(lambda file=file: {k: v.clone() for k, v in load_file(file).items()})
                )
                found["load"].append(cost(lambda model=model, folder=folder: grafts.load(model, folder)))
                grafts.delete(model, "default")
            name = f"{megabytes:.0f} MB"
            result |= {f"load {name} / reading it into memory": ratio(found, "load", "read")}
            result |= {f"{what} {name} ms": statistics.median(found[what]) * 1e3 for what in found}
    return result


def machine() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name()
        if CUDA
        else f"{platform.machine()} CPU, one thread, process CPU time",
        "dtype": str(DTYPE),
        "python": platform.python_version(),
        **{lib.__name__: lib.__version__ for lib in (grafts, peft, torch, transformers)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium", "large"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--only-steps", action="store_true")
    parser.add_argument("--adapters", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    console = Console(width=110)
    measured = {
        method: {size: steps(size, given.rounds, method) for size in given.sizes} for method in given.methods
    }
    for method, by_size in measured.items():
        table = Table(box=None, header_style="bold")
        table.add_column(method)
        for size in by_size:
            table.add_column(f"{size} ({SIZES[size]['hidden_size']})", justify="right")
        for row in next(iter(by_size.values())):
            table.add_row(row, *(f"{by_size[size][row]:.3f}" for size in by_size))
        console.print(table)
    kind = "cuda" if CUDA else "cpu"
    file = Path(__file__).parent / "results" / f"{datetime.date.today()}-speed-{kind}.json"
    before = (
        json.loads(file.read_text()) if given.only_steps and file.exists() else {"steps": {}, "verbs": {}}
    )
    times = (
        before["verbs"]
        if given.only_steps
        else verbs(given.rounds) | loading(given.rounds) | crowd(given.adapters)
    )
    for name, value in times.items():
        console.print(f"{name:<48}{value:>12.3f}", highlight=False)
    about = {"machine": machine(), "rank": RANK, "rounds": given.rounds}
    file.write_text(
        json.dumps(about | {"steps": before["steps"] | measured, "verbs": times}, indent=2) + "\n"
    )
    console.print(f"written to {file}")


if __name__ == "__main__":
    main()
