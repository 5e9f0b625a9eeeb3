"""Configs from text: presets by name, options in brackets, unions with ``|``, as AdapterHub writes them."""

from __future__ import annotations

import ast
import re
from typing import Any

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, did_you_mean
from grafts.methods._registry import method_named, method_names
from grafts.methods.union import UnionConfig

_SEQUENTIAL = {"reduction_factor": 16, "original_ln_before": True, "non_linearity": "relu"}
_DOUBLE = {"mh_adapter": True, "reduction_factor": 16, "non_linearity": "swish"}
_PARALLEL = {"reduction_factor": 2, "init_weights": "mam_adapter", "is_parallel": True, "scaling": 4.0}
_HYPERCOMPLEX = {"phm_layer": True, "reduction_factor": 32, "non_linearity": "gelu"}
_INVERTIBLE = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
_ADAPTER_PLUS = {
    "reduction_factor": 96, "non_linearity": "gelu", "original_ln_before": True, "original_ln_after": False,
    "residual_before_ln": False, "stochastic_depth": 0.1, "init_weights": "houlsby", "scaling": "channel",
}  # fmt: skip
# what AdapterHub's prefixes are where these of the field's standard are not: no positions of their own, in
# all attention
_PREFIX: dict[str, Any] = {
    "num_virtual_tokens": 30,
    "count_positions": False,
    "attention": ("encoder", "self", "cross"),
}

_GATED_LORA = {"r": 8, "lora_alpha": 2, "use_gating": True, "target_roles": ("q", "v")}

# name -> the methods that it is made of and their options; the paper's numbers where it has some
PRESETS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    **dict.fromkeys(("seq_bn", "pfeiffer"), (("bottleneck", _SEQUENTIAL),)),
    **dict.fromkeys(("double_seq_bn", "houlsby"), (("bottleneck", _DOUBLE),)),
    **dict.fromkeys(("par_bn", "parallel"), (("bottleneck", _PARALLEL),)),
    **dict.fromkeys(
        ("scaled_par_bn", "scaled_parallel"), (("bottleneck", {**_PARALLEL, "scaling": "learned"}),)
    ),
    **dict.fromkeys(("seq_bn_inv", "pfeiffer+inv"), (("bottleneck", {**_SEQUENTIAL, **_INVERTIBLE}),)),
    **dict.fromkeys(("double_seq_bn_inv", "houlsby+inv"), (("bottleneck", {**_DOUBLE, **_INVERTIBLE}),)),
    "compacter++": (("bottleneck", {**_SEQUENTIAL, **_HYPERCOMPLEX}),),
    "compacter": (("bottleneck", {**_DOUBLE, **_HYPERCOMPLEX}),),
    "adapter_plus": (("bottleneck", _ADAPTER_PLUS),),
    "prefix_tuning": (("prefix_tuning", {}),),
    "prefix_tuning_flat": (("prefix_tuning", {"flat": True}),),
    "loreft": (("reft", {}),),
    "noreft": (("reft", {"orthogonality": False}),),
    "direft": (("reft", {"orthogonality": False, "subtract_projection": False}),),
    "dora": (("lora", {"use_dora": True}),),
    "mam": (
        ("prefix_tuning", {"bottleneck_size": 800}),
        ("bottleneck", _PARALLEL),
    ),  # He et al. 2021, section 4.5
    "unipelt": (  # Mao et al. 2022
        ("prefix_tuning", {"prefix_length": 10, "use_gating": True}),
        ("bottleneck", {**_SEQUENTIAL, "use_gating": True}),
        ("lora", _GATED_LORA),
    ),
}


def _made(method: str, values: dict[str, Any]) -> AdapterConfig:
    """The config of a method; a prefix may have AdapterHub's names for its options, and has its defaults."""
    if method == "prefix_tuning":
        renamed = {"prefix_length": "num_virtual_tokens", "bottleneck_size": "encoder_hidden_size"}
        flat = bool(values.get("flat", False))
        named = {renamed.get(name, name): value for name, value in values.items() if name != "flat"}
        values = {
            **_PREFIX,
            "prefix_projection": not flat,
            **({} if flat else {"encoder_hidden_size": 512}),
            **named,
        }
    cls = method_named(method).config
    cls.check_names(values)
    return cls(**values)


def config_from(config: AdapterConfig | str) -> AdapterConfig:
    """A config from a text; a config as it is.

    The text is the name of a preset (``seq_bn``, ``double_seq_bn``, ``par_bn``, ``scaled_par_bn``,
    ``seq_bn_inv``, ``double_seq_bn_inv``, ``compacter``, ``compacter++``, ``adapter_plus``,
    ``prefix_tuning``, ``prefix_tuning_flat``, ``loreft``, ``noreft``, ``direft``, ``dora``, ``mam``,
    ``unipelt``) or of a method, options in brackets, and several joined by ``|`` make a union.

    >>> config_from("seq_bn[reduction_factor=8]").reduction_factor
    8
    >>> [type(one).__name__ for one in config_from("prefix_tuning[flat=True]|par_bn").configs]
    ['PrefixTuningConfig', 'BnConfig']

    Raises:
        ConfigError: no such name or option, or brackets that do not fit; names the nearest.
    """
    if not isinstance(config, str):
        return config
    each = [_single(chunk.strip()) for chunk in _chunks(config)]
    flat = [one for made in each for one in (made.configs if isinstance(made, UnionConfig) else (made,))]
    return flat[0] if len(flat) == 1 else UnionConfig.from_configs(flat)


def _chunks(text: str) -> list[str]:
    """The parts between ``|``, those inside brackets and quotes being left alone."""
    chunks, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += {"[": 1, "]": -1}.get(char, 0) if not quote else 0
        if char == "|" and depth == 0 and not quote:
            chunks.append("")
        else:
            chunks[-1] += char
    return chunks


def _single(text: str) -> AdapterConfig:
    match = re.fullmatch(r"(?P<name>[^\[\]|\n]+?)\s*(?:\[(?P<values>.*)\])?", text, re.DOTALL)
    if match is None:
        raise ConfigError(f"{text!r} is no config: write name, or name[option=value, ...]")
    name, values = match["name"], _values(match["values"] or "", text)
    if name not in PRESETS and name not in method_names():
        raise ConfigError(f"no method is called {name!r}; {did_you_mean(name, [*PRESETS, *method_names()])}")
    parts = PRESETS.get(name, ((name, {}),))
    if len(parts) > 1 and values:
        raise ConfigError(
            f"{name!r} is a union and takes no options; write its parts apart, as in 'prefix_tuning|par_bn'"
        )
    each = [_made(method, {**own, **values}) for method, own in parts]
    return each[0] if len(each) == 1 else UnionConfig.from_configs(each)


def _values(text: str, whole: str) -> dict[str, Any]:
    """The options in brackets: Python literals, nothing is run."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("options are written name=value")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the options of {whole!r} cannot be read ({error}): write name[option=value, ...]"
        ) from error
