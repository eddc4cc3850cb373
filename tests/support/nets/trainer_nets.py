"""Small networks of the kinds that users have, for the trainer's tests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from shared import kept
from torch import Tensor, nn

from elesh.trainer import Recorder
from leyline import CheckpointBundle, GateSite, PrunedArchitecture


class Vgg(nn.Module):
    """Plain: convolution, normalisation, activation, pooling; flatten; linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 20), nn.PReLU(20), nn.Dropout(0.2), nn.Linear(20, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Block(nn.Module):
    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)  # As is usual: the branch starts at zero.
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or into != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(into, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual, with downsampling shortcuts."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1),
            Block(2 * width, 4 * width, 2),
        )  # fmt: skip
        self.fc = nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.grow = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 4, 3, padding=1))
            for n in (6, 10, 14)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 9, 1))
        self.fc = nn.Linear(9 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.grow:
            x = torch.cat([x, layer(x)], 1)
        x = nn.functional.adaptive_avg_pool2d(self.transition(x), 2)
        return self.fc(x.flatten(1))


class Mobile(nn.Module):
    """Inverted residuals with depthwise convolutions and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1)
        )
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.depthwise(self.expand(x))
        x = x + self.project(h * torch.sigmoid(self.squeeze(h)))
        return self.fc(torch.relu(self.head(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class VitBlock(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, 4)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16) * 0.02)
        self.pos = nn.Parameter(torch.randn(1, 17, 16) * 0.02)
        self.blocks = nn.Sequential(VitBlock(16, 24), VitBlock(16, 24))
        self.norm = nn.LayerNorm(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.fc(self.norm(self.blocks(x))[:, 0])


class Shared(nn.Module):
    """One convolution used twice, in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.again(x))
        x = torch.relu(self.again(x))
        return self.fc(torch.relu(self.narrow(x)).mean((2, 3)))


class Unet(nn.Module):
    """Transposed convolution and a skip by concatenation; classifies in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(12, 10, 2, 2)
        self.merge = nn.Sequential(
            nn.Conv2d(18, 9, 3, padding=1), nn.InstanceNorm2d(9, affine=True)
        )
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = torch.cat([torch.relu(self.up(self.down(x))), x], 1)
        return self.fc(torch.relu(self.merge(x)).amax((2, 3)))


class Gated(nn.Module):
    """Gated linear units: the two halves of a layer's outputs are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(3, 16, 3, padding=1)
        self.mid = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, 1)
        a, b = self.mid(a * torch.sigmoid(b)).chunk(2, dim=1)
        return self.fc((a * torch.tanh(b)).mean((2, 3)))


NETS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (Vgg, ResNet, Dense, Mobile, Vit, Shared, Unet, Gated)
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The network with seeded weights and running statistics that are not trivial."""
    torch.manual_seed(seed)
    model = NETS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model(torch.randn(16, 3, 16, 16))
    return model.eval()


@cache
def architecture_of(name: str) -> PrunedArchitecture:
    """What a recorder finds in the network, found once: it does not depend on weights."""
    return kept(f"architecture-{name}", lambda: Recorder(build(name), example()).architecture)


def units(architecture: PrunedArchitecture, seed: int = 0) -> dict[str, list[int]]:
    """Some units of every group that may be pruned."""
    rng = random.Random(seed)
    found = dict[str, list[int]]()
    for g in architecture.groups:
        if g.prunable:
            count = max(1, rng.randrange(1, g.size) // g.unit_multiple) * g.unit_multiple
            found[g.name] = sorted(rng.sample(range(g.size), count))
    return found


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to 1e-4 of the largest output."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * a.abs().max())


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, tensors in dictionaries, lists and tuples included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return bool(a == b)


def example() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def batches(count: int = 2, size: int = 6, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 16, 16, generator=g), torch.randint(0, 5, (size,), generator=g))
        for _ in range(count)
    ]


def measured(model: nn.Module, count: int = 2, **options: Any) -> CheckpointBundle:
    """What a recorder measures of the first ``count`` batches."""
    return Recorder(model, example(), **options).measure(batches(count), epoch=3)


def activations(model: nn.Module, sites: tuple[GateSite, ...], x: Tensor) -> Iterator[Any]:
    """The outputs; then, twice, the inputs of the sites' modules."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        found.append(args[0].clone())  # Modules that share an input get one each.
        return (found[-1],)

    handles = [model.get_submodule(s.module).register_forward_pre_hook(hook) for s in sites]
    yield model(x)
    for handle in handles:
        handle.remove()
    yield found
    yield found
