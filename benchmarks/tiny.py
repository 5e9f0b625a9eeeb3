"""Tiny random models of every architecture in `transformers` that can be built from its config class with
small numbers.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from grafts.structure.example_inputs import example_inputs

GROUPS = {
    "causal-LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "speech seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
LIMIT = 30_000_000  # parameters

# what a field is set to where a config has it; the first of several builds that works is taken
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "emb_dim", "embed_dim", "hidden_dim"), 32
    ),
    **dict.fromkeys(
        ("encoder_hidden_size", "decoder_hidden_size", "projection_dim", "embedding_size", "d_embed"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "d_inner"),
        64,
    ),
    **dict.fromkeys(
        ("ffn_hidden_size", "mlp_hidden_size", "shared_expert_intermediate_size", "ffn_hidden_dim"), 64
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_ffn_hidden_size",
        ),
        32,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "depth", "e_layers", "d_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(
        ("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "attention_head_dim", "kv_channels", "d_head", "attention_head_size"), 8
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 64
    ),
    **dict.fromkeys(("vocab_size", "text_vocab_size", "decoder_vocab_size", "encoder_vocab_size"), 99),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
}
MORE: dict[str, Any] = {
    "rotary_dim": 4,
    "layer_group_size": 2,
    "attn_layer_indices": [1],
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "max_target_positions": 64,
    "attention_window": 4,
    "relative_attention_num_buckets": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "type_vocab_size": 2,
    "decoder_start_token_id": 1,
    "block_size": 4,
    "num_random_blocks": 1,
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "moe_layer_start_index": 1,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "qk_head_dim": 12,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
    "lru_width": 32,
    "attention_chunk_size": 16,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "expert_layer_period": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_offset": 1,
    "n_mamba_heads": 2,
    "mamba_headdim": 8,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "num_mem_blocks": 1,
    "adapter_rank": 4,
    "max_window_layers": 1,
    "num_nextn_predict_layers": 0,
    "classifier_proj_size": 32,
    "xvector_output_dim": 32,
    "hidden_sizes": [16, 24, 32, 32],
    "depths": [2, 2, 2, 2],
    "mamba_expand": 2,
    "shared_expert_size": 32,
    "wkv_lora": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "num_feature_layers": 2,
    "moe_num_shared_experts": 1,
    "entity_vocab_size": 20,
    "entity_emb_size": 16,
    "num_labels": 3,
    "axial_pos_embds_dim": [16, 16],
    "axial_pos_shape": [8, 8],
    "feed_forward_size": 64,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "local_chunk_length": 8,
    "codebook_size": 32,
    "num_buckets": 4,
    "attn_layers": ["local", "local"],
    "default_adapter": None,
    "languages": ["en_XX"],
}


def architectures() -> list[tuple[str, str, str]]:
    """Group, model type and class name of everything that is registered."""
    return [
        (group, model_type, name if isinstance(name, str) else name[0])
        for group, mapping in GROUPS.items()
        for model_type, name in getattr(modeling_auto, mapping).items()
    ]


def shrunk(config: Any, sizes: dict[str, Any], depth: int = 0) -> Any:
    """A config with small numbers, those of its sub-configs too."""
    names = {*vars(config), *getattr(config, "attribute_map", {})}
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, transformers.PretrainedConfig) and depth < 3:
            shrunk(value, sizes, depth + 1)
        elif name in sizes and value is not None and not (isinstance(value, bool) or callable(value)):
            with contextlib.suppress(Exception):
                setattr(config, name, sizes[name])
    layers = next(
        (
            getattr(config, n)
            for n in ("num_hidden_layers", "n_layer", "num_layers")
            if isinstance(getattr(config, n, None), int)
        ),
        None,
    )
    for name, value in list(vars(config).items()):
        per_layer = name.endswith(
            (
                "layer_types",
                "layers_block_type",
                "mlp_layer_types",
                "_per_layer",
                "layers_type",
                "block_types",
            )
        )
        if (
            isinstance(value, list)
            and layers is not None
            and len(value) > layers
            and (per_layer or "layer" in name)
        ):
            kinds = list(dict.fromkeys(map(str, value)))
            chosen = [next(v for v in value if str(v) == kind) for kind in kinds][-layers:]
            with contextlib.suppress(Exception):
                setattr(config, name, (chosen * layers)[:layers] if len(chosen) < layers else chosen)
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and name.endswith("token_id")
            and value >= 99
        ):
            with contextlib.suppress(Exception):
                setattr(config, name, 5)
        if isinstance(value, (list, tuple)) and name.endswith("token_id"):
            with contextlib.suppress(Exception):
                setattr(config, name, 2)
    return config


def configs(model_type: str, sizes: dict[str, Any]) -> list[Any]:
    """Small configs of a model type, made in different ways."""
    cls = CONFIG_MAPPING[model_type]
    ways = []
    with contextlib.suppress(Exception):
        ways.append(shrunk(cls(), sizes))
    fields = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__dataclass_fields__", {}))
    with contextlib.suppress(Exception):
        fields |= set(vars(cls()))
    given = {name: value for name, value in sizes.items() if name in fields}
    for name in ("text_config", "decoder", "thinker_config"):
        if isinstance(part := getattr(ways[0] if ways else None, name, None), transformers.PretrainedConfig):
            ways.append(part)
    while given:
        try:
            ways.append(shrunk(cls(**given), sizes))
            break
        except Exception as error:
            named = [name for name in given if name in str(error)]
            if not named:
                break
            given.pop(named[0])
    return ways


def tiny(model_type: str, class_name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny random model, and an input that it takes.

    Raises:
        RuntimeError: it cannot be built with small numbers; says why.
    """
    cls = getattr(transformers, class_name)
    why = "no config"
    everything = SIZES | MORE
    variants = [
        everything,
        everything | {"head_dim": 4},
        everything | {"qk_rope_head_dim": 8, "head_dim": 8},
        everything | {"expand": 1, "n_mamba_heads": 8, "mamba_headdim": None},
        {name: value for name, value in everything.items() if "mamba" not in name},
        SIZES,
        {name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")},
        everything | {"hidden_size": 64, "d_model": 64},
        everything | {"num_key_value_heads": 4, "num_kv_heads": 4, "multi_query_group_num": 4},
        everything | {"num_hidden_layers": 4, "n_layer": 4, "num_layers": 4},
    ]
    for sizes in variants:
        for config in configs(
            model_type, {name: value for name, value in sizes.items() if value is not None}
        ):
            if class_name.endswith(("CausalLM", "LMHeadModel", "ModelWithLMHead")) and hasattr(
                config, "is_decoder"
            ):
                config.is_decoder = True
            try:
                with torch.device("meta"):
                    count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            except Exception as error:
                count = 0
                why = f"{type(error).__name__}: {error}"
            if count > LIMIT:
                why = f"{count:,} parameters with small numbers"
                continue
            try:
                torch.manual_seed(0)
                model = cls(config)
                total = sum(p.numel() for p in model.parameters())
                if total > LIMIT:
                    why = f"{total:,} parameters with small numbers"
                    continue
                model = model.eval().requires_grad_(False)
                if hasattr(model, "set_default_language"):
                    model.set_default_language("en_XX")
                return model, working_inputs(model)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
    raise RuntimeError(why.strip().splitlines()[0][:160] if why.strip() else "unknown")


def working_inputs(model: nn.Module) -> dict[str, Any]:
    """The first of the tiny inputs that the model takes.

    Raises:
        RuntimeError: it takes none of them.
    """
    why = "no input could be made"
    for given in example_inputs(model):
        try:
            with torch.no_grad():
                torch.manual_seed(0)
                model(**given)
        except Exception as error:
            why = f"{type(error).__name__}: {error}" if why.startswith("no input") else why
            continue
        return given
    raise RuntimeError(why)


@contextlib.contextmanager
def silence() -> Any:
    """No warnings and no progress of `transformers`."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
