"""Lightning modules to train under Elesh: one that holds its network, and one that is it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
import torch
from test_framework_checkpoints import build
from torch import Tensor, nn
from torch.nn import functional


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.model = build()

    def training_step(self, batch: Any, _: int) -> Tensor:
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class ItselfTheNetwork(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False  # as modules with several optimizers must
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(functional.relu(self.first(x)))
        return out

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.first.parameters(), 1e-2),
            torch.optim.AdamW(self.last.parameters(), 1e-2),
        ]

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss
