"""A callback for Lightning: ``callbacks=[EleshCallback(EveryEpoch(session, ...))]``.

Needs ``lightning`` or ``pytorch-lightning``. Promises: nothing is done inside a step; a trainer of
several processes is refused by name before it trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Callback: Any = object
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

from .epochs import EveryEpoch

__all__ = ["EleshCallback"]


class EleshCallback(Callback):  # type: ignore[misc]
    """Watches, applies and publishes after every training epoch.

    Args:
        epochs: the session and its data.
        network: the attribute of the LightningModule that holds the network to prune.
    """

    def __init__(self, epochs: EveryEpoch, network: str = "model") -> None:
        super().__init__()
        self.epochs, self._network = epochs, network

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Optimizers are there now; of several, the first is cut along."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.epochs.begin(
            getattr(pl_module, self._network),
            trainer.optimizers[0],
            processes=trainer.world_size,
            scheduler=schedulers[0] if schedulers else None,
        )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch was trained (Lightning counts from 0)."""
        self.epochs.end_epoch(trainer.current_epoch + 1)
