"""When how much may go: the progressive safety schedule.

Promises: nothing in the preparation and validation phases; in between, the share of the original
channels that is gone never exceeds the phase's limit, and rises smoothly towards it. Shares count
against all channels of all channel groups of the original network, prunable or not: "5% of the
channels" means of the network, and pruning it does not shrink the yardstick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from elesh.settings import SafetySchedule
from leyline import Level, Phase, PrunedArchitecture, PruningGroup

__all__ = ["Allowance", "allowance", "curve", "phase_at", "raised"]

Shape = Literal["polynomial", "linear", "exponential"]

_DECAY = 5.0
"""The exponential schedule covers its way with this many time constants."""


def phase_at(epoch: int, schedule: SafetySchedule) -> Phase:
    """The phase that ``epoch`` (counted from 1; 0 is before training) lies in."""
    for phase, last in schedule.boundaries:
        if epoch <= last:
            return phase
    return Phase.VALIDATION


def curve(shape: Shape, progress: float) -> float:
    """How far towards its limit a phase is at ``progress`` (0 to 1): 0 at 0, 1 at 1, rising.

    ``polynomial``: 1 - (1 - t)^3 (FACTS, "Selection"); ``exponential``: 1 - exp(-5 t), normalised.
    """
    if shape == "linear":
        return progress
    if shape == "polynomial":
        return 1 - (1 - progress) ** 3
    return math.expm1(-_DECAY * progress) / math.expm1(-_DECAY)


@dataclass(frozen=True)
class Allowance:
    """What the schedule allows at one epoch."""

    phase: Phase
    limit: float
    """Share of the original channels that the phase may reach at its end."""
    share: float
    """Share that may be gone after this epoch's decision (margin and request applied)."""
    original: int
    removed: int
    quota: int
    """Channels that may go now; 0 outside the pruning phases."""


def counted_groups(
    architecture: PrunedArchitecture, level: Level = Level.CHANNEL
) -> list[PruningGroup]:
    """The groups of a level that shares and quotas count: those that can lose units at all.

    Counting the others too would let a network of few prunable layers lose more of them than the
    phase allows.
    """
    return [g for g in architecture.groups if g.level is level and g.prunable]


def allowance(
    architecture: PrunedArchitecture,
    epoch: int,
    schedule: SafetySchedule,
    *,
    shape: Shape = "polynomial",
    margin: float = 0.1,
    target: float | None = None,
    level: Level = Level.CHANNEL,
) -> Allowance:
    """The allowance at ``epoch``; a ``target`` share that was asked for can only lower it."""
    phase = phase_at(epoch, schedule)
    groups = counted_groups(architecture, level)
    original = sum(group.original_size for group in groups)
    removed = sum(group.removed for group in groups)
    limit, share = _shares(phase, epoch, schedule, shape, margin)
    if target is not None:
        share = min(share, target)
    active = phase not in (Phase.PREPARATION, Phase.VALIDATION)
    # A product like 0.29 * 100 lies below its true value: a millionth of a channel evens that out.
    quota = max(0, math.floor(share * original + 1e-6) - removed) if active else 0
    return Allowance(phase, limit, share, original, removed, quota)


def raised(schedule: SafetySchedule, removed_at_most: float | None) -> SafetySchedule:
    """The schedule with another limit of its last phase, the others in proportion.

    Args:
        removed_at_most: share of the original units; None: the schedule as it is.
    """
    if removed_at_most is None:
        return schedule
    last = schedule.aggressive_limit
    scale = removed_at_most / last if last > 0 else 0.0
    return schedule.model_copy(
        update={
            "conservative_limit": schedule.conservative_limit * scale,
            "moderate_limit": schedule.moderate_limit * scale,
            "aggressive_limit": removed_at_most,
        }
    )


def _shares(
    phase: Phase, epoch: int, schedule: SafetySchedule, shape: Shape, margin: float
) -> tuple[float, float]:
    """The limit of the phase and the share that its curve has reached at ``epoch``."""
    limits = {
        Phase.PREPARATION: 0.0,
        Phase.CONSERVATIVE: schedule.conservative_limit,
        Phase.MODERATE: schedule.moderate_limit,
        Phase.AGGRESSIVE: schedule.aggressive_limit,
        Phase.VALIDATION: schedule.aggressive_limit,
    }
    before, start = 0.0, 0
    for each, last in schedule.boundaries:
        if each is phase:
            progress = (epoch - start) / (last - start) if last > start else 1.0
            share = before + (limits[phase] - before) * curve(shape, progress)
            return limits[phase], share * (1 - margin)
        before, start = limits[each], last
    return limits[phase], limits[phase] * (1 - margin)
