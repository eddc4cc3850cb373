"""A run's checkpoints and decisions as TensorBoard summaries.

Scalars by epoch: accuracy and loss at the checkpoint and under the mask, share of parameters and
MACs removed, what was predicted. Histograms: the importance of each group's units. Needs the extra
``tensorboard``::

    with Session("my-run", observers=[TensorBoardSummaries("runs/my-run")]) as session: ...
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from leyline import CheckpointBundle, PrunedArchitecture, PruningOutcome, StructuralPruningDecision


class TensorBoardSummaries:
    """Writes an event file into ``folder``.

    Raises:
        ModuleNotFoundError: without tensorboardX; it says how to get it.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            hint = "TensorBoard summaries need tensorboardX: pip install 'elesh[tensorboard]'"
            raise ModuleNotFoundError(hint, name=error.name) from None
        self._writer = SummaryWriter(str(folder))

    def on_checkpoint(self, bundle: CheckpointBundle) -> None:
        """Accuracy, loss, size, and the importance of every group's units."""
        metadata, epoch = bundle.metadata, bundle.metadata.epoch
        self._scalar("checkpoint/accuracy", metadata.accuracy, epoch)
        self._scalar("checkpoint/loss", metadata.loss, epoch)
        for name, share in _removed(bundle.architecture).items():
            self._scalar(f"removed/{name}", share, epoch)
        for name, data in bundle.channels.items():
            self._histogram(f"taylor_importance/{name}", data.taylor_importance, epoch)
            self._histogram(f"magnitude_importance/{name}", data.magnitude_importance, epoch)
            self._histogram(f"activation_frequency/{name}", data.activation_frequency, epoch)
        self._writer.flush()

    def on_outcome(self, decision: StructuralPruningDecision, outcome: PruningOutcome) -> None:
        """What was predicted, what was measured, what became of it."""
        epoch, statistics = decision.epoch, decision.statistics
        self._scalar("decision/approved", float(decision.approved_for_application), epoch)
        self._scalar("decision/applied", float(outcome.result == "applied"), epoch)
        self._scalar("decision/predicted_loss_rise", statistics.predicted_loss_rise, epoch)
        self._scalar("decision/predicted_shift", statistics.predicted_shift, epoch)
        self._scalar("decision/accuracy_before", outcome.accuracy_before, epoch)
        self._scalar("decision/accuracy_masked", outcome.accuracy_masked, epoch)
        if outcome.loss_before is not None and outcome.loss_masked is not None:
            rise = outcome.loss_masked - outcome.loss_before
            self._scalar("decision/measured_loss_rise", rise, epoch)
        for target in decision.channels:
            self._histogram(f"removed_importance/{target.layer_name}", target.importance, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _scalar(self, name: str, value: float | None, epoch: int) -> None:
        if value is not None and np.isfinite(value):
            self._writer.add_scalar(name, value, epoch)

    def _histogram(self, name: str, values: object, epoch: int) -> None:
        array = np.asarray(values, dtype=np.float64)
        if array.size and np.isfinite(array).all():
            self._writer.add_histogram(name, array, epoch)


def _removed(architecture: PrunedArchitecture) -> dict[str, float]:
    """Shares of the original network that are gone."""
    sizes = {
        "parameters": (architecture.parameters, architecture.original_parameters),
        "macs": (architecture.macs, architecture.original_macs),
    }
    return {name: 1 - now / was for name, (now, was) in sizes.items() if was}
