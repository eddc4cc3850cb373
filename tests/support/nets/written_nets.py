"""Small networks as people write them by hand, and inputs for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

_WIDTH, _HEADS, _TOKENS = 16, 4, 6


class GptAttention(nn.Module):
    """nanoGPT's: every size follows from the stream's width and two attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.n_head, self.n_embd = _HEADS, _WIDTH
        self.register_buffer("bias", torch.tril(torch.ones(1, 1, _TOKENS, _TOKENS)))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.size()
        shape = batch, tokens, self.n_head, width // self.n_head
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, 2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        weights = scores.masked_fill(self.bias[:, :, :tokens, :tokens] == 0, -math.inf).softmax(-1)
        made = (weights @ v).transpose(1, 2).contiguous().view(batch, tokens, width)
        return torch.as_tensor(self.c_proj(made))


class ListedAttention(nn.Module):
    """The annotated transformer's: projections in a list, and its own names of the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.d_k = _HEADS, _WIDTH // _HEADS
        self.linears = nn.ModuleList([nn.Linear(_WIDTH, _WIDTH) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        sizes = len(x), -1, self.h, self.d_k
        q, k, v = (linear(x).view(sizes).transpose(1, 2) for linear in self.linears[:3])
        weights = (q @ k.transpose(-2, -1) / math.sqrt(self.d_k)).softmax(-1)
        made = (weights @ v).transpose(1, 2).reshape(len(x), -1, self.h * self.d_k)
        return torch.as_tensor(self.linears[-1](made))


class ConfiguredAttention(nn.Module):
    """One that keeps no sizes of its own: they are in what it was made of, under common names."""

    def __init__(self) -> None:
        super().__init__()
        self.args = SimpleNamespace(n_embd=_WIDTH, n_head=_HEADS)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(self.args.n_embd, -1)
        q, k, v = (t.unflatten(-1, (self.args.n_head, -1)).transpose(1, 2) for t in parts)
        made = functional.scaled_dot_product_attention(q, k, v)
        return torch.as_tensor(self.out(made.transpose(1, 2).flatten(2)))


class SlopedAttention(nn.Module):
    """A bias for each head from slopes that it keeps in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.n_local_heads = _HEADS
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.register_buffer("slopes", 0.5 ** torch.arange(_HEADS))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        fused = self.qkv(x).view(batch, tokens, 3, self.n_local_heads, -1)
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        places = torch.arange(tokens)
        bias = self.slopes[:, None, None] * (places[None] - places[:, None])
        weights = (q @ k.transpose(-2, -1) + bias).softmax(-1)
        return torch.as_tensor(self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, -1)))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.attention, self.wide = attention, nn.Linear(_WIDTH, 24)
        self.narrow = nn.Linear(24, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return torch.as_tensor(x + self.narrow(self.wide(self.norm2(x)).relu()))


class Sinusoids(nn.Module):
    """Positions that are added from a buffer longer than the sequences."""

    def __init__(self) -> None:
        super().__init__()
        rates = torch.exp(torch.arange(0, _WIDTH, 2) * (-math.log(1e4) / _WIDTH))
        angles = torch.arange(9.0)[:, None] * rates
        positions = torch.stack([angles.sin(), angles.cos()], 2).reshape(1, 9, _WIDTH)
        self.register_buffer("pe", positions)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.size(1)]


class Tokens(nn.Module):
    """A language model of two blocks."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, _WIDTH), Sinusoids()
        self.blocks = nn.Sequential(*(Block(attention()) for _ in range(2)))
        self.head = nn.Linear(_WIDTH, 20)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.blocks(self.positions(self.embed(x)))))


class Frozen(nn.Module):
    """A normalisation by statistics that no longer change, as pretrained detectors have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        shape = 1, -1, 1, 1
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + 1e-5).rsqrt()
        return torch.as_tensor(
            x * scale + self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale
        )


