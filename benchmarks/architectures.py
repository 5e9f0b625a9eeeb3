"""Every architecture of `transformers` that can be built small, with every kind of method: does it work, and
if not, why not.

    python -m benchmarks.architectures                      # all, a page of docs and a dated file of results
    python -m benchmarks.architectures --only llama,t5      # some, printed

For each architecture a tiny random model is built from its config class, its interface is inferred, and for
each kind of
method: an adapter is added; a fresh one leaves the output bitwise alone where the method says so; a training
    step moves the
output; what is saved and loaded into a fresh copy gives the same output within rounding, and so does a merge,
where the method claims one; and detaching gives the base's output back bitwise.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import multiprocessing
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import grafts
from benchmarks.tiny import GROUPS, architectures, silence, tiny
from grafts.lifecycle.registry import parts_of
from grafts.methods import method_of
from grafts.structure.trace import tensors_in

METHODS = {
    "bottleneck": "double_seq_bn[reduction_factor=4]",
    "parallel bottleneck": "par_bn[reduction_factor=4]",
    "lora": "lora[r=4, target_modules='all-linear']",
    "prefix_tuning": "prefix_tuning[num_virtual_tokens=3, flat=True]",
    "prompt_tuning": "prompt_tuning[num_virtual_tokens=3]",
    "reft": "loreft[suffix_positions=1, dropout=0.0]",
    "invertible": "invertible",
}
CLAIMED = ("causal-LM", "masked-LM", "seq2seq")
SECONDS = 90
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
RESULTS = Path(__file__).parent / "results"


class FailedError(Exception):
    """A check that did not hold."""


def output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first tensor of floats that a model gives."""
    torch.manual_seed(0)
    return next(t for t in tensors_in(model(**inputs)) if t.is_floating_point())


def require(holds: bool, what: str) -> None:
    """Fail unless ``holds``."""
    if not holds:
        raise FailedError(what)


def same(one: Tensor, other: Tensor) -> bool:
    """Bitwise, infinite and undefined values too."""
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def near(one: Tensor, other: Tensor, share: float) -> bool:
    """Within rounding: memory that lies otherwise can make PyTorch choose other kernels."""
    one, other = (x.nan_to_num(posinf=0.0, neginf=0.0) for x in (one, other))
    return one.shape == other.shape and float((one - other).abs().max()) <= share * max(
        float(other.abs().max()), 1.0
    )


def randomise(model: nn.Module, name: str) -> None:
    """Values as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, part in parts_of(model, name):
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)


def check(model: nn.Module, inputs: Mapping[str, Any], text: str) -> None:
    """Everything that is claimed of a method on a model.

    Raises:
        FailedError: naming what did not hold.
    """
    config = grafts.config_from(text)
    known = method_of(config)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        bare = output(model, inputs)
        require(same(bare, output(model, inputs)), "the base is not deterministic")
        grafts.add(model, config, name="en")
        if known.inert or text.startswith("par_bn"):
            require(same(output(model, inputs), bare), "a fresh adapter moves the output")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    randomise(model, "en")
    with torch.no_grad():
        before = output(model, inputs)
    require(not same(before, bare), "the adapter does not move the output")
    output(model, inputs).float().nan_to_num(posinf=0.0, neginf=0.0).square().mean().backward()
    own = [p for p in model.parameters() if p.requires_grad]
    require(any(p.grad is not None and bool(p.grad.any()) for p in own), "no parameter gets a gradient")
    largest = max(float(p.grad.abs().max()) for p in own if p.grad is not None)
    for parameter in own:
        if parameter.grad is not None:
            parameter.grad /= max(largest, 1e-30)
    optimizer.step()
    with torch.no_grad():
        trained = output(model, inputs)
        require(not same(trained, before), "a training step does not move the output")
        with tempfile.TemporaryDirectory() as folder:
            grafts.save(model, "en", folder)
            grafts.load(fresh, folder)
        require(near(output(fresh, inputs), trained, 1e-5), "what was saved and loaded gives another output")
        if known.can_merge(config):
            grafts.merge(model, "en", untie=True)
            require(near(output(model, inputs), trained, 2e-4), "merged and unmerged give different outputs")
            grafts.unmerge(model)
        grafts.detach(model)
        require(same(output(model, inputs), bare), "detaching does not give the base's output back")


def measured(architecture: tuple[str, str, str]) -> dict[str, Any]:
    """One architecture: what was built, its interface, and each method's result."""
    group, model_type, class_name = architecture
    record: dict[str, Any] = {"group": group, "type": model_type, "class": class_name, "methods": {}}
    torch.set_num_threads(1)
    with silence():
        try:
            with limited(2 * SECONDS):
                model, inputs = tiny(model_type, class_name)
        except Exception as error:
            return record | {"not built": said(error)}
        try:
            with limited(SECONDS):
                record["interface"] = grafts.infer_interface(model).to_dict()
        except Exception as error:
            record["not inferred"] = said(error)
        for name, text in METHODS.items():
            try:
                with limited(SECONDS):
                    check(copy.deepcopy(model), inputs, text)
                record["methods"][name] = "works"
            except Exception as error:
                record["methods"][name] = said(error)
    return record


