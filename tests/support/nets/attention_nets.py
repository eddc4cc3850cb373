"""Networks with attention of the kinds that users have, with inputs and what their heads are.

A process that uses none of transformers' does without that library: it takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from shared import kept
from torch import Tensor, nn
from torch.nn import functional

from elesh.demo.network import DigitsNet
from elesh.trainer import Recorder
from leyline import PrunedArchitecture

WIDTH, TOKENS = 16, 6


class Own(nn.Module):
    """Separate projections, softmax by hand, head size kept, heads narrower than the stream."""

    def __init__(self, heads: int = 4, head_dim: int = 3) -> None:
        super().__init__()
        self.n_head, self.head_dim = heads, head_dim
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * head_dim) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, WIDTH, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.mT / self.head_dim**0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """One layer for queries, keys and values, and the fused kernel (as in timm)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Cross(nn.Module):
    """Two query heads to each key/value head; keys and values from one layer, of other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = 6, 3, 4
        self.to_q, self.to_kv = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.to_out = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        kv = self.to_kv(x[:, 1:4]).unflatten(-1, (2, self.kv_heads, self.size))
        k, v = kv.permute(2, 0, 3, 1, 4).repeat_interleave(2, 2)
        weights = (q @ k.mT / 2).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class ByHead(Fused):
    """Queries, keys and values lie head by head (as in GPT-NeoX); each is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_heads, 3, self.head_dim)
        q, k, v = self.qkv(x).reshape(shape).permute(3, 0, 2, 1, 4).unbind(0)
        weights = (self.q_norm(q) @ self.k_norm(k).mT / 2).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Positions(Fused):
    """A table of positions by head, a scale for each, weights that a function uses and keys
    without a bias (as in BEiT and Swin v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(WIDTH)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.table = nn.Parameter(torch.randn(31, 4))
        self.register_buffer("places", torch.arange(16)[:, None] - torch.arange(16) + 15)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        made = functional.linear(x, self.qkv.weight, bias)
        q, k, v = made.reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        told = self.table[self.places].permute(2, 0, 1)
        weights = ((q * self.scale) @ k.mT + told).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class MultiQuery(Own):
    """One key and one value head for all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.num_key_value_groups = 4

    def forward(self, x: Tensor) -> Tensor:
        q, size = self.split(self.q(x)), self.num_key_value_groups
        k, v = (f(x).unsqueeze(1).repeat_interleave(size, 1) for f in (self.k, self.v))
        weights = torch.softmax(q @ k.mT, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class SharedPositions(nn.Module):
    """Two layers that add the same table of positions (as in T5)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.table = nn.Linear(5, WIDTH), nn.Embedding(6, 4)
        self.first, self.second = Own(), Own()
        self.leave = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        places = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).clamp(min=0)
        told = self.table(places).permute(2, 0, 1)
        for one in (self.first, self.second):
            q, k, v = (one.split(f(x)) for f in (one.q, one.k, one.v))
            weights = torch.softmax(q @ k.mT + told, -1)
            x = x + one.out((weights @ v).transpose(1, 2).flatten(2))
        return self.leave(x.mean(1))


class Vit(nn.Module):
    """Two pre-norm blocks on sixteen patches."""

    def __init__(self, attention: Callable[[], nn.Module] = Own) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 2, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.attention = nn.ModuleList(attention() for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(1))


class Native(nn.Module):
    """``nn.MultiheadAttention``: causal in the tokens, padded, and with keys of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, WIDTH)
        self.first = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.second = nn.MultiheadAttention(WIDTH, 2, kdim=5, vdim=5, bias=False)
        self.leave = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        padded = torch.arange(TOKENS).expand(len(x), -1) > 4
        y = y + self.first(y, y, y, attn_mask=mask, key_padding_mask=padded, need_weights=False)[0]
        z, t = y.transpose(0, 1), x.transpose(0, 1)
        return self.leave((z + self.second(z, t, t)[0]).mean(0))


def _tokens(count: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(count, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": torch.randint(2, 50, (count, 7), generator=g), "attention_mask": mask}


def _noise(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def _pixels(count: int) -> dict[str, Tensor]:
    return {"pixel_values": _noise(3, 8, 8)(count)}


_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "attn_implementation": "eager",
}
_TEXT: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def _bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(max_position_embeddings=20, **_COMMON, **_TEXT)
    return transformers.BertForSequenceClassification(config)


def _vit() -> nn.Module:
    import transformers

    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, **_COMMON)
    )


def _gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_inner=40, n_positions=20, attn_implementation="eager",
        **_TEXT,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        **{**_COMMON, "num_attention_heads": 8}, num_key_value_heads=4, **_TEXT
    )
    return transformers.LlamaForCausalLM(config)


Inputs = Callable[[int], Any]
NETS: dict[str, tuple[Callable[[], nn.Module], Inputs, dict[str, int]]] = {
    "own": (Vit, _noise(1, 8, 8), {"attention.0": 4, "attention.1": 4}),
    "fused": (lambda: Vit(Fused), _noise(1, 8, 8), {"attention.0": 4, "attention.1": 4}),
    "cross": (lambda: Vit(Cross), _noise(1, 8, 8), {"attention.0": 3, "attention.1": 3}),
    "by head": (lambda: Vit(ByHead), _noise(1, 8, 8), {"attention.0": 4, "attention.1": 4}),
    "positions": (lambda: Vit(Positions), _noise(1, 8, 8), {"attention.0": 4, "attention.1": 4}),
    "multi-query": (lambda: Vit(MultiQuery), _noise(1, 8, 8), {"attention.0": 4, "attention.1": 4}),
    "shared positions": (SharedPositions, _noise(TOKENS, 5), {"first": 4}),
    "digits": (DigitsNet, _noise(1, 8, 8), {"transformer.attention": 4}),
    "native": (Native, _noise(TOKENS, 5), {"first": 4, "second": 2}),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True), 2
        ),
        _noise(TOKENS, WIDTH),
        {"layers.0.self_attn": 4, "layers.1.self_attn": 4},
    ),
    "BERT": (_bert, _tokens, {f"bert.encoder.layer.{i}.attention": 4 for i in range(2)}),
    "ViT": (_vit, _pixels, {f"vit.layers.{i}.attention": 4 for i in range(2)}),
    "GPT-2": (_gpt2, _tokens, {f"transformer.h.{i}.attn": 4 for i in range(2)}),
    "Llama": (_llama, _tokens, {f"model.layers.{i}.self_attn": 4 for i in range(2)}),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The network with seeded weights, none of them trivial."""
    torch.manual_seed(seed)
    model = NETS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs(name: str, count: int = 3) -> Any:
    """A batch for it."""
    return NETS[name][1](count)


@cache
def architecture_of(name: str) -> PrunedArchitecture:
    """What a recorder finds in the network, found once."""
    return kept(f"attention-{name}", lambda: Recorder(build(name), inputs(name)).architecture)