class Constants(nn.Module):
    """Buffers along the channels, and one along those of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.register_buffer("offset", torch.randn(12, 1, 1))
        self.register_buffer("chosen", (torch.rand(1, 10, 1, 1) > 0.3).float())
        self.first, self.norm = nn.Conv2d(3, 12, 3), Frozen(12)
        self.second, self.head = nn.Conv2d(12, 10, 3), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x - self.mean) - self.offset).relu()
        return torch.as_tensor(self.head((self.second(x) * self.chosen).relu().mean((2, 3))))


class Modulated(nn.Module):
    """A normalisation without weights, scaled and shifted by another input (as in DiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH, elementwise_affine=False)
        self.adapt, self.head = nn.Linear(3, 2 * _WIDTH), nn.Linear(_WIDTH, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.adapt(condition).chunk(2, dim=1)
        y = self.norm(self.embed(x)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return torch.as_tensor(self.head(functional.gelu(y)))


class Gated(nn.Module):
    """Half of a layer's outputs gate the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(7, 24, 1), nn.Conv1d(12, 20, 3, padding=1)
        self.glu, self.head = nn.GLU(1), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.glu(self.first(x)))
        return torch.as_tensor(self.head(functional.glu(y, 1).mean(2)))


class Recurrent(nn.Module):
    """What reads sequences, step by step or all at once; of one the last state is used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv1d(5, 12, 3, padding=1), nn.Linear(12, 40)
        self.gru = nn.GRU(40, 6, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(40, 6, num_layers=2, batch_first=True)
        self.cell, self.head = nn.LSTMCell(40, 6), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.conv(x.transpose(1, 2)).relu().transpose(1, 2))
        _, last = self.gru(x)
        states, _ = self.lstm(x)
        h = c = x.new_zeros(len(x), 6)
        for step in range(2):
            h, c = self.cell(x[:, step], (h, c))
        return torch.as_tensor(self.head(torch.cat([last[0], last[1], states[:, -1], h], 1)))


class Padded(nn.Module):
    """Shortcuts without weights: every second place, and zeros for the channels that are new."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 20, 3, 2, padding=1)
        self.inner, self.head = nn.Conv2d(20, 14, 3), nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 5, 3))
        x = (self.wide(x) + shortcut).relu()
        return torch.as_tensor(self.head(self.inner(x).relu().mean((2, 3))))


def upscaled() -> nn.Module:
    """Channels become places, and places channels; some are shuffled."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.PixelUnshuffle(2),
        nn.Conv2d(64, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 24, 3, padding=1),
        nn.ChannelShuffle(3), nn.ReLU(), nn.Conv2d(24, 3, 1),
    )  # fmt: skip


class Decoder(nn.Module):
    """What a linear layer makes is laid out as maps, as many as the module says."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 10
        self.wide = nn.Sequential(nn.Linear(3, 10 * 16), nn.BatchNorm1d(10 * 16), nn.ReLU())
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(10, 6, 3, padding=1), nn.BatchNorm2d(6),
            nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        maps = self.wide(x).view(-1, self.channels, 4, 4)
        return torch.as_tensor(self.up(maps))


def unflattened() -> nn.Module:
    """The same in one sequence, and normalised over whole maps."""
    return nn.Sequential(
        nn.Linear(3, 14), nn.ReLU(), nn.Linear(14, 12 * 16), nn.Unflatten(1, (12, 4, 4)),
        nn.LayerNorm([12, 4, 4]), nn.ReLU(), nn.ConvTranspose2d(12, 8, 4, 2, 1),
        nn.LayerNorm([8, 8, 8], elementwise_affine=False), nn.GELU(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip


class LinearAttention(nn.Module):
    """Heads without a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = _HEADS
        self.enter, self.leave = nn.Linear(5, _WIDTH), nn.Linear(_WIDTH, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        made = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k, v = (one.transpose(1, 2) for one in made)
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        kept = torch.einsum("bhnd,bhne->bhde", k, v)
        level = torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        mixed = torch.einsum("bhnd,bhde,bhn->bhne", q, kept, 1 / level)
        return torch.as_tensor(self.leave(x + self.o(mixed.transpose(1, 2).flatten(2))))


class Rms(nn.Module):
    """A normalisation by another name."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class FoldedHeads(nn.Module):
    """Heads are samples, and the scale of scores follows from the width of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = _HEADS
        self.enter, self.norm, self.leave = nn.Linear(5, _WIDTH), Rms(_WIDTH), nn.Linear(_WIDTH, 3)
        self.qkv, self.out = nn.Conv1d(_WIDTH, 3 * _WIDTH, 1), nn.Conv1d(_WIDTH, _WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        n, t, c = x.shape
        made = self.qkv(self.norm(x).transpose(1, 2))
        q, k, v = made.reshape(n * self.heads, -1, t).chunk(3, 1)
        scores = torch.einsum("bct,bcs->bts", q, k) * (c // self.heads) ** -0.5
        mixed = torch.einsum("bts,bcs->bct", scores.softmax(-1), v).reshape(n, -1, t)
        return torch.as_tensor(self.leave(x + self.out(mixed).transpose(1, 2)))


class SplitAttention(nn.Module):
    """Two maps, weighed by a softmax: no attention with heads."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 6, 1)
        self.weigh, self.out = nn.Conv2d(6, 16, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.wide(x).relu().unflatten(1, (2, 8))
        level = self.weigh(self.narrow(maps.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = level.unflatten(1, (2, 8)).softmax(1)
        return torch.as_tensor(self.out((maps * weights).sum(1).mean((2, 3))))


class MaskedSteps(nn.Module):
    """Training puts vectors in the place of some steps, written over them or chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.first = nn.Parameter(torch.randn(12))
        self.second = nn.Parameter(torch.randn(1, 1, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.training:
            x[:, ::3] = self.first.to(x.dtype)
        x = self.inner(x.tanh())
        if self.training:
            masked = torch.arange(x.shape[1]) % 2 == 0
            x = torch.where(masked[:, None], self.second.expand(*x.shape[:2], -1), x)
        return torch.as_tensor(self.leave(x.relu()))


class Reversible(nn.Module):
    """Two halves of one layer's outputs, each added to by what is made of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 24, 3), nn.Linear(24, 3)
        self.f, self.g = (
            nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.enter(x).chunk(2, 1)
        a = a + self.f(b)
        b = b + self.g(a)
        return torch.as_tensor(self.leave(torch.cat([a, b], 1).mean((2, 3))))


class GatedPositions(nn.Module):
    """Half of the channels is multiplied by what mixes the positions of the other half (gMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(5, 24), nn.LayerNorm(12), nn.Linear(12, 3)
        self.mix = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.enter(x).relu().chunk(2, -1)
        v = self.mix(self.norm(v).transpose(1, 2)).transpose(1, 2)
        return torch.as_tensor(self.leave(u * v))


class MapAttention(nn.Module):
    """Attention over a map, by widths that the module keeps (BoTNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.dim_head_qk, self.dim_head_v = _HEADS, 4, 4
        self.dim_out_qk = self.dim_out_v = _WIDTH
        self.enter, self.qkv = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 3 * _WIDTH, 1)
        self.out = nn.Conv2d(_WIDTH, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        n, _, height, width = x.shape
        sizes = [self.dim_out_qk, self.dim_out_qk, self.dim_out_v]
        q, k, v = self.qkv(x).split(sizes, dim=1)
        q, k = (y.reshape(n * self.num_heads, self.dim_head_qk, -1) for y in (q, k))
        v = v.reshape(n * self.num_heads, self.dim_head_v, -1)
        mixed = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
        return torch.as_tensor(self.out(mixed.reshape(n, self.dim_out_v, height, width)))


def bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(20, 12), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 20, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
CONDITIONS = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


class UnequalParts(nn.Module):
    """MambaOut's: a gate, channels that pass, and some that a depthwise convolution mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.wide = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 48)
        self.split_indices = (24, 16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.narrow, self.leave = nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        gate, passed, mixed = torch.split(self.wide(self.norm(x)), self.split_indices, -1)
        mixed = self.conv(mixed.transpose(1, 2)).transpose(1, 2)
        made = functional.gelu(gate) * torch.cat([passed, mixed], -1)
        return torch.as_tensor(self.leave((x + self.narrow(made)).mean(1)))


class PartsOfTheStream(nn.Module):
    """InceptionNeXt's: parts of a stream, each mixed in its own way by another module."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split_indexes = [10, 3, 3]
            self.near = nn.Conv1d(3, 3, 3, padding=1, groups=3)
            self.far = nn.Conv1d(3, 3, 5, padding=2, groups=3)

        def forward(self, x: Tensor) -> Tensor:
            passed, near, far = torch.split(x, self.split_indexes, dim=1)
            return torch.cat([passed, self.near(near), self.far(far)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mixer = nn.Conv1d(6, 16, 1), PartsOfTheStream.Mixer()
        self.norm, self.wide = nn.BatchNorm1d(16), nn.Conv1d(16, 20, 1)
        self.narrow, self.leave = nn.Conv1d(20, 16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.narrow(torch.relu(self.wide(self.norm(self.mixer(x)))))
        return torch.as_tensor(self.leave(x.mean(-1)))


class Positions(nn.Module):
    """Adds positions as people write it: of buffers that no gradient shall reach, and rows of a
    table that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Embedding(50, _WIDTH), nn.Embedding(2 * _TOKENS, _WIDTH)
        self.register_buffer("waves", torch.rand(1, 2 * _TOKENS, _WIDTH))
        self.register_buffer("steps", torch.rand(2 * _TOKENS, _WIDTH))
        self.out = nn.Linear(_WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        x = self.embed(tokens) + self.waves[:, :n].requires_grad_(False) + self.table.weight[:n]
        return torch.as_tensor(self.out(torch.relu(x + self.steps[:n].detach())))


class LatePositions(nn.Module):
    """Positions of two axes, looked up before the stream of three is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table = nn.Embedding(50, _WIDTH), nn.Embedding(_TOKENS, _WIDTH)
        self.norm, self.out = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        stream, places = self.embed(tokens), self.table(torch.arange(tokens.shape[1]))
        return torch.as_tensor(self.out(self.norm(self.norm(stream) + places)))


class WaveBlock(nn.Module):
    """What goes on, and what is added up of all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.on, self.skip = nn.Linear(12, 14), nn.Linear(14, 12), nn.Linear(14, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.tanh(self.inner(x))
        return x + self.on(inner), self.skip(inner)


class UnusedStream(nn.Module):
    """What the last of several blocks hands on is not used (WaveNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(5, 12), nn.Linear(10, 5)
        self.blocks = nn.ModuleList([WaveBlock() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x, added = self.enter(x), torch.zeros(())
        for block in self.blocks:
            x, skip = block(x)
            added = added + skip
        return torch.as_tensor(self.out(torch.relu(added)))


class TwoRanks(nn.Module):
    """A layer that is called with values of three axes, and then of four."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.both, self.out = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        flat = self.both(x).flatten(0, 1).unflatten(0, x.shape[:2])
        return torch.as_tensor(self.out(flat + self.both(torch.stack((x, x.sin()), 1)).amax(1)))


class Checked(nn.Module):
    """A layer that says how many channels it takes, and checks it; the same number comes out."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        x = self.conv(x)
        assert x.shape[1] == self.out_channels
        return x


class CheckedMaps(nn.Module):
    """Of two maps that are concatenated, and of as many channels before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.joined, self.even = Checked(14, 10), Checked(10, 10)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.out(self.even(self.joined(x).relu()).relu()).mean((2, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "gpt": (lambda: Tokens(GptAttention), (IDS,)),
    "listed": (lambda: Tokens(ListedAttention), (IDS,)),
    "positions": (Positions, (IDS,)),
    "late positions": (LatePositions, (IDS,)),
    "two ranks": (TwoRanks, (VECTORS,)),
    "unused stream": (UnusedStream, (VECTORS,)),
    "configured": (lambda: Tokens(ConfiguredAttention), (IDS,)),
    "sloped": (lambda: Tokens(SlopedAttention), (IDS,)),
    "constants": (Constants, (IMAGES,)),
    "modulated": (Modulated, (VECTORS, CONDITIONS)),
    "gated": (Gated, (VECTORS,)),
    "recurrent": (Recurrent, (VECTORS,)),
    "padded": (Padded, (IMAGES,)),
    "upscaled": (upscaled, (IMAGES,)),
    "decoder": (Decoder, (CONDITIONS,)),
    "unflattened": (unflattened, (CONDITIONS,)),
    "linear attention": (LinearAttention, (VECTORS,)),
    "bag": (bag, (IDS,)),
    "checked": (CheckedMaps, (IMAGES,)),
    "map attention": (MapAttention, (IMAGES,)),
    "gated positions": (GatedPositions, (VECTORS,)),
    "reversible": (Reversible, (IMAGES,)),
    "masked steps": (MaskedSteps, (VECTORS,)),
    "folded heads": (FoldedHeads, (VECTORS,)),
    "unequal parts": (
        UnequalParts,
        (torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0)),),
    ),
    "parts of the stream": (
        PartsOfTheStream,
        (torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0)),),
    ),
}
"""By name: how it is made, and inputs."""
