"""Prefixes of AdapterHub's own library, as the tests' reference; run in an environment with `adapters` 1.3.0.

    scripts/venv.sh .venv-hub dev transformers==4.57.6 datasets accelerate && .venv-hub/bin/pip install adapters==1.3.0
    .venv-hub/bin/python scripts/adapterhub_reference.py write tests/data/adapterhub    # make the files anew
    .venv-hub/bin/python scripts/adapterhub_reference.py read DIRECTORY                 # what it makes of files of ours

A case is a folder: the base's weights and inputs, the adapter as that library has saved it, and its output. Attention is
eager: with other kernels that library masks causal prefixes wrongly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def model(case: str) -> torch.nn.Module:
    """The base of a case."""
    import transformers as t  # noqa: PLC0415 - after the arguments are understood

    torch.manual_seed(0)
    if case.startswith("t5"):
        sizes = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
        made = t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0))
    elif case.startswith("gpt2"):
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        made = t.GPT2LMHeadModel(t.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, attn_implementation="eager"))
    else:
        sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = t.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, attn_implementation="eager")
        made = t.BertModel(config)
    return made.eval()


def output(case: str, made: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a case compares."""
    result = made(**inputs)
    states = result.last_hidden_state if case.startswith("bert") else result.logits
    more = states.shape[1] - inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    if more and case.endswith("after-bos"):
        return torch.cat([states[:, :1], states[:, 1 + more :]], 1)
    return states[:, more:].contiguous()  # without virtual tokens


def write(folder: Path) -> None:
    """Make all cases anew."""
    import adapters  # noqa: PLC0415 - not there where only the models are wanted

    configs = {
        "bert-mlp": {"bottleneck_size": 8, "use_gating": True},
        "bert-flat": {"flat": True, "use_gating": True, "shared_gating": False},
        "gpt2-flat": {"flat": True},
        "t5-flat": {"flat": True},
        "bert-prompt": {},
        "bert-prompt-after-bos": {"combine": "prefix_after_bos"},
    }
    for case, options in configs.items():
        made = model(case)
        state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        generator = torch.Generator().manual_seed(3)
        inputs = {"input_ids": torch.randint(3, 50, (2, 7), generator=generator)}
        if case.startswith("t5"):
            inputs["decoder_input_ids"] = torch.randint(3, 50, (2, 4), generator=generator)
        adapters.init(made)
        if "prompt" in case:
            config = adapters.PromptTuningConfig(prompt_length=3, **options)
        else:
            config = adapters.PrefixTuningConfig(prefix_length=3, **options)
        made.add_adapter("en", config=config, set_active=True)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "prefix" in name or "prompt" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
            expected = output(case, made.eval(), inputs)
        (folder / case).mkdir(parents=True, exist_ok=True)
        made.save_adapter(str(folder / case / "adapter"), "en", with_head=False)
        given = {f"input.{name}": tensor for name, tensor in inputs.items()}
        save_file(state | given | {"output": expected}, folder / case / "case.safetensors")


def read(folder: Path) -> None:
    """Load ``adapter`` of a folder whose name begins like a case's, and compare with the output in ``case.safetensors``."""
    import adapters  # noqa: PLC0415 - not there where only the models are wanted

    data = load_file(folder / "case.safetensors")
    made = model(folder.name)
    made.load_state_dict({n: t for n, t in data.items() if n != "output" and not n.startswith("input.")})
    adapters.init(made)
    made.load_adapter(str(folder / "adapter"), set_active=True)
    inputs = {name.removeprefix("input."): tensor for name, tensor in data.items() if name.startswith("input.")}
    with torch.no_grad():
        torch.testing.assert_close(output(folder.name, made.eval(), inputs), data["output"], rtol=1e-5, atol=1e-5)
    print("the same")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
