"""Adapters of AdapterHub's own library, as the tests' reference; run in an environment with `adapters` 1.3.0.

    scripts/venv.sh .venv-hub dev transformers==4.57.6 datasets accelerate && .venv-hub/bin/pip install
    adapters==1.3.0 .venv-hub/bin/python scripts/adapterhub_reference.py write tests/data/adapterhub    # make
    the files anew .venv-hub/bin/python scripts/adapterhub_reference.py read DIRECTORY                 # what
    it makes of files of ours

A case is a folder: the base's weights and inputs, the adapter as that library has saved it, and its output.
Attention is
eager: with other kernels that library masks causal prefixes wrongly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PLUS = (
    "mh_adapter=False, output_adapter=True, reduction_factor=4, non_linearity='gelu', "
    "original_ln_before=True, original_ln_after=False, residual_before_ln=False, init_weights='houlsby', "
    "scaling='channel'"
)
NORMED = "reduction_factor=4, ln_before=True, ln_after=True, use_gating=True, adapter_residual_before_ln=True"
WHOLE = (
    "compacter[reduction_factor=2, factorized_phm_W=False, shared_phm_rule=False, factorized_phm_rule=True]"
)
# case -> the config as that library's own text, or the name of a class and its options
CASES = {
    "bert-mlp": "prefix_tuning[prefix_length=3, bottleneck_size=8, use_gating=True]",
    "bert-flat": "prefix_tuning[prefix_length=3, flat=True, use_gating=True, shared_gating=False]",
    "gpt2-flat": "prefix_tuning[prefix_length=3, flat=True]",
    "t5-flat": "prefix_tuning[prefix_length=3, flat=True]",
    "bert-prompt": "prompt_tuning[prompt_length=3]",
    "bert-prompt-after-bos": "prompt_tuning[prompt_length=3, combine='prefix_after_bos']",
    "bert-seq_bn": "seq_bn[reduction_factor=4]",
    "bert-double_seq_bn": "double_seq_bn[reduction_factor=4]",
    "bert-par_bn": "par_bn[reduction_factor=4]",
    "bert-scaled_par_bn": "scaled_par_bn[reduction_factor=4, leave_out=[0]]",
    "bert-layers": "seq_bn[reduction_factor={'0': 2, 'default': 8}, residual_before_ln='post_add']",
    "bert-normed": f"seq_bn[{NORMED}]",
    "bert-plus": ("BnConfig", PLUS),
    "bert-compacter": "compacter[reduction_factor=4]",
    "bert-compacter-whole": WHOLE,
    "bert-compacter-shared": "compacter++[reduction_factor=2, shared_W_phm=True, factorized_phm_rule=True]",
    "bert-inverted": "seq_bn_inv[reduction_factor=4]",
    "bert-lora": "lora[r=3, alpha=7, selfattn_lora=True, intermediate_lora=True, output_lora=True]",
    "bert-ia3": "ia3",
    "bert-loreft": "loreft[r=2, prefix_positions=2, suffix_positions=3]",
    "bert-noreft": "noreft[r=2, prefix_positions=3, tied_weights=True, non_linearity='tanh']",
    "bert-mam": "prefix_tuning[prefix_length=3, flat=True]|par_bn[reduction_factor=4]",
    "bert-unipelt": (
        "prefix_tuning[prefix_length=3, flat=True, use_gating=True]|seq_bn[reduction_factor=4, "
        "use_gating=True]|lora[r=3, alpha=2, use_gating=True]"
    ),
    "gpt2-seq_bn": "seq_bn[reduction_factor=4]",
    "gpt2-plus": ("BnConfig", PLUS),
    "gpt2-lora": "lora[r=3, alpha=7]",
    "llama-lora": "lora[r=3, alpha=7, intermediate_lora=True]",
    "llama-double_seq_bn": "double_seq_bn[reduction_factor=4]",
    "t5-double_seq_bn": "double_seq_bn[reduction_factor=4, cross_adapter=True]",
    "bart-double_seq_bn": "double_seq_bn[reduction_factor=4, cross_adapter=True]",
    "qwen2-seq_bn": "seq_bn[reduction_factor=4]",
    "qwen2-par_bn": "par_bn[reduction_factor=4]",
    "qwen2-inverted": "seq_bn_inv[reduction_factor=4]",
    "qwen2-loreft": "loreft[r=2, suffix_positions=2]",
    "qwen2-lora": "lora[r=3, alpha=7, intermediate_lora=True, output_lora=True]",
}
OWN = ("prefix", "prompt", "adapters.", "loras.", "refts.", "shared_parameters", "invertible_adapters")


def model(case: str) -> torch.nn.Module:
    """The base of a case."""
    import transformers as t  # noqa: PLC0415 - after the arguments are understood

    torch.manual_seed(0)
    kind = case.partition("-")[0]
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    eager = {"attn_implementation": "eager"}
    if kind == "t5":
        small = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
        made = t.T5ForConditionalGeneration(t.T5Config(**small, decoder_start_token_id=0))
    elif kind == "bart":
        small = {"vocab_size": 50, "d_model": 16, "max_position_embeddings": 32}
        for side in ("encoder", "decoder"):
            small |= {f"{side}_layers": 1, f"{side}_ffn_dim": 24, f"{side}_attention_heads": 2}
        made = t.BartForConditionalGeneration(t.BartConfig(**small, **eager))
    elif kind == "gpt2":
        small = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        made = t.GPT2LMHeadModel(t.GPT2Config(**small, bos_token_id=1, eos_token_id=1, **eager))
    elif kind in ("llama", "qwen2"):
        cls, config = (
            (t.LlamaForCausalLM, t.LlamaConfig) if kind == "llama" else (t.Qwen2ForCausalLM, t.Qwen2Config)
        )
        made = cls(config(**sizes, num_key_value_heads=1, **eager))
    else:
        made = t.BertModel(t.BertConfig(**sizes, **eager))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # norms that are not the same in every layer
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
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

    for case, text in CASES.items():
        made = model(case)
        state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        generator = torch.Generator().manual_seed(3)
        inputs = {"input_ids": torch.randint(3, 50, (2, 7), generator=generator)}
        if case.startswith(("t5", "bart")):
            inputs["decoder_input_ids"] = torch.randint(3, 50, (2, 4), generator=generator)
        if case.endswith("reft"):
            inputs["attention_mask"] = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
        adapters.init(made)
        config = (
            text if isinstance(text, str) else eval(f"adapters.{text[0]}({text[1]})", {"adapters": adapters})
        )
        made.add_adapter("en", config=config, set_active=True)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if any(word in name for word in OWN):
                    noise = torch.randn(parameter.shape, generator=generator) * 0.5
                    # an orthogonal parametrisation rounds its diagonal to whole numbers
                    parameter.add_(noise.fill_diagonal_(0) if name.endswith("weight.original") else noise)
            expected = output(case, made.eval(), inputs)
        (folder / case).mkdir(parents=True, exist_ok=True)
        made.save_adapter(str(folder / case / "adapter"), "en", with_head=False)
        if "compacter" in case:  # that library leaves the shared parameters out where the model has no head
            shared(made, folder / case / "adapter" / "pytorch_adapter.bin")
        given = {f"input.{name}": tensor for name, tensor in inputs.items()}
        tied = {name: tensor.clone() for name, tensor in (state | given).items()}
        save_file(tied | {"output": expected}, folder / case / "case.safetensors")


def shared(made: torch.nn.Module, file: Path) -> None:
    """Add the parameters that all layers share to a file that lacks them."""
    own = {name: tensor.clone() for name, tensor in made.state_dict().items() if "shared_parameters" in name}
    torch.save(torch.load(file, weights_only=True) | own, file)


def read(folder: Path) -> None:
    """Load ``adapter`` of a folder whose name begins like a case's, and compare with the output in
    ``case.safetensors``.
    """
    import adapters  # noqa: PLC0415 - not there where only the models are wanted

    data = load_file(folder / "case.safetensors")
    made = model(folder.name)
    made.load_state_dict({n: t for n, t in data.items() if n != "output" and not n.startswith("input.")})
    adapters.init(made)
    made.load_adapter(str(folder / "adapter"), set_active=True)
    inputs = {
        name.removeprefix("input."): tensor for name, tensor in data.items() if name.startswith("input.")
    }
    with torch.no_grad():
        torch.testing.assert_close(
            output(folder.name, made.eval(), inputs), data["output"], rtol=1e-5, atol=1e-5
        )
    print("the same")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
