"""Cuts that a trainer took back are not proposed again before their evidence has changed.

Promises: pure. A decision that contains such a cut, for the same evidence, fails the gate
``rolled_back``, which names the cut. The cuts that a decision was compared with are written into
it, so that a replay decides by the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from leyline import (
    AttentionHeadTarget,
    ChannelPruningTarget,
    GateResult,
    IdempotencyKey,
    LayerPruningTarget,
    Level,
    LevelPart,
    PruningOutcome,
    PruningStatistics,
    RolledBackCut,
    StructuralPruningDecision,
    stable_hash,
)
from leyline.messages.parameters import Scorer

__all__ = [
    "ROLLED_BACK",
    "fingerprint_of",
    "proposed_again",
    "Proposed",
    "rolled_back_cut",
    "rolled_back_gate",
    "units_of",
]

ROLLED_BACK = "rolled_back"
"""The name of the gate."""
_TOLERANCE = 0.1
"""Scores that moved by less than this share of the largest are the same evidence: between two
checkpoints of a trained network they hardly move more, and a cut that failed is likely to again."""

Target = ChannelPruningTarget | AttentionHeadTarget | LayerPruningTarget
Unit = tuple[str, int]
"""A group and a unit of it in original numbering; a layer is the one unit -1 of its name."""


class Proposed(Protocol):
    """A decision, finished or still being made."""

    @property
    def key(self) -> IdempotencyKey:
        """Of the decision."""

    @property
    def channels(self) -> tuple[ChannelPruningTarget, ...]:
        """Targets."""

    @property
    def attention_heads(self) -> tuple[AttentionHeadTarget, ...]:
        """Targets."""

    @property
    def layers(self) -> tuple[LayerPruningTarget, ...]:
        """Targets."""

    @property
    def statistics(self) -> PruningStatistics:
        """Of the whole cut."""

    @property
    def levels(self) -> tuple[LevelPart, ...]:
        """What each level gave to a joint decision."""


class _Score(NamedTuple):
    """What spoke for a unit, and the level whose scorer said so."""

    value: float
    level: Level


def rolled_back_cut(decision: StructuralPruningDecision, outcome: PruningOutcome) -> RolledBackCut:
    """What is remembered of a decision whose cut (or mask) the trainer took back."""
    scores = _scores(decision)
    groups: dict[str, list[int]] = {}
    for name, unit in scores:
        groups.setdefault(name, []).append(unit)
    layer = (-1,)
    return RolledBackCut(
        idempotency_key=decision.idempotency_key,
        epoch=outcome.epoch if outcome.rolled_back_epoch is None else outcome.rolled_back_epoch,
        units=tuple(
            (name, () if tuple(units) == layer else tuple(units)) for name, units in groups.items()
        ),
        scores=tuple(score.value for score in scores.values()),
        scorers=tuple(_scorers(decision).items()),
        shift=decision.statistics.predicted_shift,
        shift_error=decision.statistics.predicted_shift_error,
        detail=outcome.detail,
    )


def fingerprint_of(cut: RolledBackCut) -> str:
    """The identity of a set of units, independent of who proposed it."""
    return stable_hash(*(f"{name}/{units}" for name, units in sorted(cut.units)))


def units_of(cut: RolledBackCut) -> list[Unit]:
    """The units of a cut, group by group."""
    return [(name, unit) for name, units in cut.units for unit in (units or (-1,))]


def proposed_again(decision: Proposed, cuts: Sequence[RolledBackCut]) -> tuple[RolledBackCut, ...]:
    """The cuts of which all units are proposed again, while neither the predicted shift (of just
    the same set: beyond two standard errors) nor any of the units' scores (by more than a tenth of
    the largest) has changed. Scores of another scorer are no evidence of a change."""
    proposed = _scores(decision)
    return tuple(cut for cut in cuts if _is_proposed(cut, proposed, decision))


def rolled_back_gate(
    proposed: Proposed, cuts: Sequence[RolledBackCut], left_out: Sequence[RolledBackCut] = ()
) -> GateResult:
    """The gate ``rolled_back``: it fails where any of the cuts is proposed again.

    Args:
        cuts: of the run, at least one.
        left_out: those whose units were taken out of what was proposed first.
    """
    again = proposed_again(proposed, cuts)
    none = f"{len(cuts)} cuts that were rolled back, none of them proposed again"
    out = "; ".join(f"{_described(cut)}: its units are spared" for cut in left_out)
    detail = "; ".join(map(_described, again)) or out or none
    return GateResult(
        name=ROLLED_BACK, passed=not again, measured=len(again), limit=0, detail=detail[:8192]
    )


def _described(cut: RolledBackCut) -> str:
    reason = cut.detail or "no reason"
    return (
        f"{cut.idempotency_key} was rolled back at epoch {cut.epoch} ({reason}) "
        "and its evidence has not changed"
    )


def _scorers(decision: Proposed) -> dict[Level, Scorer]:
    """What ranked the units of each level."""
    if not decision.levels:
        return {decision.key.level: decision.statistics.scorer}
    return {part.level: part.statistics.scorer for part in decision.levels if part.statistics}


def _scores(decision: Proposed) -> dict[Unit, _Score]:
    """The units that a decision removes, each with the score that spoke for it."""
    targets: tuple[Target, ...] = (
        *decision.channels,
        *decision.attention_heads,
        *decision.layers,
    )
    found = {unit: score for target in targets for unit, score in _scores_of(target).items()}
    return dict(sorted(found.items()))


def _scores_of(target: Target) -> Mapping[Unit, _Score]:
    name = target.layer_name
    if isinstance(target, LayerPruningTarget):
        return {(name, -1): _Score(target.importance, Level.LAYER)}
    if isinstance(target, ChannelPruningTarget):
        level, scores = Level.CHANNEL, list(target.importance)
    else:
        level, every = Level.HEAD, target.head_importance
        scores = [every[head] if head < len(every) else 0.0 for head in target.head_indices]
    originals = target.original_indices or target.indices
    values = zip(originals, scores, strict=True)
    return {(name, unit): _Score(score, level) for unit, score in values}


def _is_proposed(cut: RolledBackCut, proposed: Mapping[Unit, _Score], decision: Proposed) -> bool:
    """Whether all units of a cut are proposed again for the same evidence."""
    units = units_of(cut)
    if not all(unit in proposed for unit in units):
        return False
    if len(units) == len(proposed) and _shift_changed(cut, decision):
        return False
    then, now = dict(cut.scorers), _scorers(decision)
    largest = _largest(cut, units, proposed)
    for unit, score in zip(units, cut.scores, strict=False):
        value, level = proposed[unit]
        alike = then.get(level, now.get(level)) == now.get(level)
        if alike and abs(value - score) > _TOLERANCE * largest[level]:
            return False
    return True


def _largest(
    cut: RolledBackCut, units: Sequence[Unit], proposed: Mapping[Unit, _Score]
) -> dict[Level, float]:
    """By level the largest of a cut's scores: every level has a scale of its own."""
    largest: dict[Level, float] = {}
    for unit, score in zip(units, cut.scores, strict=False):
        level = proposed[unit].level
        largest[level] = max(largest.get(level, 0.0), abs(score))
    return largest


def _shift_changed(cut: RolledBackCut, decision: Proposed) -> bool:
    now, error = decision.statistics.predicted_shift, decision.statistics.predicted_shift_error
    if now is None or cut.shift is None:
        return False
    return abs(now - cut.shift) > 2 * math.hypot(error or 0.0, cut.shift_error or 0.0)
