"""A cut of any levels with its exact consequences, and the figures that are predicted for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elesh import safety
from leyline import (
    ChannelPruningTarget,
    CheckpointBundle,
    GateResult,
    LayerPruningTarget,
    PrunedArchitecture,
    PruningStatistics,
)

from .loss_increase import loss_rise
from .plans import Target

__all__ = ["Cut", "RelativeOutputError"]


@dataclass(frozen=True)
class RelativeOutputError:
    """Predicted mean square of the outputs' movement, as a share of their own mean square."""

    value: float | None = None
    """None where there are no output projections."""
    standard_error: float | None = None
    random: float | None = None
    """What a random cut of the same size would do."""


@dataclass(frozen=True)
class Cut:
    """What goes, and what is left."""

    units: Mapping[str, Sequence[int]]
    layers: tuple[str, ...]
    structure: GateResult
    before: PrunedArchitecture
    after: PrunedArchitecture | None
    """None where the cut does not hold together (the structure gate says why)."""
    loss_rise: float | None
    """What the units are predicted to do together, in nats a sample, and each layer on its own.
    None where a unit has no gate statistics, or nothing goes."""

    @classmethod
    def of(cls, bundle: CheckpointBundle, targets: Iterable[Target], scorer: str = "") -> Cut:
        """The cut that removes ``targets``.

        Args:
            scorer: what ranked them; where that was for reconstruction, and the checkpoint asks
                for it, the loss increase is of the network after it.
        """
        targets = tuple(targets)
        units = {t.layer_name: t.indices for t in targets if not isinstance(t, LayerPruningTarget)}
        layers = tuple(t.layer_name for t in targets if isinstance(t, LayerPruningTarget))
        structure, after = safety.structure(bundle.architecture, units, layers)
        rise = loss_rise(bundle, units, layers)
        mean = rise.mean if rise else None
        if mean is not None and scorer == "reconstruction":
            mean *= _left_by_reconstruction(bundle, targets, units)
        return cls(units, layers, structure, bundle.architecture, after, mean)

    @property
    def count(self) -> int:
        """Units and layers that go."""
        return sum(map(len, self.units.values())) + len(self.layers)

    @property
    def parameters_removed(self) -> float:
        """Share of the present parameters."""
        parameters = self.before.parameters
        return 1 - self.after.parameters / parameters if self.after and parameters else 0.0

    def statistics(
        self, counts: Mapping[str, object], error: RelativeOutputError
    ) -> PruningStatistics:
        """Sizes and predictions of this cut, with ``counts`` for the other fields."""
        before, after = self.before, self.after or self.before
        figures = {
            "parameters_before": before.parameters,
            "parameters_after": after.parameters,
            "macs_before": before.macs,
            "macs_after": after.macs,
            "predicted_shift": error.value,
            "predicted_shift_error": error.standard_error,
            "predicted_loss_rise": self.loss_rise,
        }
        return PruningStatistics.model_validate({**counts, **figures})


def _left_by_reconstruction(
    bundle: CheckpointBundle, targets: Iterable[Target], units: Mapping[str, Sequence[int]]
) -> float:
    """What of the loss increase is left: the ratio of the outputs' movements with and without.

    Without, it is the mean square of the summed projections; with, the sum of the costs.
    """
    if bundle.parameters.reconstruction is None or not units:
        return 1.0
    costs = [
        cost
        for target in targets
        if not isinstance(target, LayerPruningTarget)
        for cost in (
            target.importance if isinstance(target, ChannelPruningTarget) else target.costs
        )
    ]
    rows = [
        bundle.gates[name].projections[:, list(lost)].sum(axis=1, dtype=np.float64)
        for name, lost in sorted(units.items())
    ]
    moved = float(np.mean(np.square(np.sum(rows, axis=0))))
    return min(1.0, math.sqrt(max(sum(costs), 0.0) / moved)) if moved > 0 else 1.0
