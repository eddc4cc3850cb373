"""Networks with layers that can be removed, and with some that look like it."""

from __future__ import annotations

import random
from functools import cache

import torch
from shared import kept
from torch import Tensor, nn
from trainer_nets import NETS, build, example

from elesh.trainer import Recorder
from leyline import PrunedArchitecture


class Residual(nn.Module):
    """``x + body(x)`` for any body."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def conv(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


class Nested(nn.Module):
    """Residual blocks in Sequentials, one around two others."""

    def __init__(self) -> None:
        super().__init__()
        inner = [Residual(conv(6), nn.ReLU(), conv(6)) for _ in range(2)]
        self.net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)),
            nn.Sequential(Residual(conv(6)), nn.Sequential(Residual(*inner, conv(6)))),
        )
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x).mean((2, 3)))


class InPlaceBlock(nn.Module):
    """Adds the way torchvision's ResNet does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


class InPlace(nn.Module):
    """One such block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 6, 3, padding=1), InPlaceBlock(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


class Twice(nn.Module):
    """One branch used twice, and one scaled by a bare parameter, with a dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.scaled = nn.Conv2d(3, 6, 3, padding=1), conv(6), conv(6)
        self.gamma, self.drop = nn.Parameter(torch.ones(6, 1, 1)), nn.Identity()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.again(x)
        x = torch.relu(x + self.again(x))
        x = x + self.drop(self.gamma * self.scaled(x))
        return self.fc(x.mean((2, 3)))


class Parallel(nn.Module):
    """Attention and feed-forward side by side; torch's attention returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.fc(x.mean(1))


class Sum(nn.Module):
    """Two branches that are added up first (GPT-J), and one whose axes are moved, both through the
    same dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.drop = nn.Conv2d(3, 16, 4, 4), nn.Dropout(0.0)
        self.norm, self.norm2, self.norm3 = (nn.LayerNorm(16) for _ in range(3))
        self.attention = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.tokens = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.drop(self.attention(self.norm(x))) + self.mlp(self.norm2(x)) + x
        x = x + self.drop(self.tokens(self.norm3(x).transpose(1, 2)).transpose(1, 2))
        return self.fc(x.mean(1))


class Encoder(nn.Module):
    """PyTorch's own transformer layers, which have a fast path past their parts."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class PreNormEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__(norm_first=True)


OTHERS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        Nested,
        InPlace,
        Twice,
        Parallel,
        Sum,
        Encoder,
        PreNormEncoder,
    )
}
REMOVABLE = {
    "ResNet": ["blocks.0", "blocks.2"],
    "Mobile": ["project"],
    "Vit": ["blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp"],
    "Nested": ["net.1.0", "net.1.1.0.body.0", "net.1.1.0.body.1"],
    "InPlace": ["block"],
    "Parallel": ["attention", "mlp"],
    "Encoder": [f"encoder.layers.{part}" for part in ("0.self_attn", "0", "1.self_attn", "1")],
    "PreNormEncoder": [
        f"encoder.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn", "linear2")
    ],
    "Twice": ["scaled"],
    "Sum": ["attention", "mlp", "tokens"],
} | {name: [] for name in ("Vgg", "Dense", "Shared", "Unet", "Gated")}
WITH_LAYERS = [name for name, blocks in REMOVABLE.items() if blocks]


def made(name: str, seed: int = 0) -> nn.Module:
    if name in NETS:
        return build(name, seed)
    torch.manual_seed(seed)
    return OTHERS[name]().eval()


@cache
def architecture_of(name: str) -> PrunedArchitecture:
    """What a recorder finds in the network, found once."""
    return kept(f"with-layers-{name}", lambda: Recorder(made(name), example()).architecture)


def removable(architecture: PrunedArchitecture) -> list[str]:
    return [block.name for block in architecture.blocks if block.prunable and not block.removed]


class PreActivation(nn.Module):
    """Normalises and activates before each convolution; narrows in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width // 2, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width // 2), nn.Conv2d(width // 2, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


class Inverted(nn.Module):
    """Widens, a depthwise convolution, dropout, and a projection back; the addition comes first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU6())
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=2 * width)
        self.project = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.depthwise(self.expand(x))) + x


class GatedInline(nn.Module):
    """A gated unit whose halves are split in the block's own code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, 1)
        return torch.relu(x + self.down(a * torch.sigmoid(b)))


def random_net(seed: int) -> nn.Module:
    """Residual blocks of all kinds, some around others, with plain layers in between."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width = 8

    def piece(depth: int) -> nn.Module:
        kinds = [
            lambda: PreActivation(width),
            lambda: Inverted(width),
            lambda: InPlaceBlock(width),
            lambda: GatedInline(width),
            lambda: Residual(conv(width), nn.ReLU()),
            lambda: nn.Sequential(conv(width), nn.ReLU()),
        ]
        if depth:
            kinds.append(lambda: Residual(*[piece(depth - 1) for _ in range(2)], conv(width)))
        return rng.choice(kinds)()

    body = [piece(2) for _ in range(rng.randrange(3, 6))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), *body, *head).eval()
