"""Small networks that have learned scikit-learn's digits, trained once for all test processes."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path

import torch
from shared import once
from torch import Tensor, nn
from torch.nn import functional

from elesh.demo.network import Digits, TransformerBlock

__all__ = ["SmallNet", "SmallVit", "accuracy", "batches", "digits", "trained"]


class SmallNet(nn.Module):
    """Convolutions with a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.first = nn.Conv2d(24, 24, 3, 1, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 24, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(24)
        self.wide = nn.Conv2d(24, 48, 3, 2, 1, bias=False)
        self.wide_norm = nn.BatchNorm2d(48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(x + self.second_norm(self.second(y)))
        x = torch.relu(self.wide_norm(self.wide(x)))
        return torch.as_tensor(self.head(x.mean((2, 3))))


class SmallVit(nn.Module):
    """Two transformer blocks of eight heads each over 2x2 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 32, 2, 2)
        self.place = nn.Parameter(torch.zeros(16, 32))
        self.blocks = nn.Sequential(TransformerBlock(32, 8, 64), TransformerBlock(32, 8, 64))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 8, 8] to [B, 10]."""
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        return torch.as_tensor(self.head(self.norm(self.blocks(x)).mean(1)))


@lru_cache(1)
def digits() -> Digits:
    return Digits.load(seed=3)


@lru_cache
def _trained(kind: type[nn.Module], epochs: int) -> nn.Module:
    def make(folder: Path) -> None:
        torch.save(_train(kind, epochs).state_dict(), folder / "state.pt")

    model, folder = kind(), once(f"{kind.__name__}-{epochs}", make)
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return model.eval()


def _train(kind: type[nn.Module], epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model, data = kind(), digits().train
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    steps = epochs * -(-len(data) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(data)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


def trained(kind: type[nn.Module] = SmallNet, epochs: int = 10) -> nn.Module:
    """A trained network of one's own."""
    with torch.random.fork_rng():
        return copy.deepcopy(_trained(kind, epochs))


def batches(size: int = 64, samples: int = 512) -> list[tuple[Tensor, Tensor]]:
    """Training samples."""
    data = digits().train
    return list(
        zip(data.images[:samples].split(size), data.labels[:samples].split(size), strict=True)
    )


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On samples that nobody has seen."""
    data = digits().held_out
    return float((model.eval()(data.images).argmax(1) == data.labels).float().mean())
