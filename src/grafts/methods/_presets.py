"""Configs from text: presets by name, options in brackets, unions with ``|``, as AdapterHub writes them."""

from __future__ import annotations

import ast
import re
from typing import Any

from grafts.config import AdapterConfig
from grafts.errors import ConfigError, did_you_mean
from grafts.methods._registry import method_named, method_names
from grafts.methods.union import UnionConfig

# What the command line takes where no method is named.
USUAL = "lora"

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


# What AdapterHub calls the options of a prefix.
_PREFIX_OPTIONS = {"prefix_length": "num_virtual_tokens", "bottleneck_size": "encoder_hidden_size"}


def _config(method: str, options: dict[str, Any]) -> AdapterConfig:
    """The config of a method; a prefix may have AdapterHub's names for its options, and has its defaults."""
    if method == "prefix_tuning":
        options = _prefix_options(options)
    config_class: type[AdapterConfig] = method_named(method).config
    config_class.check_names(options)
    return config_class(**options)


def _prefix_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a prefix by the names that they have here, with AdapterHub's defaults."""
    is_flat = bool(options.get("flat", False))
    renamed = {**_PREFIX, "prefix_projection": not is_flat}
    if not is_flat:
        renamed["encoder_hidden_size"] = 512
    for name, value in options.items():
        if name != "flat":
            renamed[_PREFIX_OPTIONS.get(name, name)] = value
    return renamed


def config_from(config: AdapterConfig | str) -> AdapterConfig:
    """A config from a text; a config as it is.

    The text is the name of a preset (``seq_bn``, ``double_seq_bn``, ``par_bn``, ``scaled_par_bn``,
    ``seq_bn_inv``, ``double_seq_bn_inv``, ``compacter``, ``compacter++``, ``adapter_plus``,
    ``prefix_tuning``, ``prefix_tuning_flat``, ``loreft``, ``noreft``, ``direft``, ``dora``, ``mam``,
    ``unipelt``) or of a method, options in brackets, and several joined by ``|`` make a union.

    >>> config_from("seq_bn[reduction_factor=8]").reduction_factor
    8
    >>> [type(config).__name__ for config in config_from("prefix_tuning[flat=True]|par_bn").configs]
    ['PrefixTuningConfig', 'BnConfig']

    Raises:
        ConfigError: no such name or option, or brackets that do not fit; names the nearest.
    """
    if not isinstance(config, str):
        return config
    configs: list[AdapterConfig] = []
    for chunk in _chunks(config):
        configs += _configs_of(chunk.strip())
    if len(configs) == 1:
        return configs[0]
    return UnionConfig.from_configs(configs)


def _chunks(text: str) -> list[str]:
    """The parts between ``|``, those inside brackets and quotes being left alone."""
    chunks, depth = [""], 0
    # Whole quoted texts, of which the last may not end, and every other character by itself.
    for token in re.findall(r"'[^']*'?|\"[^\"]*\"?|.", text, re.DOTALL):
        if token == "[":
            depth += 1
        elif token == "]":
            depth -= 1
        if token == "|" and depth == 0:
            chunks.append("")
        else:
            chunks[-1] += token
    return chunks


def _configs_of(text: str) -> list[AdapterConfig]:
    """The configs of one preset or method, as ``name`` or ``name[option=value, ...]``."""
    match = re.fullmatch(r"(?P<name>[^\[\]|\n]+?)\s*(?:\[(?P<values>.*)\])?", text, re.DOTALL)
    if match is None:
        raise ConfigError(f"{text!r} is no config: write name, or name[option=value, ...]")
    name, options = match["name"], _values(match["values"] or "", text)
    if name not in PRESETS and name not in method_names():
        raise ConfigError(f"no method is called {name!r}; {did_you_mean(name, [*PRESETS, *method_names()])}")
    members = PRESETS.get(name, ((name, {}),))
    if len(members) > 1 and options:
        raise ConfigError(
            f"{name!r} is a union and takes no options; write its parts apart, as in 'prefix_tuning|par_bn'"
        )
    return [_config(method, {**preset, **options}) for method, preset in members]


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
