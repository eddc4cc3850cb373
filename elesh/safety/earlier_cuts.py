"""The effect of earlier cuts of a run on the next: the circuit breaker of a level, cuts that were
rolled back, errors of earlier predictions. Pure.

Promises: the breaker's state and the cuts that a decision was compared with are written into the
decision completely, so that a replay decides by the very same ones. A cut that a trainer took back
is not proposed again before its evidence has changed: a decision that contains it, for the same
evidence, fails the gate ``rolled_back``, which names the cut.

In the preparation phase nothing is cut, but where a checkpoint carries its network, cuts that might
be proposed later are predicted and measured. Where nothing can be measured later, their ratio says
how much too low a prediction may be (decision 0062).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

from elesh.settings import VerificationSettings
from leyline import (
    AttentionHeadTarget,
    ChannelPruningTarget,
    GateResult,
    IdempotencyKey,
    LayerPruningTarget,
    Level,
    LevelPart,
    LossFactor,
    PruningOutcome,
    PruningStatistics,
    RolledBackCut,
    StructuralPruningDecision,
    WouldBeCut,
    stable_hash,
)
from leyline.messages.parameters import Scorer

from .gates import rejection
from .measured_gates import MEASURED_GATES

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
    """The record of a cut (or mask) that the trainer took back."""
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


State = Literal["closed", "open", "half_open"]
Vote = Literal["failure", "success", "none"]

ARCHITECTURE_GATES = frozenset({"structure", "gradient_isolation"})
"""Gates whose failure says that the network would not hold together: all is rejected then."""
INTEGRITY_GATES = ARCHITECTURE_GATES | frozenset(
    {
        "statistics",
        "minimum_channels",
        "minimum_heads",
        "cumulative_limit",
    }
)
"""Gates whose failure says that something is broken, not that a careful answer is no."""
REFUSED = "measured"
"""Stands for a cut of which no part was measured as safe: its ranking is no good."""


@dataclass(frozen=True)
class BreakerStatus:
    """A circuit breaker as the caller saw it."""

    state: State = "closed"
    failures: int = 0
    reason: str = ""

    @classmethod
    def of(cls, decision: StructuralPruningDecision) -> dict[Level, BreakerStatus]:
        """The breakers under which ``decision`` was made, by level; closed ones where it has no
        such gate."""
        found = {level: cls() for level in levels_of(decision)}
        for level, gate in _by_level(decision):
            if gate.name.endswith("breaker"):
                state, _, reason = gate.detail.partition(": ")
                found[level] = cls(cast(State, state), int(gate.measured or 0), reason)
        return found


def breaker_gate(status: BreakerStatus) -> GateResult:
    """Passed unless the breaker is open; a half-open one lets its trial through."""
    return GateResult(
        name="breaker",
        passed=status.state != "open",
        measured=status.failures,
        detail=f"{status.state}: {status.reason}" if status.reason else status.state,
    )


def levels_of(decision: StructuralPruningDecision) -> tuple[Level, ...]:
    """The levels that ``decision`` decides on."""
    parts = tuple(part.level for part in decision.levels)
    return parts or (decision.key.level,)


def votes(decision: StructuralPruningDecision) -> dict[Level, Vote]:
    """What a decision counts as for the breaker of each of its levels.

    Broken statistics, a cut that does not hold together, and one of which no part was measured as
    safe are a failure; a careful no (quota, phase, noise, predicted shift, requirements) is a
    success. What the trainer will report on or has rolled back before, an open breaker's own no,
    and a level that was never analysed say nothing.
    """
    failed = {level: set[str]() for level in levels_of(decision)}
    for level, gate in _by_level(decision):
        if not gate.passed:
            failed[level].add(gate.name.rpartition(".")[2])
    if any(not gate.passed and gate.name in MEASURED_GATES for gate in decision.safety.gates):
        for level in decision.taken or levels_of(decision):
            failed[level].add(REFUSED)
    silent = {part.level for part in decision.levels if part.verdict == "missing"}
    if decision.approved_for_application:
        silent |= set(decision.taken)
    if any(not gate.passed and gate.name == ROLLED_BACK for gate in decision.safety.gates):
        silent |= set(levels_of(decision))  # the rollbacks before it must not be forgotten
    found: dict[Level, Vote] = {}
    for level, names in failed.items():
        if names & INTEGRITY_GATES or REFUSED in names:
            found[level] = "failure"
        else:
            found[level] = "none" if level in silent or "breaker" in names else "success"
    return found


def grounds(decision: StructuralPruningDecision, level: Level) -> str:
    """Why a decision speaks against a level; empty if nothing does.

    An open breaker's own no is no ground: its reason would be wrapped into the next one.
    """
    gates = [gate for of, gate in _by_level(decision) if of is level]
    gates += [g for g in decision.safety.gates if g.name in MEASURED_GATES and g not in gates]
    return rejection(gate for gate in gates if not gate.name.endswith("breaker"))


def vote_of(outcome: PruningOutcome) -> Vote:
    """What a trainer's outcome counts as for the breakers of the levels that it cut.

    A rollback is a failure, unless the cut only went along with an earlier one; a cut that was made
    is a success once nothing is left of its watch.
    """
    if outcome.result == "rolled_back":
        return "none" if outcome.undone_with else "failure"
    return "success" if outcome.result == "applied" and not outcome.watched else "none"


def _by_level(decision: StructuralPruningDecision) -> Iterator[tuple[Level, GateResult]]:
    """The gates of single levels, without those of the joint set."""
    for gate in decision.safety.gates:
        level, dot, _ = gate.name.partition(".")
        if not decision.levels:
            yield decision.key.level, gate
        elif dot and level in list(Level) and level != Level.JOINT:
            yield Level(level), gate


VERSION = 1
_LEAST_NATS = 1e-3
"""Predictions below this are left out: the ratio to one is noise."""
_DECILE = -1
"""The last of nine cut points, the ninth decile: nine of ten ratios lie below it."""
_AT_MOST = 2.0
"""A run's factor is at most so many times the default."""


def calibrated(cuts: Iterable[WouldBeCut], settings: VerificationSettings) -> LossFactor | None:
    """The run's own factor; None while too few of its cuts tell anything, or the settings ask for
    none. Between 1 and twice the default."""
    least = settings.calibration_measurements
    ratios = [c.measured / c.predicted for c in cuts if c.predicted >= _LEAST_NATS]
    if not least or len(ratios) < max(2, least):
        return None
    high = statistics.quantiles(ratios, n=10, method="inclusive")[_DECILE]
    factor = min(max(high, 1.0), _AT_MOST * settings.predicted_loss_factor)
    return LossFactor(version=VERSION, factor=round(factor, 3), measurements=len(ratios))
