"""Small random models of many architectures, and attention computed slowly, with prompts and prefixes, as
reference.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import bases
from helpers.bases import Base, SDPATransformer, ids, noise

Pair = tuple[Tensor, Tensor]
Project = Callable[[nn.Module, Tensor], Pair]

TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}


def separate(key: str, value: str, norm: str | None = None) -> Project:
    """Keys and values by linears of their own; the size of a head is what the module, or its config, says."""

    def project(module: nn.Module, prompt: Tensor) -> Pair:
        size = next(
            v
            for n in ("head_dim", "attention_head_size", "key_value_proj_dim")
            if (v := getattr(module, n, None))
        )
        keys, values = (getattr(module, name)(prompt).unflatten(-1, (-1, size)) for name in (key, value))
        if norm is not None:
            keys = getattr(module, norm)(keys)
        return keys.transpose(1, 2), values.transpose(1, 2)

    return project


def phi3(module: Any, prompt: Tensor) -> Pair:
    queries, keys = (
        module.config.num_attention_heads * module.head_dim,
        module.num_key_value_heads * module.head_dim,
    )
    _, k, v = module.qkv_proj(prompt).split([queries, keys, keys], -1)
    return tuple(x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (k, v))


def neox(module: Any, prompt: Tensor) -> Pair:
    heads = module.query_key_value(prompt).unflatten(-1, (-1, 3 * module.head_size)).transpose(1, 2)
    _, k, v = heads.chunk(3, -1)
    return k, v


def gpt2(module: Any, prompt: Tensor) -> Pair:
    _, k, v = module.c_attn(prompt).split(module.split_size, -1)
    return tuple(x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (k, v))


def made(name: str, **values: object) -> Callable[[], nn.Module]:
    """A model from the class ``name`` and its config class, which has the same beginning."""

    def build() -> nn.Module:
        import transformers

        cls = getattr(transformers, name)
        return cls(cls.config_class(**values))

    return build


def gemma3() -> nn.Module:
    values = GROUPED | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 16}
    return made("Gemma3ForCausalLM", **values, layer_types=["sliding_attention", "full_attention"])()


SIZES = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
}
SIZES |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
WHISPER = {
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
}
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = TEXT | {"max_position_embeddings": 32, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER | {"image_size": 8, "patch_size": 4}))


@dataclass(frozen=True)
class Architecture:
    """A base, and how its attention makes keys and values of a prompt."""

    base: Base
    project: Project


def decoder(name: str, build: Callable[[], nn.Module], project: Project) -> Architecture:
    return Architecture(Base(name, build, lambda: {"input_ids": ids()}), project)


QKV = separate("k_proj", "v_proj")
BERT = separate("key", "value")


def two_texts() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(length=4)}


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = [
    decoder("llama", made("LlamaForCausalLM", **GROUPED), QKV),
    decoder("mistral", made("MistralForCausalLM", **GROUPED, sliding_window=4), QKV),
    decoder("qwen2", made("Qwen2ForCausalLM", **GROUPED), QKV),
    decoder("qwen3", made("Qwen3ForCausalLM", **GROUPED, head_dim=8), separate("k_proj", "v_proj", "k_norm")),
    decoder(
        "gemma2",
        made("Gemma2ForCausalLM", **GROUPED, head_dim=8, query_pre_attn_scalar=16, sliding_window=4),
        QKV,
    ),
    decoder("gemma3", gemma3, separate("k_proj", "v_proj", "k_norm")),
    decoder("phi3", made("Phi3ForCausalLM", **GROUPED, sliding_window=None), phi3),
    decoder(
        "opt",
        made("OPTForCausalLM", **TEXT, ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=24),
        QKV,
    ),
    decoder("gpt-neox", made("GPTNeoXForCausalLM", **TEXT, max_position_embeddings=64), neox),
    decoder("gpt2", bases.gpt2, gpt2),
    decoder("bert", bases.bert, BERT),
    decoder("roberta", bases.roberta, BERT),
    Architecture(Base("t5", bases.t5, two_texts), separate("k", "v")),
    Architecture(
        Base("bart", made("BartForConditionalGeneration", vocab_size=50, **SIZES), two_texts),
        QKV,
    ),
    Architecture(
        Base(
            "whisper",
            made(
                "WhisperForConditionalGeneration",
                vocab_size=50,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                **SIZES,
                **WHISPER,
            ),
            lambda: {"input_features": noise(2, 8, 20), "decoder_input_ids": ids(length=4)},
        ),
        QKV,
    ),
    Architecture(
        Base("vit", bases.vit, lambda: {"pixel_values": noise(2, 3, 8, 8)}),
        lambda module, prompt: (QKV if hasattr(module, "k_proj") else BERT)(module, prompt),
    ),
    Architecture(Base("clip", clip, lambda: {"input_ids": ids(), "pixel_values": noise(2, 3, 8, 8)}), QKV),
]


def custom(module: Any, prompt: Tensor) -> Pair:
    return tuple(w(prompt).unflatten(-1, (2, -1)).transpose(1, 2) for w in (module.wk, module.wv))


CUSTOM = Architecture(Base("custom", SDPATransformer, lambda: {"ids": ids()}), custom)


def for_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def read_prompt(query: Tensor, pair: Pair, scaling: float, gate: Tensor) -> Tensor:
    """What the heads read from a prompt: scores with a softmax of their own, times the gate."""
    keys, values = (for_heads(x, query.shape[1]) for x in pair)
    scores = (query @ keys.transpose(-1, -2) * scaling).float().softmax(-1)
    return gate * (scores.to(query.dtype) @ values)


def slow_prompts(
    monkeypatch: pytest.MonkeyPatch, hosts: Mapping[nn.Module, Callable[[nn.Module], tuple[Pair, Tensor]]]
) -> None:
    """Let eager attention of `transformers` add what ``hosts`` read from their prompts; written without the
    library.
    """

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def slow(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Any,
            scaling: Any = None,
            **more: Any,
        ) -> Any:
            output, weights = real(module, query, key, value, mask, scaling=scaling, **more)
            if module in hosts:
                pair, gate = hosts[module](module)
                factor = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
                output = output + read_prompt(query, pair, factor, gate).transpose(1, 2)
            return output, weights

        return slow

    _everywhere(monkeypatch, hosts, wrap)


def slow_prefixes(monkeypatch: pytest.MonkeyPatch, hosts: Mapping[nn.Module, Tensor]) -> None:
    """Let eager attention of `transformers` see the keys and values that ``hosts`` have,
    ``(length, 2 * width)``.
    """

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def slow(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
            if module in hosts:
                keys, values = hosts[module].unflatten(-1, (2, key.shape[1], -1)).permute(1, 2, 0, 3)[:, None]
                keys, values = (x.expand(key.shape[0], -1, -1, -1) for x in (keys, values))
                key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
                length = keys.shape[2]
                mask = (
                    None
                    if mask is None
                    else F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
                )
                if more.get("position_bias") is not None:
                    more["position_bias"] = F.pad(more["position_bias"], (length, 0))
            return real(module, query, key, value, mask, **more)

        return slow

    _everywhere(monkeypatch, hosts, wrap)


def _everywhere(
    monkeypatch: pytest.MonkeyPatch, hosts: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    for name in {type(host).__module__ for host in hosts}:
        module = sys.modules[name]
        if not hasattr(module, "eager_attention_forward"):
            pytest.skip("in this version of transformers it computes attention on its own")
        monkeypatch.setattr(module, "eager_attention_forward", wrap(module.eager_attention_forward))
