"""Selecting by name, against `peft`'s own function on names and patterns that nobody thought of."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grafts.modules.patterns import layer_index, matches, pattern_value
from grafts.sites.setup import child_key
from helpers.peers import peft

step = st.sampled_from(
    ["model", "layers", "h", "0", "1", "11", "q_proj", "proj", "q", "experts", "mlp", "v_proj"]
)
path = st.lists(step, min_size=1, max_size=6).map(".".join)
regex = st.sampled_from([r".*\.q_proj", r"model\.layers\.[01]\..*", ".*proj", "q", r".*\.(q|v)_proj$", ".*"])


@settings(max_examples=300, deadline=None)
@given(path, st.one_of(regex, st.lists(path, min_size=1, max_size=3)))
def test_selection_is_that_of_peft(path: str, patterns: str | list[str]) -> None:
    config = peft.LoraConfig(target_modules=patterns)
    assert matches(path, patterns) == bool(peft.tuners.tuners_utils.check_target_module_exists(config, path))


@settings(max_examples=300, deadline=None)
@given(path, st.lists(st.integers(0, 11), min_size=1, max_size=2), st.sampled_from([None, "layers", "h"]))
def test_layer_index_is_that_of_peft_where_it_finds_one(
    path: str, indices: list[int], pattern: str | None
) -> None:
    """Without a pattern `peft` wants two names before the number; here ``layers.0`` and ``0`` of a bare model
    count too.
    """
    name = f"base.model.{path}.q_proj"
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=indices, layers_pattern=pattern)
    found = layer_index(name, [pattern] if pattern else [])
    assert (found in indices) == bool(peft.tuners.tuners_utils.check_target_module_exists(config, name))


@settings(max_examples=300, deadline=None)
@given(path, st.lists(st.one_of(path, regex), max_size=3, unique=True))
def test_pattern_value_is_that_of_peft(path: str, patterns: list[str]) -> None:
    values = {pattern: index for index, pattern in enumerate(patterns)}
    assert pattern_value(path, values, -1) == values.get(
        peft.utils.other.get_pattern_key(list(values), path), -1
    )


@settings(max_examples=500)
@given(st.text(min_size=1), st.text(min_size=1))
def test_keys_of_different_adapter_names_differ_and_can_be_children(first: str, second: str) -> None:
    assert (child_key(first) == child_key(second)) == (first == second)
    assert "." not in child_key(first)


@pytest.mark.parametrize(
    ("name", "index"), [("0.linear", 0), ("blocks.3.wq", 3), ("h.2.mlp.experts.1.w", 2), ("lm_head", None)]
)
def test_layer_index_is_the_first_number(name: str, index: int | None) -> None:
    assert layer_index(name, []) == index
