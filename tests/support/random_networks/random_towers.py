"""Random towers: residual and grouped convolutions, then attention and perceptrons on tokens."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Adds its body to what enters."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Grouped(nn.Module):
    """Attention in which several query heads share a key/value head."""

    def __init__(self, width: int, heads: int, shared: int, size: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, heads // shared, size
        self.q = nn.Linear(width, heads * size)
        self.k, self.v = (nn.Linear(width, self.kv_heads * size) for _ in range(2))
        self.out = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        shared = self.heads // self.kv_heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        weights = torch.softmax(q @ k.mT / self.head_dim**0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Tower(nn.Module):
    """Convolutional blocks, flattened to tokens, transformer blocks, and a linear head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        width = rng.choice((6, 8, 12))
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.convolutions = nn.Sequential(*[_conv(rng, width) for _ in range(rng.randrange(5))])
        self.tokens = nn.Sequential(*[_token(rng, width) for _ in range(rng.randrange(3, 8))])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolutions(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.tokens(x)).mean(1))


def _conv(rng: random.Random, width: int) -> nn.Module:
    inner = rng.choice((4, 6, 8, 12))
    groups = rng.choice([g for g in (1, 2, 3, 4) if inner % g == 0])
    kinds: list[Callable[[], nn.Module]] = [
        lambda: Residual(
            nn.Conv2d(width, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
        ),
        lambda: Residual(
            nn.Conv2d(width, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
        ),
        lambda: nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)),
    ]
    return rng.choice(kinds)()


def _token(rng: random.Random, width: int) -> nn.Module:
    heads, shared = rng.choice(((2, 1), (4, 1), (4, 2), (6, 3), (6, 1), (8, 2)))
    hidden, size = rng.choice((6, 10, 16)), rng.choice((2, 3))
    kinds: list[Callable[[], nn.Module]] = [
        lambda: Residual(nn.LayerNorm(width), Grouped(width, heads, shared, size)),
        lambda: Residual(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        ),
    ]
    return rng.choice(kinds)()
