"""How many units may be removed when: the progressive safety schedule, adaptive thresholds, which
groups can lose units, and messages about what was asked for or allowed and not removed.

Promises: nothing in the preparation and validation phases; in between, the share of the original
channels that is gone never exceeds the phase's limit, and rises smoothly towards it. Shares count
against all channels of all channel groups of the original network, prunable or not: "5% of the
channels" means of the network, and pruning it does not shrink the yardstick. A threshold never
falls below 1e-8 but for one reason, that fewer units may go than lie below it. How the metrics are
weighted by stage is in :mod:`elesh.analysis.importance.scores`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from elesh.analysis.candidates import floor_of
from elesh.safety import mixed_owners
from elesh.settings import SafetySchedule
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    InvalidField,
    Level,
    Phase,
    PrunedArchitecture,
    PruningGroup,
)
from leyline.arrays import require_finite

from .choose import Selection

Shape = Literal["polynomial", "linear", "exponential"]

_LENGTHS = ("validation_epochs", "conservative_epochs", "moderate_epochs", "aggressive_epochs")
_TRAINED_ON = 0.9
"""Share of a short run in which its phases end."""
_DECAY = 5.0
"""The exponential schedule covers its way with this many time constants."""


class PhaseEnd(NamedTuple):
    """The end of a phase: its last epoch, and the share that may be gone then."""

    phase: Phase
    epoch: int
    limit: float


def phase_ends(schedule: SafetySchedule) -> tuple[PhaseEnd, ...]:
    """The end of each phase that ends; epochs count from 1."""
    phases = (
        (Phase.PREPARATION, schedule.validation_epochs, 0.0),
        (Phase.CONSERVATIVE, schedule.conservative_epochs, schedule.conservative_limit),
        (Phase.MODERATE, schedule.moderate_epochs, schedule.moderate_limit),
        (Phase.AGGRESSIVE, schedule.aggressive_epochs, schedule.aggressive_limit),
    )
    lasts = itertools.accumulate(length for _, length, _ in phases)
    return tuple(
        PhaseEnd(phase, last, limit) for (phase, _, limit), last in zip(phases, lasts, strict=True)
    )


def phase_at(epoch: int, schedule: SafetySchedule) -> Phase:
    """The phase that ``epoch`` (counted from 1; 0 is before training) lies in."""
    return next((end.phase for end in phase_ends(schedule) if epoch <= end.epoch), Phase.VALIDATION)


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
    limit = share = schedule.aggressive_limit
    before, start = 0.0, 0
    for end in phase_ends(schedule):
        if end.phase is phase:
            limit = end.limit
            progress = (epoch - start) / (end.epoch - start) if end.epoch > start else 1.0
            share = before + (limit - before) * curve(shape, progress)
        before, start = end.limit, end.epoch
    share *= 1 - margin
    if target is not None:
        share = min(share, target)
    active = phase not in (Phase.PREPARATION, Phase.VALIDATION)
    # A product like 0.29 * 100 lies below its true value: a millionth of a channel evens that out.
    quota = max(0, math.floor(share * original + 1e-6) - removed) if active else 0
    return Allowance(phase, limit, share, original, removed, quota)


def as_asked(schedule: SafetySchedule, asked: AnalysisParameters) -> SafetySchedule:
    """The schedule with the lengths of phases (``phases``) and the limit of the last one
    (``removed_at_most``, the others in proportion) that the trainer asks for, where it does."""
    update: dict[str, float] = {}
    if asked.phases is not None:
        update |= zip(_LENGTHS, asked.phases, strict=True)
    if asked.removed_at_most is not None:
        last = schedule.aggressive_limit
        scale = asked.removed_at_most / last if last > 0 else 0.0
        update |= {
            "conservative_limit": schedule.conservative_limit * scale,
            "moderate_limit": schedule.moderate_limit * scale,
            "aggressive_limit": asked.removed_at_most,
        }
    return schedule.model_copy(update=update)


def phases_within(schedule: SafetySchedule, epochs: int) -> tuple[int, int, int, int] | None:
    """Lengths of the phases, in proportion, for a run that ends before the schedule does; the last
    tenth of the run is left to train on.

    Returns:
        None where the run is long enough, or lengths were set on purpose.
    """
    total = schedule.total_epochs
    if epochs >= total or schedule.model_fields_set.intersection(_LENGTHS):
        return None
    ends = [round(end.epoch * epochs * _TRAINED_ON / total) for end in phase_ends(schedule)]
    first, second, third, fourth = np.diff(ends, prepend=0).tolist()
    return first, second, third, fourth


class Stage(StrEnum):
    """How far training is."""

    EARLY = "early"
    MID = "mid"
    LATE = "late"


class SafetyLevel(StrEnum):
    """How much may be risked."""

    CONSERVATIVE = "conservative"
    MODERATE = "moderate"
    AGGRESSIVE = "aggressive"


def _by_level(conservative: float, moderate: float, aggressive: float) -> dict[SafetyLevel, float]:
    return dict(zip(SafetyLevel, (conservative, moderate, aggressive), strict=True))


BASE: Mapping[Stage, Mapping[SafetyLevel, float]] = {
    Stage.EARLY: _by_level(0.001, 0.01, 0.05),
    Stage.MID: _by_level(0.005, 0.02, 0.1),
    Stage.LATE: _by_level(0.01, 0.05, 0.2),
}
"""Base thresholds (FACTS, "Importance")."""
FLOOR = 1e-8
"""What lies below is dead whatever the rest says (the document's marking threshold)."""


def stage_at(phase: Phase) -> Stage:
    """The training stage of a phase, as in :func:`elesh.analysis.importance.scores.weights_at`."""
    if phase is Phase.PREPARATION:
        return Stage.EARLY
    return Stage.LATE if phase in (Phase.AGGRESSIVE, Phase.VALIDATION) else Stage.MID


def adaptive_threshold(
    scores: npt.ArrayLike,
    sparsity: float,
    stage: Stage,
    level: SafetyLevel,
    *,
    capacity: int | None = None,
) -> float:
    """The score strictly below which units may be marked.

    ``.3 base + .4 quantile(sparsity) + .3 (mean - 2 std)``, at least 1e-8 (FACTS, "Importance");
    the quantile interpolates linearly, the standard deviation is the population's. The parts are
    on the scores' scale but for the base, so scores should be shares of a largest (0 to 1).

    Args:
        scores: [C], finite, higher is more important; C >= 1.
        sparsity: the share of units that is aimed at, 0 to 1.
        capacity: how many units may go at most (a group's minimum, for example): where more scores
            lie below, the threshold falls to the score of the first unit that must stay, even
            under 1e-8. None: no limit.

    Raises:
        InvalidField: if there are no scores, or sparsity or capacity are out of range.
        NotFinite: naming the first score that is not finite.
    """
    row = np.asarray(scores, dtype=np.float64)
    if row.ndim != 1 or not row.size:
        raise InvalidField("scores", "a vector of at least one score", f"shape {row.shape}")
    require_finite("scores", row)
    if not 0 <= sparsity <= 1:
        raise InvalidField("sparsity", "a share from 0 to 1", sparsity)
    if capacity is not None and capacity < 0:
        raise InvalidField("capacity", "a number >= 0", capacity)
    statistical = float(row.mean() - 2 * row.std())
    blended = 0.3 * BASE[stage][level] + 0.4 * float(np.quantile(row, sparsity)) + 0.3 * statistical
    threshold = max(blended, FLOOR)
    if capacity is None or capacity >= row.size:
        return threshold
    return min(threshold, float(np.partition(row, capacity)[capacity]))


@dataclass(frozen=True)
class Eligible:
    """The groups that can lose units, and why each other group cannot."""

    groups: tuple[PruningGroup, ...]
    ignored: tuple[tuple[str, str], ...]


def eligible_groups(
    bundle: CheckpointBundle,
    scorer: str,
    minimum: int,
    round_to: int = 1,
    *,
    level: Level = Level.CHANNEL,
    shard: Collection[str] | None = None,
) -> Eligible:
    """Which groups of a level can lose units; with a ``shard``, of these groups only.

    Raises:
        InvalidField: if the request ignores a group or layer that does not exist.
    """
    unwanted = unwanted_names(bundle)
    groups, ignored = [], []
    for group in bundle.architecture.groups:
        if group.level is not level or (shard is not None and group.name not in shard):
            continue
        reason = _why_not(bundle, group, scorer, unwanted)
        floor = floor_of(group, minimum, round_to)
        if not reason and group.size <= floor:
            reason = f"has {group.size} {level}s, must keep {floor}"
        if reason:
            ignored.append((group.name, reason))
        else:
            groups.append(group)
    return Eligible(tuple(groups), tuple(ignored))


def unwanted_names(bundle: CheckpointBundle) -> frozenset[str]:
    """The groups, layers and blocks that the request ignores.

    Raises:
        InvalidField: if one of them does not exist.
    """
    architecture, unwanted = bundle.architecture, frozenset(bundle.parameters.ignored_layers)
    if not unwanted:
        return unwanted
    known = {name for g in architecture.groups for name in (g.name, *g.layers)}
    known |= {layer.name for layer in architecture.layers} | set(architecture.block)
    if unknown := sorted(unwanted - known):
        raise InvalidField("parameters.ignored_layers", "names of groups or layers", unknown)
    return unwanted


_UNMEASURED = "no gate statistics: perhaps no sample reached one of its consumers"


def _why_not(
    bundle: CheckpointBundle, group: PruningGroup, scorer: str, unwanted: frozenset[str]
) -> str:
    if not group.prunable:
        return group.reason or "not prunable"
    if named := unwanted.intersection((group.name, *group.layers)):
        return f"ignored by the request: {', '.join(sorted(named))}"
    if mixed_owners(bundle.architecture, group):
        return "couples host and seed tensors (gradient isolation)"
    if scorer in ("output_projection", "reconstruction", "fisher"):
        return "" if group.name in bundle.gates else _UNMEASURED
    vectors = bundle.heads if group.level is Level.HEAD else bundle.channels
    return "" if group.name in vectors else f"no {group.level} statistics"


def short_of_target(bundle: CheckpointBundle, level: Level, allowed: Allowance) -> str:
    """How far the schedule stays below the share that the request asks for."""
    asked = bundle.parameters.target_ratio
    if asked is None or asked <= allowed.share + 1e-9:
        return ""
    return (
        f"asked for {asked:.2%} of the original {level}s, "
        f"the schedule allows {allowed.share:.2%} at this epoch"
    )


def short_of_quota(quota: int, selection: Selection, level: Level) -> str:
    """How much of the quota is not used, and why."""
    short = quota - len(selection.units)
    if short <= 0:
        return ""
    noise, back = len(selection.noise), min(len(selection.kept_for_multiple), short)
    counts = {
        "inside the noise": noise,
        "kept so that groups end at their multiples": back,
        "kept so that no group falls below what it must keep": max(0, short - noise - back),
    }
    reasons = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
    return f"{short} of the {quota} {level}s that may go stay: {reasons}"


def near_the_cut(
    bundle: CheckpointBundle,
    level: Level,
    ignored: Iterable[tuple[str, str]],
    max_cost: float,
) -> Iterator[tuple[str, str]]:
    """The ignored groups; where they were measured, how many of their units would have gone.

    Args:
        max_cost: what the most expensive unit that goes costs, in squared output units.
    """
    for name, reason in ignored:
        gate = bundle.gates.get(name)
        if gate is None:
            yield name, reason
            continue
        squares = np.einsum("ij,ij->j", gate.projections, gate.projections, dtype=np.float64)
        near = int(np.count_nonzero(squares / len(gate.projections) <= max_cost))
        words = f"; {near} of its {level}s would cost no more than the most expensive that goes"
        yield name, reason + (words if near else "")


def sentence(*parts: str) -> str:
    """The parts that say anything, as one sentence."""
    return "; ".join(part for part in parts if part)