class limited:  # noqa: N801 - reads like a function
    """A block that may take so many seconds."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise TimeoutError(f"more than {self.seconds} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)


def said(error: Exception) -> str:
    """An error in one line; what it is where it is none of this library's own."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = (
        first if isinstance(error, (grafts.GraftsError, FailedError)) else f"{type(error).__name__}: {first}"
    )
    return text.removeprefix("adapter 'en': ")[:300]


LANGUAGE = "all three"
SHORT = {"parallel bottleneck": "parallel", "prefix_tuning": "prefix", "prompt_tuning": "prompt"}


def summary(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int, dict[str, int]]]:
    """Of each group, and of the language models together, how many are registered, were built, and work with
    each method.
    """
    rows = []
    for group in (*CLAIMED, LANGUAGE, *(group for group in GROUPS if group not in CLAIMED)):
        own = [
            record for record in records if record["group"] in (CLAIMED if group == LANGUAGE else (group,))
        ]
        built = [record for record in own if "not built" not in record]
        works = Counter(
            name for record in built for name, result in record["methods"].items() if result == "works"
        )
        inferred = {"interface": sum("interface" in record for record in built)}
        rows.append((group, len(own), len(built), {**inferred, **{name: works[name] for name in METHODS}}))
    return [row for row in rows if row[1]]


def page(records: Sequence[Mapping[str, Any]], version: str) -> str:
    """The table as a page of the documentation."""
    columns = ["interface", *METHODS]
    rows = summary(records)
    lines = [
        "---",
        "hide:",
        "  - toc",
        "---",
        "",
        "# Architectures",
        "",
        "<!-- made by python -m benchmarks.architectures; do not edit -->",
        "",
        f"Every architecture of `transformers` {version} that can be built from its config class with small "
        "numbers, with an adapter of each kind. *Works* means: an adapter is added (and leaves the output "
        "bitwise alone where its method starts so), a training step moves the output, what is saved and "
        "loaded gives the same output within rounding, as does a merge (LoRA), and detaching gives the base "
        "back bitwise. No list of model types stands behind this: the [interface](interface.md) is inferred "
        "from each model.",
        "",
        "| | " + " | ".join(group for group, *_ in rows) + " |",
        "|---|" + "---:|" * len(rows),
        "| registered | " + " | ".join(str(registered) for _, registered, _, _ in rows) + " |",
        "| built | " + " | ".join(str(built) for _, _, built, _ in rows) + " |",
    ]
    for name in columns:
        cells = (f"{works[name]} ({works[name] / max(built, 1):.1%})" for _, _, built, works in rows)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons: dict[str, int] = {}
    lines += [
        "",
        "A prefix needs an attention kernel: state-space, recurrent and Fourier models have none, nor have "
        "hybrid ones that were built without an attention layer. Numbers stand for reasons, listed below the "
        "tables; what could not be built comes last.",
        "",
    ]
    heads = [SHORT.get(name, name) for name in columns]
    for group in GROUPS:
        own = sorted(
            (r for r in records if r["group"] == group and "not built" not in r), key=lambda r: r["type"]
        )
        if not own:
            continue
        lines += [
            f"## {group}",
            "",
            "| model type | " + " | ".join(heads) + " |",
            "|---|" + ":-:|" * len(columns),
        ]
        for record in own:
            cells = ["✓" if "interface" in record else _mark(record.get("not inferred", ""), reasons)]
            cells += [
                "✓" if r == "works" else _mark(r, reasons)
                for r in (record["methods"].get(name, "") for name in METHODS)
            ]
            lines.append(f"| {record['type']} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Reasons", ""]
    lines += [f"{number}. {_escaped(reason)}" for reason, number in reasons.items()]
    lines += ["", "## Not built", ""]
    for record in records:
        if "not built" in record:
            lines.append(f"- {record['type']} ({record['group']}): {_escaped(record['not built'])}")
    return "\n".join(lines) + "\n"


