"""Small random base models of different builds, each with inputs and one tensor as its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Base:
    """A way to make a model, and what to feed it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    attention: bool = True
    embeds: bool = False

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model, frozen: PyTorch may choose other kernels where the weights need gradients (T5's
        biased SDPA).
        """
        torch.manual_seed(0)
        return self.build().to(dtype).eval().requires_grad_(False)

    def output(self, model: nn.Module) -> Tensor:
        """The model's output for its inputs, floats in the model's dtype."""
        torch.manual_seed(1)
        dtype = next(model.parameters()).dtype
        inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in self.inputs().items()}
        result = model(**inputs)
        if isinstance(result, Tensor):
            return result
        return result.logits if "logits" in result else result.last_hidden_state


class MLP(nn.Module):
    """Linears with and without bias in a Sequential, and a module that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 16, bias=False), nn.LayerNorm(16)
        )
        self.out = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(input=self.body(x))


class ConvNet(nn.Module):
    """Convolutions with a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 4 * 4, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class SDPABlock(nn.Module):
    """Attention written by hand with `F.scaled_dot_product_attention`, and an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.wq, self.wk, self.wv = (nn.Linear(dim, dim) for _ in range(3))
        self.wo = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SDPATransformer(nn.Module):
    """A decoder that no library has seen."""

    def __init__(self, vocab: int = 50, dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(SDPABlock(dim) for _ in range(depth))
        self.lm_head = nn.Linear(dim, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def ids(rows: int = 2, length: int = 7, vocab: int = 50) -> Tensor:
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(3))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def llama(**changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"pad_token_id": 0} | changes)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def bert() -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(bert_config())


def bert_config() -> object:
    from transformers import BertConfig

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, num_labels=3)


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, num_labels=3)
    return RobertaForSequenceClassification(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


BASES = [
    Base("mlp", MLP, lambda: {"x": noise(4, 12)}, attention=False),
    Base("conv", ConvNet, lambda: {"x": noise(2, 3, 6, 6)}, attention=False),
    Base("sdpa", SDPATransformer, lambda: {"ids": ids()}),
    Base("llama", llama, lambda: {"input_ids": ids()}, embeds=True),
    Base("gpt2", gpt2, lambda: {"input_ids": ids()}, embeds=True),
    Base("bert", bert, lambda: {"input_ids": ids()}, embeds=True),
    Base("t5", t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(length=4)}, embeds=True),
    Base("vit", vit, lambda: {"pixel_values": noise(2, 3, 8, 8)}),
]
BY_NAME = {base.name: base for base in BASES}
