"""Networks in which a product of two activations sums over channels that no layer reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETS", "Uneven"]


class _Head(nn.Module):
    """One head of an attention, as a module: [B, T, D] to [B, T, W]."""

    def __init__(self, width: int, own: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, own) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query(x), self.key(x)
        scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5
        return torch.as_tensor(scores.softmax(-1) @ self.value(x))


class _Joined(nn.Module):
    """Two heads, one behind the other: [B, T, 16] to [B, T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(16, 12) for _ in range(2))
        self.join = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.join(torch.cat([head(x) for head in self.heads], -1)))


class ModuleForEachHead(nn.Module):
    """[B, T, 16] to [B, T, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention, self.leave = nn.Linear(16, 16), _Joined(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return torch.as_tensor(self.leave(x + self.attention(x)))


class AttentionOfMaps(nn.Module):
    """A single head over positions, as diffusion models have it: [B, 3, H, W] to [B, 3, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 1)
        self.q, self.k, self.v, self.out = (nn.Conv2d(12, 12, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        b, c, h, w = q.shape
        scores = torch.bmm(q.reshape(b, c, h * w).permute(0, 2, 1), k.reshape(b, c, h * w))
        weights = (scores * int(c) ** -0.5).softmax(2)
        made = torch.bmm(v.reshape(b, c, h * w), weights.permute(0, 2, 1)).reshape(b, c, h, w)
        return torch.as_tensor(self.leave(x + self.out(made)))


class TwoTowers(nn.Module):
    """[B, 10] to [B, B], by inner products of lengths 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(10, 16, bias=False), nn.Linear(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        one, two = (functional.normalize(tower(x), dim=-1) for tower in (self.one, self.two))
        return one @ two.t()


class Interactions(nn.Module):
    """All pairs of three vectors, and one of them besides: [B, 10] to [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Linear(10, 12) for _ in range(3))
        self.leave = nn.Linear(12 + 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([tower(x) for tower in self.towers], 1)
        pairs = torch.bmm(made, made.transpose(1, 2)).flatten(1)
        return torch.as_tensor(self.leave(torch.cat([made[:, 0], pairs], 1)))


class Uneven(nn.Module):
    """A product with something that no layer makes: [B, T, 10] to [B, T, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.enter(x) @ x.transpose(1, 2))


NETS = {
    "a module for each head": (
        ModuleForEachHead,
        torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0)),
        {"enter": 16}
        | {f"attention.heads.{n}.{part}": 12 for n in (0, 1) for part in ("query", "value")},
    ),
    "attention of maps": (
        AttentionOfMaps,
        torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)),
        {"enter": 12, "q": 12},
    ),
    "two towers": (
        TwoTowers,
        torch.randn(4, 10, generator=torch.Generator().manual_seed(0)),
        {"one": 16},
    ),
    "interactions": (
        Interactions,
        torch.randn(3, 10, generator=torch.Generator().manual_seed(0)),
        {"towers.0": 12},
    ),
}
"""By name: how it is made, its inputs, and the sizes of the groups that may go."""