def _mark(reason: str, reasons: dict[str, int]) -> str:
    return f"[{reasons.setdefault(reason, len(reasons) + 1)}](#reasons)"


def _escaped(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "/") + "`"


def run(chosen: Sequence[tuple[str, str, str]], workers: int) -> list[dict[str, Any]]:
    """Measure these architectures, each in a process of its own fate."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=20) as pool:
        records = []
        for record in pool.imap_unordered(measured, chosen, chunksize=1):
            records.append(record)
            bad = [name for name, result in record["methods"].items() if result != "works"]
            state = (
                record.get("not built")
                or record.get("not inferred")
                or (f"without {', '.join(bad)}" if bad else "works")
            )
            print(f"{len(records)}/{len(chosen)} {record['group']} {record['type']}: {state}", flush=True)
    order = {architecture: at for at, architecture in enumerate(chosen)}
    return sorted(records, key=lambda record: order[record["group"], record["type"], record["class"]])


def failures(records: Iterable[Mapping[str, Any]]) -> str:
    """What does not work and why, the commonest reason first."""
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        for name, result in record["methods"].items():
            if result != "works":
                by_reason[name, result].append(record["type"])
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return "\n".join(f"{name}: {reason}\n    {', '.join(types)}" for (name, reason), types in ordered)


def main() -> None:
    """Measure, print, and write the page and the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="model types, with commas; nothing is written")
    parser.add_argument("--groups", help=f"some of {', '.join(GROUPS)}, with commas")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--records", type=Path, help="also write the raw records here, as JSON")
    parser.add_argument("--read", type=Path, help="make the page from a file of results, and measure nothing")
    options = parser.parse_args()
    if options.read:
        results = json.loads(options.read.read_text())
        PAGE.write_text(page(results["records"], results["transformers"]))
        return
    chosen = architectures()
    if options.groups:
        chosen = [one for one in chosen if one[0] in options.groups.split(",")]
    if options.only:
        chosen = [one for one in chosen if one[1] in options.only.split(",")]
    records = run(chosen, options.workers)
    print(failures(records))
    for group, registered, built, works in summary(records):
        print(
            group, f"registered {registered}, built {built},", ", ".join(f"{n} {c}" for n, c in works.items())
        )
    if options.records:
        options.records.write_text(json.dumps(records, indent=1) + "\n")
    if not options.only and not options.groups:
        PAGE.write_text(page(records, transformers.__version__))
        file = RESULTS / f"{datetime.datetime.now(datetime.UTC).date()}-architectures.json"
        file.write_text(
            json.dumps({"transformers": transformers.__version__, "records": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
