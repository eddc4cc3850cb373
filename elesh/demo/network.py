"""The demo's network and its data: residual convolutions, then attention, small enough for two
cores, on scikit-learn's 1,797 handwritten digits of 8x8, split by a seed.

All three levels have something to prune: channels of coupled residual streams and of block
interiors, hidden units of the transformer's feed-forward part, heads, and residual blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside an identity path (He et al. 2016), or a 1x1 one that strides.

    Args:
        dropped: share of the training batches that take the identity path alone.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dropped: float = 0.0) -> None:
        super().__init__()
        self.dropped = dropped
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H/stride, W/stride]."""
        if self.training and self.dropped and float(torch.rand(())) < self.dropped:
            return torch.relu(self.shortcut(x))
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Attention(nn.Module):
    """Multi-head self-attention with separate projections (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to [B, T, width]."""
        batch, tokens, _ = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)

        scores = split(self.query(x)) @ split(self.key(x)).transpose(-1, -2)
        weights = (scores / self.head_dim**0.5).softmax(-1)
        mixed = (weights @ split(self.value(x))).transpose(1, 2)
        return torch.as_tensor(self.output(mixed.reshape(batch, tokens, -1)))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward sublayers, each with an identity path."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to [B, T, width]."""
        x = x + self.attention(self.norm1(x))
        return torch.as_tensor(x + self.down(torch.relu(self.up(self.norm2(x)))))


class DigitsNet(nn.Module):
    """8x8 grey images to ten logits.

    Args:
        width: channels of the first stage, and of the transformer.
        heads: of each transformer block.
        classes: of the output.
        blocks: residual blocks of the two stages.
        layers: transformer blocks.
        fine: the first stage sees all 8x8 places. Otherwise the stem strides instead of the second
            stage, which costs a quarter as much.
        identity: residual branches begin at zero (Goyal et al. 2017, section 5.1), so that a block
            that is not needed stays one.
        dropped: share of the training batches that each block of the first stage sits out
            (stochastic depth, Huang et al. 2016), so that the network can do without some.
    """

    def __init__(
        self,
        width: int = 24,
        heads: int = 4,
        classes: int = 10,
        *,
        blocks: tuple[int, int] = (2, 2),
        layers: int = 1,
        fine: bool = True,
        identity: bool = False,
        dropped: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 1 if fine else 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        first, second = blocks
        self.stage1 = nn.Sequential(
            *(ResidualBlock(width, width, 1, dropped) for _ in range(first))
        )
        self.stage2 = nn.Sequential(
            ResidualBlock(width, 2 * width, 2 if fine else 1),
            *(ResidualBlock(2 * width, 2 * width) for _ in range(second - 1)),
        )
        self.tokens = nn.Linear(2 * width, width)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        towers = [TransformerBlock(width, heads, 2 * width) for _ in range(layers)]
        self.transformer: nn.Module = towers[0] if layers == 1 else nn.Sequential(*towers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        if identity:
            self._begin_as_identity()

    def _begin_as_identity(self) -> None:
        for module in self.modules():
            if isinstance(module, ResidualBlock) and isinstance(module.shortcut, nn.Identity):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, TransformerBlock):
                for last in (module.attention.output, module.down):
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = self.stage2(self.stage1(self.stem(x)))
        x = self.tokens(x.flatten(2).transpose(1, 2)) + self.position
        return torch.as_tensor(self.head(self.norm(self.transformer(x)).mean(1)))


_CALIBRATION = 512


@dataclass(frozen=True)
class Split:
    """Images [N, 1, 8, 8] in 0..1, float32, and labels [N], int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """Training data, data for workers to measure cuts on, validation data for the trainer's own
    check, and held-out data for the report.

    The calibration batch is a part of the training data; held-out data is looked at only to
    report, never to decide.
    """

    train: Split
    proof: Split
    validation: Split
    held_out: Split

    @classmethod
    def load(cls, seed: int) -> Digits:
        """60% to train, 12.5% for workers, 12.5% to validate, 15% held out."""
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(labels))
        x = torch.from_numpy((images[order] / 16).astype(np.float32)).view(-1, 1, 8, 8)
        y = torch.from_numpy(labels[order].astype(np.int64))
        ends = [int(share * len(y)) for share in (0, 0.6, 0.725, 0.85, 1)]
        return cls(*(Split(x[a:b], y[a:b]) for a, b in pairwise(ends)))

    def calibration(self, batch: int = 256) -> list[tuple[Tensor, Tensor]]:
        """The first 512 training samples, in batches: the same at every checkpoint."""
        stop = min(_CALIBRATION, len(self.train))
        return [
            (self.train.images[i : i + batch], self.train.labels[i : i + batch])
            for i in range(0, stop, batch)
        ]
