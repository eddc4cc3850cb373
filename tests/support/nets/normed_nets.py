"""Networks whose weights are directions times gains, or computed in another way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Attention", "Vocoder", "towers"]

Normed = Callable[[nn.Module], nn.Module]


class Vocoder(nn.Module):
    """Upsampling and a residual block of dilated convolutions, [B, 8, L] to [B, 1, 2 L]."""

    def __init__(self, normed: Normed) -> None:
        super().__init__()
        self.enter = normed(nn.Conv1d(8, 16, 7, padding=3))
        self.up = normed(nn.ConvTranspose1d(16, 12, 4, 2, 1))
        self.near = normed(nn.Conv1d(12, 12, 3, padding=1))
        self.far = normed(nn.Conv1d(12, 12, 3, padding=3, dilation=3))
        self.leave = normed(nn.Conv1d(12, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(functional.leaky_relu(self.enter(x), 0.1))
        y = self.near(functional.leaky_relu(x, 0.1))
        return torch.tanh(self.leave(self.far(functional.leaky_relu(y, 0.1)) + x))


class Attention(nn.Module):
    """An attention of separate layers, [B, T, 10] to [B, T, 5]."""

    def __init__(self, normed: Normed) -> None:
        super().__init__()
        self.enter, self.heads = nn.Linear(10, 16), 4
        self.q, self.k, self.v, self.o = (normed(nn.Linear(16, 16)) for _ in range(4))
        self.leave = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        shape = (*x.shape[:2], self.heads, 4)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave(x + self.o(mixed))


def towers(normed: Normed) -> nn.Sequential:
    """Plain, grouped and depthwise convolutions and a linear layer, [B, 8, L] to [B, 3]."""
    return nn.Sequential(
        normed(nn.Conv1d(8, 32, 1, bias=False)),
        nn.BatchNorm1d(32),
        normed(nn.Conv1d(32, 32, 5, padding=2, groups=4)),
        nn.GELU(),
        normed(nn.Conv1d(32, 32, 3, groups=32)),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        normed(nn.Linear(32, 12)),
        nn.ReLU(),
        nn.Linear(12, 3),
    )
