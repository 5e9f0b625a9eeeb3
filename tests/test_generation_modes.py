"""Every method in every way of generating: each gives the tokens that a search without a cache gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grafts
from grafts.methods import Method
from helpers.adapters import any_config, randomise, shake
from helpers.bases import ids
from test_generation import decoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*generation flags.*:UserWarning"),
]
NEW = 6
ROW = ids(rows=1, length=5, vocab=60)


def adapted(method: Method) -> Any:
    """A decoder with the method, whose tokens it moves. ReFT stays off the last positions, which move as
    tokens come.
    """
    model = grafts.init(decoder("llama")().eval().requires_grad_(False))
    changes = {"suffix_positions": 0} if "suffix_positions" in method.config.field_names() else {}
    model.add_adapter(any_config(method, **changes))
    shake(model, "default", 1)
    if changes:
        randomise(model, "default", scale=6.0)
    return model


def search(model: Any, **options: Any) -> Tensor:
    settings = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": 59,
        "attention_mask": torch.ones_like(ROW),
    }
    return model.generate(ROW, **(settings | options))


WAYS: dict[str, dict[str, Any]] = {
    "cache": {},
    "static cache": {"cache_implementation": "static"},
    "quantity of sequences": {"num_beams": 3, "num_return_sequences": 2},
    "beams with a static cache": {
        "num_beams": 3,
        "num_return_sequences": 2,
        "cache_implementation": "static",
    },
    "sampling": {"do_sample": True, "top_k": 5},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "chunks": {"prefill_chunk_size": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_way_of_generating_gives_the_tokens_of_a_search_without_cache(method: Method, way: str) -> None:
    model, options = adapted(method), WAYS[way]
    kept = {
        name: value
        for name, value in options.items()
        if name in ("num_beams", "num_return_sequences", "do_sample", "top_k")
    }
    torch.manual_seed(7)
    expected = search(model, use_cache=False, **kept)
    torch.manual_seed(7)
    assert torch.equal(search(model, **options), expected)
    moved = model(ROW).logits
    model.disable_adapters()
    assert not torch.allclose(model(ROW).logits, moved, atol=1e-3)


@torch.no_grad()
def test_assistant_with_or_without_adapters_changes_nothing(method: Method) -> None:
    model = adapted(method)
    expected = search(model)
    assert torch.equal(search(model, assistant_model=decoder("llama")().eval()), expected)
    assert torch.equal(search(model, assistant_model=adapted(method)), expected)


class Words:
    """A tokenizer as streamers use one."""

    def decode(self, tokens: Any, **options: Any) -> str:
        return "".join(f"{int(token)} " for token in tokens)


@torch.no_grad()
def test_streamer_gets_the_tokens_as_they_come(method: Method, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    model = adapted(method)
    expected = search(model)
    capsys.readouterr()
    search(model, streamer=TextStreamer(Words(), skip_prompt=True))
    assert [int(word) for word in capsys.readouterr().out.split()] == expected[0, ROW.shape[1] :].tolist()


@torch.no_grad()
def test_continuous_batching_gives_the_same_tokens_or_says_why_not(method: Method) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    ContinuousBatchingConfig, GenerationConfig = (
        transformers.ContinuousBatchingConfig,
        transformers.GenerationConfig,
    )
    model = adapted(method)
    rows = ids(rows=3, length=5, vocab=60)
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 59}
    expected = [model.generate(row[None], **greedy)[0, 5:].tolist() for row in rows]
    # sizes by hand, or it takes what memory there is
    sizes = ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64)
    outputs = model.generate_batch(
        inputs=[row.tolist() for row in rows],
        generation_config=GenerationConfig(**greedy, pad_token_id=0),
        continuous_batching_config=sizes,
        progress_bar=False,
    )
    made = list(outputs.values())
    if method.name in ("prompt_tuning", "p_tuning", "reft"):
        assert all("packed into one row" in output.error for output in made)
    else:
        assert [output.generated_tokens for output in made] == expected
