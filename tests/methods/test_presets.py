"""Configs by name, and what is said of those that cannot be."""

from __future__ import annotations

import pytest

import grafts
from helpers.bases import BY_NAME, llama

LLAMA, BERT, SDPA = BY_NAME["llama"], BY_NAME["bert"], BY_NAME["sdpa"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq_bm", "no method is called 'seq_bm'; did you mean 'seq_bn'"),
        ("seq_bn[reduction=4]", "BnConfig has no field 'reduction'; did you mean 'reduction_factor'"),
        ("seq_bn[reduction_factor=]", "cannot be read"),
        ("seq_bn[16]", "options are written name=value"),
        ("seq_bn[reduction_factor=__import__('os').getcwd()]", "cannot be read"),
        ("seq_bn[reduction_factor=0]", "it must be a number above 0"),
        ("seq_bn[non_linearity='reloo']", "it must be an activation"),
        ("seq_bn|", "no config"),
        ("mam[prefix_length=3]", "'mam' is a union and takes no options"),
        ("seq_bn[reduction_factor={'5': 4}]", "reduction_factor names layer '5'"),
        ("seq_bn[reduction_factor={'1': 4}]", "reduction_factor has neither '0' nor 'default'"),
        ("compacter[reduction_factor=16]", "phm_dim=4 has to divide"),
        ("loreft[prefix_positions=0]", "else nothing is changed"),
        ("loreft[layers=[0, 7]]", "layers names layer 7; there are 2"),
        ("seq_bn[target_roles=['o']]", "target_roles has no meaning for Bottleneck adapter"),
        ("loreft[r=99]", "r=99 orthonormal rows cannot be had in 16 dimensions"),
        ("seq_bn[leave_out=[2]]", "leave_out names layer 2"),
        ("seq_bn[reduction_factor={'default': 4, 'first': 2}]", "reduction_factor names layer 'first'"),
        ("lora[use_gating=True, use_dora=True]", "use_gating is True; it must be False beside use_dora"),
    ],
)
def test_texts_and_options_that_cannot_be_say_why(text: str, message: str) -> None:
    with pytest.raises(grafts.ConfigError, match=message):
        grafts.add(LLAMA.model(), text)


def test_every_preset_is_a_config_and_fits_a_transformer() -> None:
    from grafts.methods._presets import PRESETS

    model = llama(hidden_size=64, num_attention_heads=4)
    for name in PRESETS:
        small = "[reduction_factor=4]" if "compacter" in name else ""
        assert grafts.plan(model, name + small).parameters > 0
