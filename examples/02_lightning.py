"""The same under Lightning: a callback does what the marked lines of 01_plain_loop.py do.

``pip install pytorch-lightning`` (or ``lightning``), then ``python examples/02_lightning.py``.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from elesh.demo import Digits, local_fleet
from elesh.trainer import Session
from elesh.trainer.adapters.epochs import EveryEpoch
from elesh.trainer.adapters.lightning import EleshCallback

EPOCHS = 12
SCHEDULE = {
    "validation_epochs": 2,
    "conservative_epochs": 3,
    "moderate_epochs": 3,
    "aggressive_epochs": 4,
}


class Classifier(pl.LightningModule):
    """A network in the attribute that the callback looks at: ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> Any:
        """The optimizer's state is cut along with the parameters."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class WaitForAnswer(pl.Callback):
    """Only because this run is so short: let every checkpoint be answered."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the epochs that publish."""
        if trainer.current_epoch % 2:
            self.session.wait(10)


def main() -> None:
    """Train under the callback."""
    pl.seed_everything(0)
    data, module = Digits.load(seed=0), Classifier()
    train = DataLoader(TensorDataset(data.train.images, data.train.labels), 64, shuffle=True)
    with (
        local_fleet({"structured_pruning": {"safety_schedule": SCHEDULE}}) as (url, settings),
        Session("lightning", url, settings) as session,
    ):
        validation = [(data.validation.images, data.validation.labels)]
        held_out = (data.proof.images, data.proof.labels)  # what workers measure cuts on
        epochs = EveryEpoch(session, data.calibration(), validation, held_out=held_out, every=2)
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            devices=1,
            callbacks=[EleshCallback(epochs), WaitForAnswer(session)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, train)
        assert epochs.surgeon is not None
        architecture, accuracy = epochs.surgeon.architecture, epochs.evaluate().accuracy
    before, after = architecture.original_parameters, architecture.parameters
    print(f"parameters {before} -> {after}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
