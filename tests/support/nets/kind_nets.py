"""Small networks, each with a kind of layer that ties its channels in a way of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer = nn.Module | None


class StandardisedConv(nn.Conv2d):
    """Standardises its weight row by row, with a gain (NFNet)."""

    def __init__(self, inputs: int, outputs: int, size: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2, groups=groups)
        self.gain, self.eps = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5), 1e-6
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gains = (self.gain * self.scale).view(-1)
        options = {"training": True, "momentum": 0.0, "eps": self.eps}
        weight = functional.batch_norm(rows, None, None, gains, **options)
        padding, groups = self.padding, self.groups
        return functional.conv2d(
            x, weight.reshape_as(self.weight), self.bias, 1, padding, 1, groups
        )


def standardised() -> nn.Module:
    """Dense and grouped convolutions with such weights."""
    return nn.Sequential(
        StandardisedConv(3, 10, 3), nn.ReLU(), StandardisedConv(10, 12, 3), nn.ReLU(),
        StandardisedConv(12, 12, 3, groups=3), nn.ReLU(), StandardisedConv(12, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


class Native(nn.Module):
    """PyTorch's own attention in a residual stream that is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norms = nn.Linear(3, 12), nn.ModuleList(nn.LayerNorm(12) for _ in "12")
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        y = self.norms[0](x)
        x = x + self.attention(y, y, y)[0]
        return self.out(self.norms[1](x))


class Merging(nn.Module):
    """Channels of neighbouring patches lie one after the other behind a permutation (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 6, 1), nn.LayerNorm(24)
        self.reduce, self.out = nn.Linear(24, 10), nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        count, high, wide, channels = x.shape
        x = x.reshape(count, high // 2, 2, wide // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        return self.out(torch.relu(self.reduce(self.norm(x.flatten(3)))).flatten(1))


def grouped(conv: nn.Module, norm: Layer = None, act: Layer = None) -> nn.Sequential:
    """A convolution in groups between two others."""
    width, made = conv.in_channels, conv.out_channels
    normed = nn.BatchNorm2d(width) if act is None else act
    head = [norm or nn.ReLU(), nn.Conv2d(made, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    middle = nn.ReLU() if act is None else act
    return nn.Sequential(nn.Conv2d(3, width, 3), normed, middle, conv, *head)
