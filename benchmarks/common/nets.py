"""Networks for 8x8 digits, each of a kind that couples its channels in another way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from elesh.demo.network import ResidualBlock, TransformerBlock

__all__ = ["NETS"]


def _conv(into: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class ResNet(nn.Module):
    """Residual streams coupled by additions, two downsamplings (He et al. 2016)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = _conv(1, w)
        self.blocks = nn.Sequential(
            ResidualBlock(w, w),
            ResidualBlock(w, w),
            ResidualBlock(w, 2 * w, 2),
            ResidualBlock(2 * w, 2 * w),
            ResidualBlock(2 * w, 4 * w, 2),
            ResidualBlock(4 * w, 4 * w),
        )
        self.fc = nn.Linear(4 * w, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(self.blocks(self.stem(x)).mean((2, 3))))


class Concat(nn.Module):
    """Every layer reads the concatenation of all before (Huang et al. 2017), with a transition."""

    def __init__(self, growth: int = 24) -> None:
        super().__init__()
        g = growth
        self.stem = _conv(1, 2 * g)
        self.first = nn.ModuleList(_conv((2 + i) * g, g) for i in range(3))
        self.transition = _conv(5 * g, 2 * g, 2)
        self.second = nn.ModuleList(_conv((2 + i) * g, g) for i in range(2))
        self.fc = nn.Linear(4 * g, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.first:
            x = torch.cat([x, layer(x)], 1)
        x = self.transition(x)
        for layer in self.second:
            x = torch.cat([x, layer(x)], 1)
        return torch.as_tensor(self.fc(x.mean((2, 3))))


class Vgg(nn.Module):
    """Plain convolutions, flatten, two linear layers (Simonyan and Zisserman 2015)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.features = nn.Sequential(
            _conv(1, w), _conv(w, w), nn.MaxPool2d(2),
            _conv(w, 2 * w), _conv(2 * w, 2 * w), nn.MaxPool2d(2), _conv(2 * w, 4 * w),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * w, 6 * w), nn.ReLU(), nn.Linear(6 * w, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.classifier(self.features(x)))


class Vit(nn.Module):
    """Patches and transformer blocks; the hidden units of the feed-forward parts are channels."""

    def __init__(
        self, width: int = 32, depth: int = 3, heads: int = 4, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        blocks = (TransformerBlock(width, heads, hidden or 3 * width) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return torch.as_tensor(self.fc(self.norm(self.blocks(x)).mean(1)))


def deep_vit() -> Vit:
    """The same with more to lose: eight of its 40 heads go at 20%, and eight of 40 hidden units.

    Fixed before any order but torch-pruning's magnitude had been run on it (decision 0082).
    """
    return Vit(depth=5, heads=8, hidden=8)


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "concat": Concat,
    "vgg": Vgg,
    "vit": Vit,
    "vit-deep": deep_vit,
}
"""By the name that benchmarks take on the command line."""
