"""The attention site: prompts and prefixes on every kind of attention, against slow formulas; it stays out of
the way.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grafts
from grafts.lifecycle.registry import parts_of
from grafts.sites.attention import AttendingPart, ConfigView
from helpers.adapters import randomise
from helpers.attending import ARCHITECTURES, CUSTOM, Architecture, read_prompt, slow_prefixes, slow_prompts
from helpers.bases import BY_NAME, SDPABlock, ids, noise
from helpers.caches import cache_of, going_on

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*_compile flag on create_block_mask.*:DeprecationWarning"),
]
LLAMA, T5 = BY_NAME["llama"], BY_NAME["t5"]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.base.name)


def adapted(architecture: Architecture, config: grafts.AdapterConfig, kernel: str) -> nn.Module:
    model = architecture.base.model()
    model.set_attn_implementation(kernel)
    grafts.add(model, config, name="en")
    randomise(model, "en")
    return model


def prompts_of(architecture: Architecture, twin: nn.Module, parts: list[tuple[str, nn.Module]]) -> dict:
    """Keys, values and gate of the prompts, for the modules of a model without adapters."""

    def pair(host: nn.Module, part: nn.Module) -> tuple:
        return architecture.project(host, part.adaption_prompt), part.adaption_gate

    return {twin.get_submodule(path): functools.partial(pair, part=part) for path, part in parts}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def output(architecture: Architecture, model: nn.Module) -> torch.Tensor:
    if architecture.base.name == "clip":
        result = model(**architecture.base.inputs())
        return torch.cat([result.text_embeds, result.image_embeds], -1)
    return architecture.base.output(model)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@each_architecture
def test_adaption_prompt_is_the_formula_on_every_architecture(
    architecture: Architecture, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "sdpa" and architecture.base.name == "gemma2":
        pytest.skip("it caps its scores, which that kernel cannot")
    model = adapted(architecture, grafts.AdaptionPromptConfig(adapter_len=3), kernel)
    bare = output(architecture, grafts.deactivate(model))
    result = output(architecture, grafts.activate(model, "en"))
    parts = parts_of(model, "en")
    twin = architecture.base.model()
    twin.set_attn_implementation("eager")
    slow_prompts(monkeypatch, prompts_of(architecture, twin, parts))
    assert close(result, output(architecture, twin))
    assert not torch.equal(result, bare)
    assert len(parts) == (
        4 if architecture.base.name == "clip" else 1 if architecture.base.name == "roberta" else 2
    )


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
@each_architecture
def test_prefix_is_more_keys_and_values_on_every_architecture(
    architecture: Architecture, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel != "eager" and architecture.base.name == "gemma2":
        pytest.skip("it caps its scores, which these kernels cannot, or only compiled")
    if kernel == "flex_attention" and architecture.base.name not in ("llama", "mistral"):
        pytest.skip("not offered, or slow to compile")
    config = grafts.PrefixTuningConfig(num_virtual_tokens=3, count_positions=False)
    model = adapted(architecture, config, "eager" if kernel == "flex_attention" else kernel)
    if kernel == "flex_attention":
        model.set_attn_implementation(kernel)
    result = output(architecture, model)
    bare = output(architecture, grafts.deactivate(model))
    twin = architecture.base.model()
    twin.set_attn_implementation("eager")
    slow_prefixes(
        monkeypatch, {twin.get_submodule(path): part.prefix for path, part in parts_of(model, "en")}
    )
    assert close(result, output(architecture, twin))
    assert not torch.equal(result, bare)


@pytest.mark.parametrize("attention", ["self", "cross", "both", "encoder"])
def test_an_encoder_decoder_is_adapted_where_the_config_says(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for architecture in [a for a in ARCHITECTURES if a.base.name in ("t5", "bart", "whisper")]:
        with monkeypatch.context() as patch:
            model = adapted(
                architecture, grafts.AdaptionPromptConfig(adapter_len=3, attention=attention), "sdpa"
            )
            result = output(architecture, model)
            twin = architecture.base.model()
            twin.set_attn_implementation("eager")
            hosts = prompts_of(architecture, twin, parts_of(model, "en"))
            slow_prompts(patch, hosts)
            assert close(result, output(architecture, twin))
            stacks = {
                path.split(".layers")[0].split(".block")[0].rpartition(".")[2]
                for path, _ in parts_of(model, "en")
            }
            assert stacks == ({"encoder"} if attention == "encoder" else {"decoder"})
            assert len(hosts) == (4 if attention == "both" else 2)


def test_prefix_over_encoder_self_and_cross_attention_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture in [a for a in ARCHITECTURES if a.base.name in ("t5", "bart")]:
        with monkeypatch.context() as patch:
            everything = grafts.PrefixTuningConfig(
                num_virtual_tokens=3, attention=("encoder", "self", "cross"), count_positions=False
            )
            model = adapted(architecture, everything, "sdpa")
            result = output(architecture, model)
            twin = architecture.base.model()
            twin.set_attn_implementation("eager")
            slow_prefixes(
                patch, {twin.get_submodule(path): part.prefix for path, part in parts_of(model, "en")}
            )
            assert close(result, output(architecture, twin))
            assert len(parts_of(model, "en")) == 6


def test_a_module_that_calls_the_kernel_itself_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.scaled_dot_product_attention
    for config in (
        grafts.AdaptionPromptConfig(adapter_len=3),
        grafts.PrefixTuningConfig(num_virtual_tokens=3),
    ):
        model = CUSTOM.base.model()
        bare = CUSTOM.base.output(model)
        grafts.add(model, config, name="en")
        randomise(model, "en")
        result = CUSTOM.base.output(model)
        twin = CUSTOM.base.model()
        parts = iter(parts_of(model, "en"))

        def slow(query, key, value, is_causal, config=config, parts=parts, twin=twin):  # type: ignore[no-untyped-def]
            path, part = next(parts)
            if isinstance(config, grafts.PrefixTuningConfig):
                keys, values = (
                    part.prefix.unflatten(-1, (2, 2, -1))
                    .permute(1, 2, 0, 3)[:, None]
                    .expand(-1, 2, -1, -1, -1)
                )
                scores = query @ torch.cat([keys, key], 2).mT / query.shape[-1] ** 0.5
                causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
                scores = scores.masked_fill(~F.pad(causal, (3, 0), value=True), -torch.inf)
                return scores.softmax(-1) @ torch.cat([values, value], 2)
            pair = CUSTOM.project(twin.get_submodule(path), part.adaption_prompt)
            added = read_prompt(query, pair, query.shape[-1] ** -0.5, part.adaption_gate)
            return real(query, key, value, is_causal=is_causal) + added

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", slow)
            assert close(result, CUSTOM.base.output(twin))
        assert not close(result, bare)
        assert torch.equal(CUSTOM.base.output(grafts.detach(model)), bare)


class SteppedBlock(SDPABlock):
    """The same attention, written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), -torch.inf)
        weights = F.dropout(F.softmax(scores, dim=-1), 0.1, self.training)
        x = x + self.wo(torch.matmul(weights, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@pytest.mark.parametrize(
    "config",
    [grafts.AdaptionPromptConfig(adapter_len=3), grafts.PrefixTuningConfig(num_virtual_tokens=3)],
    ids=["prompt", "prefix"],
)
def test_attention_written_out_in_steps_is_reached_as_the_kernel_is(config: grafts.AdapterConfig) -> None:
    called, stepped = CUSTOM.base.model(), CUSTOM.base.model()
    for block in stepped.blocks:
        block.__class__ = SteppedBlock
    bare = CUSTOM.base.output(stepped)
    assert close(bare, CUSTOM.base.output(called))
    for model in (called, stepped):
        torch.manual_seed(3)
        for name in ("en", "de"):
            grafts.add(model, config, name=name)
            randomise(model, name)
        grafts.activate(model, "en")
    assert close(CUSTOM.base.output(stepped), CUSTOM.base.output(called))
    assert not close(CUSTOM.base.output(stepped), bare)
    rows = {"adapter_names": ["de", None]}
    assert close(stepped(ids(), **rows), called(ids(), **rows))
    grafts.train_only(grafts.activate(stepped, "en"), "en")
    CUSTOM.base.output(stepped).square().mean().backward()
    assert all(p.grad.any() for _, part in parts_of(stepped, "en") for p in part.parameters())
    assert torch.equal(CUSTOM.base.output(grafts.detach(stepped)), bare)


def test_a_module_that_comes_to_no_kernel_says_so() -> None:
    model = CUSTOM.base.model()
    grafts.add(model, grafts.PrefixTuningConfig(), name="en")
    for block in model.blocks:
        block.forward = lambda x: x
    with pytest.raises(grafts.StateError, match="came to no attention kernel"):
        CUSTOM.base.output(model)


def test_a_failing_module_leaves_its_interception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CUSTOM.base.model()
    bare = CUSTOM.base.output(model)
    grafts.add(model, grafts.AdaptionPromptConfig(), name="en")
    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[1].wo, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            CUSTOM.base.output(model)
    assert torch.overrides._get_current_function_mode() is None
    assert torch.equal(CUSTOM.base.output(model), bare)


def test_configs_are_views_while_attached_and_themselves_again_after() -> None:
    model = LLAMA.model()
    config = model.config
    grafts.add(model, grafts.AdaptionPromptConfig(adapter_layers=1), name="en")
    top, other = model.model.layers[1].self_attn, model.model.layers[0].self_attn
    assert isinstance(top.config, ConfigView)
    assert other.config is config
    assert top.config.hidden_size == 16
    assert top.config._attn_implementation == "grafts"
    assert model.config._attn_implementation == "sdpa"
    grafts.deactivate(model)
    assert top.config._attn_implementation == "sdpa"
    top.config.new_field = 3
    assert config.new_field == 3
    twin = copy.deepcopy(model)
    assert isinstance(twin.model.layers[1].self_attn.config, ConfigView)
    assert twin.model.layers[1].self_attn.config._grafts_config is twin.config
    grafts.detach(model)
    assert top.config is config


def test_another_kernel_can_be_chosen_afterwards_and_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama import modeling_llama

    model = LLAMA.model()
    grafts.add(model, grafts.AdaptionPromptConfig(), name="en")
    randomise(model, "en")
    before = LLAMA.output(model)
    calls = []
    real = modeling_llama.eager_attention_forward
    functions = modeling_llama.ALL_ATTENTION_FUNCTIONS
    model.set_attn_implementation("eager")
    assert close(LLAMA.output(model), before)
    functions.register("counted", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    try:
        model.config._attn_implementation = "counted"
        LLAMA.output(model)
    finally:
        model.set_attn_implementation("sdpa")
        type(functions)._global_mapping.pop("counted")
    assert len(calls) == 2
    assert torch.equal(LLAMA.output(model), before)


def test_other_models_of_the_process_run_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    other = LLAMA.model()
    before = LLAMA.output(other)
    functions = modeling_llama.ALL_ATTENTION_FUNCTIONS
    kernels = {name: functions[name] for name in ("sdpa", "flex_attention", "flash_attention_2")}
    eager, sdpa = modeling_llama.eager_attention_forward, F.scaled_dot_product_attention
    model = LLAMA.model()
    grafts.add(model, grafts.PrefixTuningConfig(), name="en")
    LLAMA.output(model)
    assert torch.equal(LLAMA.output(other), before)
    assert {name: functions[name] for name in kernels} == kernels
    assert modeling_llama.eager_attention_forward is eager
    assert F.scaled_dot_product_attention is sdpa
    assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_a_prefix_on_padded_rows_gives_what_the_rows_give_alone(kernel: str, side: str) -> None:
    model = LLAMA.model()
    model.set_attn_implementation(kernel)
    grafts.add(model, grafts.PrefixTuningConfig(num_virtual_tokens=3), name="en")
    randomise(model, "en")
    tokens = ids(length=6)
    alone = model(input_ids=tokens[:1, :4]).logits
    pad = torch.zeros(1, 2, dtype=torch.long)
    row = torch.cat([pad, tokens[:1, :4]] if side == "left" else [tokens[:1, :4], pad], 1)
    mask = (torch.cat([row, tokens[1:]]) != 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = model(input_ids=torch.cat([row, tokens[1:]]), attention_mask=mask, position_ids=positions).logits
    own = batch[:1, 2:] if side == "left" else batch[:1, :4]
    assert close(own, alone)


def test_packed_sequences_each_see_the_prefix() -> None:
    model = LLAMA.model()
    grafts.add(model, grafts.PrefixTuningConfig(num_virtual_tokens=3), name="en")
    randomise(model, "en")
    tokens = ids(rows=1, length=7)
    alone = torch.cat([model(input_ids=tokens[:, :3]).logits, model(input_ids=tokens[:, 3:]).logits], 1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    assert close(model(input_ids=tokens, position_ids=positions, use_cache=False).logits, alone)


def test_flash_attention_with_a_window_is_refused_and_its_padding_mask_follows() -> None:
    from grafts.sites.prefix import Prefix, extended

    prefix = Prefix(noise(1, 2, 3, 4), noise(1, 2, 3, 4), None)
    query = noise(2, 2, 5, 4)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    longer, _ = extended(mask, "flash_attention_2", True, query, 5, prefix, {})
    assert torch.equal(longer, F.pad(mask, (3, 0), value=1))
    assert extended(None, "flash_attention_2", True, query, 5, prefix, {})[0] is None
    some = Prefix(prefix.keys.expand(2, -1, -1, -1), prefix.values, torch.tensor([[True] * 3, [False] * 3]))
    longer, _ = extended(None, "flash_attention_2", True, query, 5, some, {})
    assert longer.tolist() == [[1] * 8, [0] * 3 + [1] * 5]
    for arguments in ({"sliding_window": 4}, {"cu_seq_lens_q": torch.tensor([0, 5])}):
        with pytest.raises(grafts.StateError, match="cannot attend to a prefix"):
            extended(mask, "flash_attention_2", True, query, 5, prefix, arguments)


def test_a_third_partys_part_acts_there_like_those_of_this_library() -> None:
    class Nothing(AttendingPart):
        """Neither a prefix nor anything beside."""

    part = Nothing()
    assert part.in_front(None) is None  # type: ignore[arg-type]
    assert part.beside(None) is None  # type: ignore[arg-type]


def test_gates_scale_keys_and_values_and_refuse_a_cache() -> None:
    model = BY_NAME["bert"].model()
    bare = BY_NAME["bert"].output(model)
    grafts.add(
        model,
        grafts.PrefixTuningConfig(num_virtual_tokens=3, use_gating=True, count_positions=False),
        name="en",
    )
    randomise(model, "en")
    open_, path = BY_NAME["bert"].output(model), "bert.encoder.layer.0.attention.self"
    part = dict(parts_of(model, "en"))[path]
    with torch.no_grad():
        part.gate.weight.zero_()
        part.gate.bias.copy_(torch.tensor([50.0, -50.0]))  # keys as they are, values shut
    host = model.get_submodule(path)
    seen = {}
    host.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=(args or tuple(kwargs.values()))[0]), with_kwargs=True
    )
    shut = BY_NAME["bert"].output(model)
    assert not close(open_, shut)
    assert not close(bare, shut)
    llama = LLAMA.model()
    grafts.add(llama, grafts.PrefixTuningConfig(use_gating=True), name="en")
    whole = llama(input_ids=ids(), use_cache=False).logits
    begun = llama(input_ids=ids(), use_cache=True)
    assert torch.equal(begun.logits, whole)
    with pytest.raises(grafts.StateError, match="use_cache=False"):
        llama(input_ids=ids()[:, :1], **going_on(cache_of(begun)))


def test_reordered_upcast_attention_has_no_kernel_to_reach() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, reorder_and_upcast_attn=True))
    with pytest.raises(grafts.UnmatchedTargetError, match="no modules that are recognised as self-attention"):
        grafts.add(model, grafts.AdaptionPromptConfig())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_softmax_over_the_prompt_is_made_in_float32_in_half_precision_too(dtype: torch.dtype) -> None:
    from grafts.sites.attention import Attention

    part = parts_of(grafts.add(LLAMA.model(), grafts.AdaptionPromptConfig(adapter_len=9)), "default")[0][1]
    part.adaption_gate.fill_(1.0)
    query, keys, values = (noise(2, heads, n, 4).to(dtype) * 4 for heads, n in ((4, 5), (2, 9), (2, 9)))

    class Given(Attention):
        """A call whose projections are given."""

        def project(self, prompt: torch.Tensor, names: object = None) -> tuple[torch.Tensor, torch.Tensor]:
            return keys[:1], values[:1]

    call = Given(None, None, query, 2, 0.5, query, None)  # type: ignore[arg-type]
    wide = read_prompt(query.float(), (keys[:1].float(), values[:1].float()), 0.5, torch.ones(1))
    # one rounding of weights and one of the sum at most: what a softmax in the narrow format would lose is
    # several times that
    assert (part.beside(call).float() - wide).abs().max() <= 2 * torch.finfo(dtype).eps * wide.abs().max()


def test_a_model_saved_whole_runs_in_another_process(tmp_path: Path) -> None:
    model = LLAMA.model()
    grafts.add(model, grafts.AdaptionPromptConfig(), name="en")
    randomise(model, "en")
    torch.save((model, LLAMA.inputs(), LLAMA.output(model)), tmp_path / "model.pt")
    code = (
        f"import torch; model, inputs, expected = torch.load({str(tmp_path / 'model.pt')!r}, "
        "weights_only=False); assert (model(**inputs).logits - expected).abs().max() < 1e-5; print('the "
        "same')"  # tensors that lie elsewhere
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "the same\n", done.stderr[-2000:]
