"""Small networks that were really trained, mostly on data that are not the demo's, as checkpoints
that carry their network: perceptrons on figures of tumours and wines, convolutions on drawn
stripes, and others on the demo's digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path

import numpy as np
import torch
from shared import once
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.nn import functional

from elesh.settings import Settings
from elesh.trainer import Recorder
from elesh.trainer.export import Exporter
from leyline import AnalysisParameters, CheckpointBundle

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained network, its checkpoint, and samples that nobody else has seen."""

    model: nn.Module
    bundle: CheckpointBundle
    unseen: Data
    held_out: Data

    @property
    def accuracy(self) -> float:
        """On the unseen samples."""
        with torch.no_grad():
            return float((self.model(self.unseen[0]).argmax(1) == self.unseen[1]).float().mean())

    def at(self, epoch: int) -> CheckpointBundle:
        """The checkpoint as if it were of another epoch."""
        metadata = self.bundle.metadata.model_copy(update={"epoch": epoch})
        return replace(self.bundle, metadata=metadata)


def _shared(make: Callable[[int], Trained]) -> Callable[..., Trained]:
    """Trained, measured and exported by the first test process that asks, and read by the others.

    Every process reads it, also the one that made it: all have the same bits.
    """

    @cache
    @wraps(make)
    def read(seed: int = 0) -> Trained:
        def write(folder: Path) -> None:
            torch.save(make(seed), folder / "trained.pt")

        folder = once(f"{make.__name__}-{seed}", write)
        trained: Trained = torch.load(folder / "trained.pt", weights_only=False)
        return trained

    return read


@_shared
def perceptron(seed: int) -> Trained:
    """Two hidden layers on 30 figures of 569 tumours."""
    return _of_figures(load_breast_cancer, seed, epochs=30, shares=(0.35, 0.45, 0.2))


@_shared
def wine(seed: int) -> Trained:
    """The same on 13 figures of 178 wines of three growers."""
    return _of_figures(load_wine, seed, epochs=40, shares=(0.35, 0.4, 0.25))


def _of_figures(
    read: Callable[..., tuple[np.ndarray, np.ndarray]],
    seed: int,
    *,
    epochs: int,
    shares: tuple[float, float, float],
) -> Trained:
    figures, labels = read(return_X_y=True)
    x, y = torch.tensor(figures, dtype=torch.float32), torch.tensor(labels)
    x = (x - x.mean(0)) / x.std(0)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(x.shape[1], 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(),
        nn.Linear(32, int(y.max()) + 1),
    )  # fmt: skip
    return _trained(model, x, y, epochs=epochs, shares=shares)


@_shared
def convolutions(seed: int) -> Trained:
    """Three convolutions with normalisation that tell the direction of noisy stripes."""
    torch.manual_seed(seed)
    y = torch.randint(0, 4, (1600,))
    angle, phase = y * torch.pi / 4, torch.rand(1600) * 6.28
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    along = rows * angle.cos().view(-1, 1, 1) + columns * angle.sin().view(-1, 1, 1)
    x = (along * 1.5 + phase.view(-1, 1, 1)).sin() + 0.8 * torch.randn(1600, 12, 12)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 24), (24, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4))
    return _trained(model, x.unsqueeze(1), y, epochs=4, shares=(0.5, 0.3, 0.2))


@_shared
def digits(seed: int) -> Trained:
    """Plain convolutions on drawn digits: much of it can go, but not just any of it."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    model = nn.Sequential(
        *layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 10)
    )
    return _trained(model, x.view(-1, 1, 8, 8), y, epochs=12, shares=(0.5, 0.2, 0.3))


def _trained(
    model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, shares: tuple[float, float, float]
) -> Trained:
    order, cuts = torch.randperm(len(x)), [int(share * len(x)) for share in shares[:2]]
    train, held, rest = order.tensor_split([cuts[0], sum(cuts)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(32):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    recorder = Recorder(model, x[:4])
    bundle = recorder.measure([(x[train], y[train])], epoch=119, run_id="proved", reconstruct=False)
    bundle = replace(bundle, parameters=AnalysisParameters())
    held_out = (x[held], y[held])
    network = Exporter(model).export(recorder.architecture, held_out, x[train])
    return Trained(model, replace(bundle, network=network), (x[rest], y[rest]), held_out)


def settings(**verification: object) -> Settings:
    """A schedule with small minimums; the document's figures otherwise."""
    return Settings.model_validate(
        {
            "structured_pruning": {"channel_analysis": {"min_channels_per_layer": 4}},
            "verification": verification,
        }
    )


def inverted(trained: Trained, epoch: int) -> CheckpointBundle:
    """Statistics of a scorer that takes the most important for the least: the ordinary seam, so
    that nothing but measuring can notice."""
    channels = {
        name: data.model_copy(
            update={
                field: (getattr(data, field).max() - getattr(data, field)).astype(np.float32)
                for field in ("taylor_importance", "magnitude_importance", "activation_frequency")
            }
            | {"channel_correlations": None}
        )
        for name, data in trained.bundle.channels.items()
    }
    return replace(trained.at(epoch), channels=channels, gates={})
