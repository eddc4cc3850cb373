"""How well a network does by the trainer's own figures, when they fail a check, and what the
trainer's side reports of a change. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from leyline import (
    GateResult,
    InvalidField,
    Outcome,
    PrunedArchitecture,
    PruningOutcome,
    RecompilationRequest,
    StructuralValidationResult,
    stable_hash,
)

__all__ = [
    "Evaluation",
    "Expected",
    "checked",
    "event_id_of",
    "expected",
    "failed_check",
    "recompilation",
    "validation_of",
]

_LEVELS = 5
"""Figures before a cut whose mean is what it is compared with."""
_UNKNOWN = 2
"""As much as so many known moves counts what is presumed of a training that is not known yet."""
_ERRORS = 3.0
"""Standard errors beyond which a fall is no chance."""


@dataclass(frozen=True)
class Evaluation:
    """How well the network does on the trainer's validation data."""

    accuracy: float
    """Share of right answers, 0 to 1."""
    loss: float
    """Mean loss a sample; 0 where none is measured. NaN and infinity are failed checks."""

    def __post_init__(self) -> None:
        for name in ("accuracy", "loss"):  # tensors and NumPy scalars, too
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def finite(self) -> bool:
        """Whether both figures are numbers that can be compared."""
        return math.isfinite(self.accuracy) and math.isfinite(self.loss)


def checked(found: object) -> Evaluation:
    """What an evaluation returned, if it is one.

    Raises:
        InvalidField: if it is not, or its accuracy is in percent.
    """
    if not isinstance(found, Evaluation):
        raise InvalidField("evaluate", "Evaluation(accuracy, loss)", f"a {type(found).__name__}")
    if math.isfinite(found.accuracy) and found.accuracy > 1:
        hint = "divide percents by 100: limits are shares"
        raise InvalidField("evaluate.accuracy", "a share, at most 1", found.accuracy, hint=hint)
    return found


def failed_check(before: float, now: Evaluation, limit: float) -> str:
    """Why ``now`` is not good enough after an accuracy of ``before``; empty if it is."""
    if not math.isfinite(now.loss):
        return f"loss is {now.loss:g}"
    if not math.isfinite(now.accuracy) or not before - now.accuracy <= limit:
        return f"accuracy {before:.4f} fell to {now.accuracy:.4f}, more than {limit:g},"
    return ""


@dataclass(frozen=True)
class Expected:
    """The accuracy to expect after a cut that costs no more later than it cost at once."""

    accuracy: float
    scatter: float
    """Standard deviation of accuracy from epoch to epoch, by training alone."""
    figures: int
    """That it was found from, the last one before the cut among them."""

    def fell(self, reports: Sequence[float]) -> bool:
        """Whether the mean of these reports is further below than training scatters."""
        error = self.scatter * math.sqrt(1 / self.figures + 1 / len(reports))
        return self.accuracy - sum(reports) / len(reports) > _ERRORS * error


def expected(before: float, after: float, moves: Sequence[float], limit: float) -> Expected:
    """What to expect after a cut that took accuracy from ``before`` to ``after``, on the same
    samples.

    The last figure alone may be a lucky one, so that the mean of the last five counts where it is
    lower; never below two deviations of the last one, since accuracy that rises leaves its mean
    behind. What a cut gained need not last: new batch statistics follow training again.

    Args:
        moves: of accuracy from one epoch to the next before the cut, without what cuts did to it.
            Only falls say how training scatters: rises are learning, too. Of a training of which
            nothing is known, a third of the limit is presumed.
        limit: the drop of accuracy that is too much.
    """
    falls = sum(min(move, 0.0) ** 2 for move in moves) + _UNKNOWN * (limit / 3) ** 2
    scatter = math.sqrt(falls / (len(moves) + _UNKNOWN))
    last = moves[:-_LEVELS:-1]
    levels = [before - sum(last[:count]) for count in range(len(last) + 1)]
    level = min(before, max(sum(levels) / len(levels), before - 2 * scatter))
    return Expected(level - max(before - after, 0.0), scatter, len(levels))


def event_id_of(outcome: PruningOutcome) -> str:
    """The identity of an outcome as an event: the same however often it is published."""
    stage = "" if outcome.watched is None else outcome.watched
    return "oc-" + stable_hash(outcome.idempotency_key, outcome.run_id, outcome.result, stage)


def recompilation(
    outcome: PruningOutcome, before: PrunedArchitecture, after: PrunedArchitecture
) -> RecompilationRequest:
    """For Tezzeret: the changed architecture."""
    return RecompilationRequest(
        run_id=outcome.run_id,
        epoch=outcome.epoch if outcome.rolled_back_epoch is None else outcome.rolled_back_epoch,
        idempotency_key=outcome.idempotency_key,
        model_hash_before=before.model_hash,
        model_hash_after=after.model_hash,
        reason="rollback" if outcome.result == "rolled_back" else "cut",
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        macs_before=before.macs,
        macs_after=after.macs,
    )


def validation_of(outcome: PruningOutcome, limit: float) -> StructuralValidationResult | None:
    """For Urabrask: the trainer's own measurements, None where there are none; a drop
    of accuracy beyond ``limit`` is too much."""
    before = outcome.accuracy_before
    measured = {"trainer_mask": outcome.accuracy_masked, "trainer_cut": outcome.accuracy_after}
    known = {name: accuracy for name, accuracy in measured.items() if accuracy is not None}
    if before is None or not known:
        return None
    last = list(known.values())[-1]
    sound = math.isfinite(last) and before > 0
    return StructuralValidationResult(
        idempotency_key=outcome.idempotency_key,
        outcome=Outcome.GO if outcome.result == "applied" else Outcome.NO_GO,
        gates=tuple(
            GateResult(
                name=name,
                passed=before - accuracy <= limit,
                measured=before - accuracy if math.isfinite(before - accuracy) else None,
                limit=limit,
                detail="drop of accuracy on the trainer's own validation data",
            )
            for name, accuracy in known.items()
        ),
        accuracy_retention=min(1.0, max(0.0, last / before)) if sound else None,
    )
