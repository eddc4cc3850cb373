"""The networks of the tasks; each takes its width, so that a small one can be trained instead.

Every network calls its last layer ``head``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from elesh.demo.network import ResidualBlock

__all__ = ["Attention", "Block", "ConvolutionVit", "Gpt", "ResNet", "Tabular", "Vit"]


class ResNet(nn.Module):
    """The ResNet of CIFAR (He et al. 2016, section 4.2): three stages; 3 blocks each: ResNet-20.

    Args:
        width: channels of the first stage; the second has twice, the third four times as many.
        blocks: residual blocks a stage.
    """

    def __init__(self, width: int = 16, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages, inputs = [], width
        for stage in range(3):
            for block in range(blocks):
                outputs, stride = width * 2**stage, 2 if stage and not block else 1
                stages.append(ResidualBlock(inputs, outputs, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] to [B, classes]."""
        return torch.as_tensor(self.head(self.blocks(self.stem(x)).mean((2, 3))))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017); head sizes are read off the tensors."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to [B, T, width]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return torch.as_tensor(self.output(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each beside an identity path."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to [B, T, width]."""
        x = x + self.attention(self.norm1(x))
        return torch.as_tensor(x + self.down(torch.relu(self.up(self.norm2(x)))))


class Vit(nn.Module):
    """A small vision transformer on 49 patches (Dosovitskiy et al. 2021), mean over tokens."""

    def __init__(self, width: int = 64, depth: int = 4, pixels: int = 28) -> None:
        super().__init__()
        side = pixels // 7
        self.patch: nn.Module = nn.Conv2d(1, width, side, side)
        self.position = nn.Parameter(torch.randn(1, 49, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4, False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] to [B, 10]."""
        return self.answers(self.blocks(self.embedded(x)))

    def embedded(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] to the stream, [B, T, width]."""
        return torch.as_tensor(self.patch(x).flatten(2).transpose(1, 2) + self.position)

    def answers(self, x: Tensor) -> Tensor:
        """From the stream behind all blocks to [B, 10]."""
        return torch.as_tensor(self.head(self.norm(x).mean(1)))


class ConvolutionVit(Vit):
    """The same on the 16 positions that a stem of three convolutions leaves of 28 x 28 pixels (Xiao
    et al. 2021): from patches that are cut out of an image a transformer learns far more slowly."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__(width, depth)
        narrow = width // 4
        self.patch = nn.Sequential(
            nn.Conv2d(1, narrow, 3, 2, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, 2 * narrow, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * narrow),
            nn.ReLU(),
            nn.Conv2d(2 * narrow, width, 3, 2, 1),
        )
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)


class Gpt(nn.Module):
    """A decoder on characters (Radford et al. 2019), learned positions."""

    def __init__(self, width: int, depth: int, context: int, characters: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.randn(1, context, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4, True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T] to [B, T, characters]."""
        return self.answers(self.blocks(self.embedded(x)))

    def embedded(self, x: Tensor) -> Tensor:
        """[B, T] to the stream, [B, T, width]."""
        return torch.as_tensor(self.characters(x) + self.position)

    def answers(self, x: Tensor) -> Tensor:
        """From the stream behind all blocks to [B, T, characters]."""
        return torch.as_tensor(self.head(self.norm(x)))


class Tabular(nn.Module):
    """Three hidden layers with batch normalisation."""

    def __init__(self, width: int, columns: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (columns, width, width):
            layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, columns] to [B, classes]."""
        return torch.as_tensor(self.head(self.layers(x)))
