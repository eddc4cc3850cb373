"""Trained networks to measure on, one for each (net, seed), trained once and cached.

Promises: the same net, seed and epochs give the same network; calibration is on training data
only, and what is called test was never trained on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.nets import NETS
from elesh.demo.network import Digits
from elesh.trainer import Recorder, Surgeon
from leyline import Level, PrunedArchitecture, PruningGroup

__all__ = ["Batches", "Subject", "per_sample_loss"]

Batches = list[tuple[Tensor, Tensor]]
_BATCH = 256
HEADS = "-heads"
"""A net's name with this at its end: the same network, its attention heads the units."""
_PEAK_RATE = {"vit": 3e-3, "vit-deep": 3e-3}
"""Of the learning rate, where not 5e-3."""
_PATIENCE = {"vit": 4, "vit-deep": 8}
"""How many times the epochs a net is trained for."""


@dataclass(frozen=True)
class Subject:
    """A trained network with its architecture and data."""

    net: str
    seed: int
    model: nn.Module
    architecture: PrunedArchitecture
    calibration: Batches
    """Training samples."""
    test: Batches
    level: Level = Level.CHANNEL
    """Of the units."""

    @classmethod
    def trained(
        cls, net: str, seed: int, epochs: int, cache: Path, samples: int | None = None
    ) -> Subject:
        """The network of this seed; ``samples``: how many to calibrate on, all if not given."""
        data = Digits.load(seed)
        torch.manual_seed(seed)
        kind = net.removesuffix(HEADS)
        model = NETS[kind]()
        file = cache / f"{kind}-{seed}-{epochs}.pt"
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
        else:
            rate, patience = _PEAK_RATE.get(kind, 5e-3), _PATIENCE.get(kind, 1)
            _train(model, data.train.images, data.train.labels, epochs * patience, rate)
            cache.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), file)
        model.eval()
        test_x = torch.cat([data.validation.images, data.held_out.images])
        test_y = torch.cat([data.validation.labels, data.held_out.labels])
        count = samples or len(data.train)
        return cls(
            net,
            seed,
            model,
            Recorder(model, data.train.images[:2]).architecture,
            _batches(data.train.images[:count], data.train.labels[:count]),
            _batches(test_x, test_y),
            Level.HEAD if net.endswith(HEADS) else Level.CHANNEL,
        )

    @property
    def groups(self) -> list[PruningGroup]:
        """The groups that can lose units of this subject's level."""
        groups = self.architecture.groups
        return [group for group in groups if group.prunable and group.level is self.level]

    @property
    def units(self) -> int:
        """Units that can be removed."""
        return sum(group.size for group in self.groups)

    def copy(self) -> Subject:
        """The same with a network of its own, to be cut."""
        return replace(self, model=copy.deepcopy(self.model))

    def tools(self, samples_seed: int = 0) -> tuple[Recorder, Surgeon]:
        """A recorder and a surgeon for the network as it is (nothing is traced again)."""
        recorder = Recorder(
            self.model, self.test[0][0], architecture=self.architecture, seed=samples_seed
        )
        return recorder, Surgeon(self.model, self.architecture, restore_points=0)

    def accuracy(self) -> float:
        """On the test samples."""
        with torch.no_grad():
            hits = [(self.model(x).argmax(1) == y).float() for x, y in self.test]
        return float(torch.cat(hits).mean())


def per_sample_loss(model: nn.Module, batches: Batches) -> Tensor:
    """[N] cross-entropy, float64."""
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in batches]
    return torch.cat(losses).double()


def _batches(images: Tensor, labels: Tensor) -> Batches:
    return list(zip(images.split(_BATCH), labels.split(_BATCH), strict=True))


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Adam, one cycle, images shifted by up to one pixel."""
    batch = 64
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))[: len(images) // batch * batch]
        for chosen in order.split(batch):
            shift = tuple(torch.randint(-1, 2, (2,)).tolist())
            x = torch.roll(images[chosen], shift, (2, 3))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
