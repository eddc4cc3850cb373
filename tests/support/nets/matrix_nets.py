"""Networks whose weights are parameters of their own, not of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETS", "TwoWays"]


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)


class Perceptron(nn.Module):
    """[B, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = _matrix(10, 16), nn.Parameter(torch.zeros(16))
        self.w2, self.b2 = _matrix(12, 16), nn.Parameter(torch.zeros(12))
        self.w3 = _matrix(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x @ self.w1 + self.b1)
        x = torch.tanh(functional.linear(x, self.w2, self.b2))
        return torch.mm(x, self.w3)


class Functional(nn.Module):
    """[B, 3, H, W] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _matrix(12, 3, 3, 3), _matrix(10, 12, 3, 3)
        self.added, self.head = nn.Parameter(torch.randn(12)), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(functional.conv2d(x, self.first, self.added, padding=1))
        x = torch.relu(functional.conv2d(x, self.second, padding=1))
        return torch.as_tensor(self.head(x.mean((2, 3))))


class EinsumAttention(nn.Module):
    """Heads by ``einsum``: [B, T, D] to [B, T, D]."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = (_matrix(heads, width, width // heads) for _ in range(3))
        self.o = _matrix(heads, width // heads, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bhtk,bhsk->bhts", q, k) / q.shape[-1] ** 0.5
        x = torch.einsum("bhts,bhsk->bhtk", scores.softmax(-1), v)
        return torch.einsum("bhtk,hkd->btd", x, self.o)


class Einsum(nn.Module):
    """[B, T] to [B, T, 9]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(9, 16), EinsumAttention()
        self.up, self.down, self.leave = _matrix(16, 20), _matrix(20, 16), nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x)
        x = x + torch.relu(x @ self.up) @ self.down
        return torch.as_tensor(self.leave(x))


class Fused(nn.Module):
    """Queries, keys and values of one parameter: [B, T, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.enter, self.leave = 4, nn.Linear(10, 16), nn.Linear(16, 5)
        self.qkv, self.o = _matrix(48, 16), _matrix(16, 16)
        self.added = nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        parts = functional.linear(x, self.qkv, self.added).chunk(3, -1)
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        made = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.as_tensor(self.leave((x + made @ self.o).mean(1)))


class Stepwise(nn.Module):
    """A recurrent network step by step: [B, T, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.feeds, self.leave = _matrix(10, 12), _matrix(12, 12), _matrix(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), self.feeds.shape[0])
        for step in x.unbind(1):
            state = torch.tanh(step @ self.reads + state @ self.feeds)
        return state @ self.leave


class Adapted(nn.Module):
    """A linear layer with a low rank beside it, the other way round: [B, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.leave = nn.Linear(10, 12), nn.Linear(12, 5)
        self.down, self.up = _matrix(4, 10), _matrix(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x) + 2.0 * (x @ self.down.T @ self.up.T)
        return torch.as_tensor(self.leave(torch.relu(x)))


class Experts(nn.Module):
    """Each expert multiplies by its own part: [B, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate = nn.Linear(10, 8), nn.Linear(8, 4)
        self.up, self.added, self.down = _matrix(4, 8, 12), _matrix(4, 12), _matrix(4, 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        inner = torch.relu(torch.einsum("bd,ndh->bnh", x, self.up) + self.added)
        made = torch.einsum("bnh,nho->bno", inner, self.down)
        return (self.gate(x).softmax(-1)[..., None] * made).sum(1)


class TwoWays(nn.Module):
    """Encodes and decodes by one parameter: [B, 10] to [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.tied, self.leave = nn.Linear(10, 12), _matrix(12, 8), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.enter(x)) @ self.tied
        return torch.as_tensor(self.leave(torch.relu(inner @ self.tied.T)))


_TOKENS = torch.arange(15).view(3, 5) % 9
NETS: dict[str, tuple[Any, Tensor, dict[str, int]]] = {
    "perceptron": (Perceptron, torch.randn(3, 10), {"w1": 16, "w2": 12}),
    "functional": (Functional, torch.randn(3, 3, 6, 6), {"first": 12, "second": 10}),
    "einsum": (Einsum, _TOKENS, {"embed": 16, "attention": 4, "up": 20}),
    "fused": (Fused, torch.randn(3, 6, 10), {"enter": 16, "o": 4}),
    "stepwise": (Stepwise, torch.randn(3, 4, 10), {"reads": 12}),
    "adapted": (Adapted, torch.randn(3, 10), {"plain": 12, "down": 4}),
    "experts": (Experts, torch.randn(3, 10), {"enter": 8, "up": 12}),
}
"""What makes a network, inputs, and the sizes of its prunable groups."""
