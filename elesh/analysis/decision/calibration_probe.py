"""Cuts that are only measured: in the preparation phase, to know how good predictions are later."""

from __future__ import annotations

from dataclasses import dataclass

from elesh.analysis.levels.select_channels import select_channels
from elesh.analysis.pruning_set.loss_increase import loss_rise
from elesh.analysis.selection.schedule import counted_groups
from elesh.analysis.spans import stage
from elesh.safety import Probing
from elesh.settings import Settings
from leyline import CheckpointBundle, Fallback, InvalidField, Level, WouldBeCut

__all__ = ["CalibrationProbe", "calibration_probe"]

_TIMES = (0.5, 1.0, 1.5, 2.0)
"""Of the share that the aggressive phase may remove."""


@dataclass(frozen=True)
class CalibrationProbe:
    """What was measured; or why nothing was."""

    cuts: tuple[WouldBeCut, ...] = ()
    skipped: Fallback | None = None


@stage("calibrate")
def calibration_probe(
    bundle: CheckpointBundle, settings: Settings, network: Probing
) -> CalibrationProbe:
    """The first channels to go, up to twice as many as may be removed in all, predicted and
    measured. (Small cuts of a network that still trains cost too little to compare.)

    Nothing where the statistics give no predicted loss increase.
    """
    limit = settings.structured_pruning.safety_schedule.aggressive_limit
    total = sum(group.size for group in counted_groups(bundle.architecture, Level.CHANNEL))
    found: list[WouldBeCut] = []
    for count in sorted({round(min(1.0, limit * each) * total) for each in _TIMES} - {0}):
        units = _first(bundle, settings, count)
        predicted = loss_rise(bundle, units)
        if predicted is None:
            break
        entries = [(Level.CHANNEL, name, unit) for name, own in units.items() for unit in own]
        measured = network.loss_rise(entries)
        if isinstance(measured, Fallback):
            return CalibrationProbe(skipped=measured)
        found.append(WouldBeCut(units=len(entries), predicted=predicted.mean, measured=measured))
    return CalibrationProbe(tuple(found))


def _first(bundle: CheckpointBundle, settings: Settings, count: int) -> dict[str, tuple[int, ...]]:
    """The channels that would go first; none where the request asks for what is not there."""
    channels = settings.structured_pruning.channel_analysis
    try:
        return select_channels(bundle, count, settings=channels)
    except InvalidField:  # The analysis of the level says so.
        return {}
