"""A callback for the Hugging Face Trainer: ``callbacks=[EleshCallback(EveryEpoch(session, ...))]``.

Needs ``transformers`` with ``accelerate``. Promises: nothing is done inside a step; a trainer of
several processes is refused by name before it trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .epochs import Batches, EveryEpoch

__all__ = ["EleshCallback", "labelled"]


class EleshCallback(TrainerCallback):
    """Watches, applies and publishes after every training epoch.

    Args:
        epochs: the session and its data; :func:`labelled` makes batches of a data loader.
    """

    def __init__(self, epochs: EveryEpoch) -> None:
        self.epochs = epochs

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Model and optimizer are there now; accelerate wraps the optimizer."""
        optimizer = kwargs["optimizer"]
        self.epochs.begin(
            kwargs["model"],
            getattr(optimizer, "optimizer", optimizer),
            processes=args.world_size,
            scheduler=kwargs.get("lr_scheduler"),
        )

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """An epoch was trained."""
        self.epochs.end_epoch(round(state.epoch or 0))


def labelled(
    loader: Iterable[Mapping[str, Tensor]], samples: int, labels: str = "labels"
) -> Batches:
    """Batches of (keyword inputs, labels) from a loader of dictionaries, of so many samples."""
    batches: list[tuple[dict[str, Tensor], Tensor]] = []
    taken = 0
    for batch in loader:
        if taken >= samples:
            break
        inputs = {name: value for name, value in batch.items() if name != labels}
        batches.append((inputs, batch[labels]))
        taken += len(batch[labels])
    return batches
