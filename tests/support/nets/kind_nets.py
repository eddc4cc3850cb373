"""Small networks, each with a kind of layer that ties its channels in a way of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer = nn.Module | None
Normed = Callable[[nn.Module], nn.Module]
"""Makes a layer compute its weight, of a direction and a gain or in another way."""


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


class Scaled(nn.Module):
    """Tokens are mixed on a transposed map, and what comes back is scaled by channel (ResMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tokens = nn.Conv2d(3, 14, 2, 2), nn.Linear(16, 16)
        self.scale, self.out = nn.Parameter(torch.rand(14) + 0.5), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        mixed = self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.out((x + torch.relu(self.scale * mixed)).mean(1))


class StateSpace(nn.Module):
    """A recurrence with a state of its own in each channel, whose decay and inputs depend on what
    comes in; a depthwise convolution and a projection that functions use (Mamba)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.enter = nn.Linear(24, 12), nn.Linear(12, 20, bias=False)
        self.conv = nn.Conv1d(10, 10, 3, groups=10)
        self.select, self.step = nn.Linear(10, 2 + 2 * 4, bias=False), nn.Linear(2, 10)
        self.decay, self.skip = nn.Parameter(torch.rand(10, 4)), nn.Parameter(torch.rand(10))
        self.leave, self.out = nn.Linear(10, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2).mT)
        inner, gate = self.enter(x).mT.chunk(2, 1)
        weight = self.conv.weight.squeeze(1).unsqueeze(1)
        inner = functional.conv1d(inner, weight, self.conv.bias, padding=1, groups=len(weight))
        inner = functional.silu(inner)
        step, into, out = self.select(inner.mT).split([2, 4, 4], -1)
        step = functional.softplus(self.step.weight @ step.mT + self.step.bias[:, None])
        decay = torch.exp(-torch.exp(self.decay)[None, :, None] * step[..., None])
        added = step[..., None] * into[:, None] * inner[..., None]
        state, made = torch.zeros_like(added[:, :, 0]), []
        for at in range(added.shape[2]):
            state = decay[:, :, at] * state + added[:, :, at]
            made.append((state @ out[:, at, :, None])[:, :, 0])
        y = torch.stack(made, -1) + inner * self.skip[None, :, None]
        return self.out((x + self.leave((y * functional.silu(gate)).mT)).mean(1))


class CrossNative(nn.Module):
    """PyTorch's own attention: queries of one stream, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.there = nn.Conv2d(3, 15, 2, 2), nn.Conv2d(3, 15, 4, 4)
        self.attention = nn.MultiheadAttention(15, 3, batch_first=True)
        self.out = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        here, there = (f(x).flatten(2).transpose(1, 2) for f in (self.here, self.there))
        mixed, _ = self.attention(here, there, there, need_weights=False)
        return self.out((here + mixed).mean(1))


class CrossStage(nn.Module):
    """Splits what a layer makes in halves, of which one passes by (YOLO, CSPNet)."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.stem, self.enter = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 18, 1)
        self.inner, self.leave = nn.Conv2d(9, 9, 3, padding=1), nn.Conv2d(18, 5, 1)
        self.c = self.expand_chs = 0
        if whole:
            self.expand_chs = 18
        else:
            self.c = 9

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.enter(self.stem(x)).relu().split(self.c or self.expand_chs // 2, 1)
        second = second + self.inner(second).relu()
        return self.leave(torch.cat([first, second], 1)).mean((2, 3))


class Stacked(nn.Module):
    """Two branches, and two heads, whose outputs are stacked and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 9), nn.Linear(64, 9)
        self.heads = nn.ModuleList(nn.Linear(27, 5) for _ in "12")

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        y = torch.stack([self.left(x), self.right(x)]).mean(0).relu().flatten(1)
        return torch.stack([head(y) for head in self.heads]).mean(0)


class EncoderDecoder(nn.Module):
    """PyTorch's own transformer, which checks the width of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(3, 12), nn.Linear(3, 12)
        self.both = nn.Transformer(12, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return self.out(self.both(self.source(tokens[:, :7]), self.target(tokens[:, 9:14])))


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
