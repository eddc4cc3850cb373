"""The trainer's own figures of a network, when they fail a check, and what the trainer reports of a
change. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from elesh.settings import RollbackTriggers
from leyline import (
    GateResult,
    InvalidField,
    Outcome,
    PrunedArchitecture,
    PruningOutcome,
    RecompilationRequest,
    StructuralPruningDecision,
    StructuralValidationResult,
    stable_hash,
)

from .witnesses import Answers, Moved, moved

Result = Literal["applied", "rolled_back", "refused", "rejected"]
_LEVELS = 5
"""Figures before a cut whose mean is what it is compared with."""
_UNKNOWN = 2
"""As much as so many known moves counts what is presumed of a training that is not known yet."""
_LOSS_DOUBT, _ANSWERS_DOUBT = 0.004, 0.001
"""Of accuracy, by which what the loss says may be off, as a cut makes answers less sure, too; and
by which what answers say may be."""
COST_POWER = 1.5
"""Of a share of a cut, cheapest units first: its cost as a share of the whole's."""
_AIM = 0.9
"""Of the limit: how near to it a part of a cut is expected to come that is tried next."""
_BOUND = 2.0
"""Standard errors above the likely drop at which its upper bound lies."""
_OF_ACCURACY = 1.0
"""Standard errors of accuracy that are taken off before it says by itself that too much is lost."""
_APART = 3.0
"""Standard errors of accuracy by which answers may tell another drop than it shows."""
_ERRORS = 3.5
"""Standard errors beyond which a fall is no chance."""
_FEW = 1.5
"""The factor for a scatter that is estimated from few figures, as by Student's t."""


@dataclass(frozen=True)
class Evaluation:
    """How well the network does on the trainer's validation data."""

    accuracy: float
    """Share of right answers, 0 to 1."""
    loss: float
    """Mean loss a sample; 0 where none is measured. NaN and infinity are failed checks."""
    answers: Answers | None = field(default=None, compare=False, repr=False)
    """The network's outputs meanwhile, where they were seen."""

    def __post_init__(self) -> None:
        for name in ("accuracy", "loss"):  # tensors and NumPy scalars, too
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def finite(self) -> bool:
        """Whether both figures are numbers that can be compared."""
        return math.isfinite(self.accuracy) and math.isfinite(self.loss)


@dataclass(frozen=True)
class Judged:
    """What a cut was judged by."""

    samples: int = 0
    """That the last call of ``evaluate`` showed the network; 0 where it was not called."""
    figures: Mapping[str, Evaluation] = field(default_factory=dict)
    """By ``before``, ``masked`` and ``after`` (the cut), with the network's answers."""


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


def failed_loss(before: Evaluation, now: Evaluation, limit: float) -> str:
    """Why the loss says that ``now`` is not good enough, whatever accuracy says; empty if it is.

    An accuracy that is constant, saturated or made up sees no harm. The caller's loss may have any
    unit, so that it has to more than double as well.

    Args:
        limit: nats a sample.
    """
    if before.loss < 0 or not now.loss > max(2 * before.loss, before.loss + limit):
        return ""
    rose = f"loss {before.loss:.4g} rose to {now.loss:.4g}"
    return f"{rose}, more than twice and by more than {limit:g},"


@dataclass(frozen=True)
class LikelyDrop:
    """How much accuracy a cut costs on other samples of the same kind, as far as it is known."""

    combined: float
    """By accuracy, loss and answers, each weighted by its precision."""
    by_loss: float = 0.0
    """By the loss alone; 0 where none is measured."""
    bound: float | None = None
    """Two standard errors above it, or what accuracy alone shows to be lost if that is more; None
    where answers do not count: without them few samples could never show that little is lost."""
    unseen: str = ""
    """Why answers do not count; empty where they do."""


def likely_drop(before: Evaluation, now: Evaluation, samples: int) -> LikelyDrop:
    """The drop of accuracy from ``before`` to ``now``, estimated from accuracy, loss and answers.

    Of few samples the accuracy moves by whole ones, and by chance; their loss is finer. Where it
    rises by a share, so do errors on the whole; and a right answer that becomes a wrong one has a
    loss of at least ln 2. Finer still is how far each output moved (:func:`.witnesses.moved`). The
    estimates are weighted by the inverse of their variances: that of accuracy is the variance of as
    many changed answers, those of the others are set to the square of half the estimate and .4 and
    .1 points; the error of so few samples' answers is known.

    Args:
        samples: that both were measured on; 0 where nobody knows, as where no loss is measured:
            accuracy alone is then asked.
    """
    drop, increase = before.accuracy - now.accuracy, max(now.loss - before.loss, 0.0)
    seen, unseen = _by_answers(before, now, samples)
    if not samples or not (before.loss > 0 or seen):
        return LikelyDrop(drop, unseen=unseen)
    by_loss, witnesses = 0.0, list[tuple[float, float]]()
    if before.loss > 0:
        errors = max(1 - before.accuracy, 0.5 / samples)
        by_loss = min(errors * increase / before.loss, increase / math.log(2))
        witnesses.append((by_loss, (by_loss / 2 + _LOSS_DOUBT) ** 2))
    if seen is not None:
        doubt = (seen.drop / 2 + _ANSWERS_DOUBT) ** 2 + seen.error**2
        witnesses.append((seen.drop, doubt))
    changed = 2 * max(abs(drop), by_loss) if seen is None else seen.share
    witnesses.append((drop, _chance(changed, samples) ** 2))
    precision = sum(1 / variance for _, variance in witnesses)
    combined = sum(value / variance for value, variance in witnesses) / precision
    bound = None
    if seen is not None:
        by_accuracy = drop - _OF_ACCURACY * _chance(changed, samples)
        bound = max(combined + _BOUND / math.sqrt(precision), by_accuracy)
    return LikelyDrop(combined, by_loss, bound, unseen)


def _by_answers(before: Evaluation, now: Evaluation, samples: int) -> tuple[Moved | None, str]:
    """What answers tell of a cut, or why they do not count."""
    if not samples:
        return None, "evaluate did not show the network how many samples it has"
    if before.answers is None:
        return None, "answers before were not seen, or are not one row of numbers a sample"
    seen = moved(before.answers, now.answers, before.accuracy)
    if seen is None:
        return None, "evaluate shows other samples every time, or in another order"
    drop = before.accuracy - now.accuracy
    if abs(drop - seen.drop) > _APART * _chance(seen.share, samples):
        # That accuracy is of something else: several labels a sample, numbers.
        said = f"a drop of accuracy of {drop:.4f}, by the answers of {seen.drop:.4f}"
        return None, f"{said}: it is not the share of samples with the highest output at the label"
    return seen, ""


def _chance(changed: float, samples: int) -> float:
    """The standard error of a drop of accuracy, where that share of the answers changes."""
    return math.sqrt((changed + 1 / samples) / samples)


@dataclass(frozen=True)
class Excess:
    """By what a cut costs too much at once."""

    why: str = ""
    """Empty if it does not."""
    likely: bool = False
    """Whether that is likely, and not only possible."""
    within: float | None = None
    """What share of it, the cheapest first, would cost no more than the limit, as far as is
    known."""
    unseen: str = ""
    """Why answers were not asked, where they were not (:attr:`LikelyDrop.unseen`)."""


def excess(before: Evaluation, now: Evaluation, samples: int, limit: float) -> Excess:
    """Whether a cut costs more accuracy at once than ``limit``.

    Where answers were seen, the upper bound counts. Where they were not, one sample more that is
    wrong is chance if the loss says no more, and where nobody knows how many there are, so is a
    drop without a rise of the loss.
    """
    drop, likely = before.accuracy - now.accuracy, likely_drop(before, now, samples)
    if likely.bound is None:
        one = samples and drop <= 1 / samples + 1e-9 and likely.by_loss <= limit
        confirmed = samples or now.loss > before.loss or not (now.loss or before.loss)
        if one or not confirmed:
            return Excess(unseen=likely.unseen)
    counts = likely.combined if likely.bound is None else likely.bound
    if counts <= limit + 1e-9:
        return Excess(unseen=likely.unseen)
    said = f"accuracy falls by {drop:.4f}"
    if drop <= limit:
        said = f"accuracy goes from {before.accuracy:.4f} to {now.accuracy:.4f}"
        said += f" and the loss from {before.loss:.4g} to {now.loss:.4g}"
        said += f", together a drop of {likely.combined:.4f}"
        said += "" if likely.bound is None else f" by how answers move, of {counts:.4f} at most"
    within = None if likely.bound is None else _part_within(likely.combined, likely.bound, limit)
    return Excess(said, likely.combined > limit + 1e-9, within, likely.unseen)


def _part_within(drop: float, bound: float, limit: float) -> float:
    """The share of a cut, cheapest units first, whose bound is :data:`_AIM` of the limit.

    The last unit costs half as much again as the mean, so that a share s costs s to the power of
    :data:`COST_POWER`; the error grows with its root, as more answers change.
    """
    error, aim = bound - drop, _AIM * limit
    root = math.sqrt(max(error**2 + 4 * drop * aim, 0.0))  # drop x^2 + error x = aim
    x = 2 * aim / (error + root) if error + root > 0 else 0.0
    return min(math.pow(x, 2 / COST_POWER), 1.0)


@dataclass(frozen=True)
class Expected:
    """The accuracy to expect after a cut that costs no more later than it cost at once."""

    accuracy: float
    scatter: float
    """Standard deviation of accuracy from epoch to epoch, by training alone."""
    figures: int
    """That the accuracy was found from, the last one before the cut among them."""
    known: int
    """Moves and reports that the scatter was found from."""

    def fell(self, reports: Sequence[float]) -> bool:
        """Whether the mean of these reports is further below than training scatters. A scatter
        that was found from few figures is itself not known well, which asks for more."""
        error = self.scatter * math.sqrt(1 / self.figures + 1 / len(reports))
        errors = _ERRORS * (1 + _FEW / (self.known + _UNKNOWN))
        return self.accuracy - sum(reports) / len(reports) > errors * error


def expected(
    before: float,
    after: float,
    moves: Sequence[float],
    limit: float,
    *,
    reports: Sequence[float] = (),
    samples: int = 0,
) -> Expected:
    """What to expect after a cut that took accuracy from ``before`` to ``after``, on the same
    samples.

    The last figure alone may be a lucky one, so that the mean of the last five counts where it is
    lower; never below two deviations of the last one, since accuracy that rises leaves its mean
    behind. What a cut gained need not last: new batch statistics follow training again.

    Training's scatter is found from falls, as rises are learning, too; from how moves differ from
    one to the next, which learning hardly does, where that says more; and from how reports since
    the cut, three or more, differ among each other. As two moves more counts what is presumed of a
    training of which nothing is known: a third of the limit, or by how much two networks that are
    right alike often differ by chance on so few samples.

    Args:
        moves: of accuracy from one epoch to the next before the cut, without what cuts did to it.
        limit: the drop of accuracy that is too much.
        reports: accuracies since the cut.
        samples: that accuracy is of; 0 where nobody knows.
    """
    presumed = (limit / 3) ** 2
    if samples:
        presumed = max(presumed, before * (1 - before) / (2 * samples))
    falls = sum(min(move, 0.0) ** 2 for move in moves)
    turns = [(b - a) ** 2 for a, b in itertools.pairwise(moves)]
    squares = max(falls, len(moves) * sum(turns) / (6 * len(turns)) if len(turns) > 1 else 0.0)
    known = len(moves)
    if len(reports) > 2:  # two may differ as the cut does harm
        mean = sum(reports) / len(reports)
        squares += sum((report - mean) ** 2 for report in reports)
        known += len(reports) - 1
    scatter = math.sqrt((squares + _UNKNOWN * presumed) / (known + _UNKNOWN))
    last = moves[:-_LEVELS:-1]
    levels = [before - sum(last[:count]) for count in range(len(last) + 1)]
    level = min(before, max(sum(levels) / len(levels), before - 2 * scatter))
    return Expected(level - max(before - after, 0.0), scatter, len(levels), known)


def trigger_of(decision: StructuralPruningDecision, triggers: RollbackTriggers) -> float:
    """The drop of accuracy that is too much: the strictest of the levels that lose something."""
    drops = (
        (triggers.channel_accuracy_drop, decision.channels),
        (triggers.head_accuracy_drop, decision.attention_heads),
        (triggers.layer_accuracy_drop, decision.layers),
    )
    return min((drop for drop, targets in drops if targets), default=triggers.channel_accuracy_drop)


def outcome_of(
    decision: StructuralPruningDecision,
    before: PrunedArchitecture,
    after: PrunedArchitecture,
    result: Result,
    detail: str,
    figures: Mapping[str, Evaluation] | None = None,
) -> PruningOutcome:
    """The outcome with its figures, by ``before``, ``masked`` and ``after`` (the cut)."""
    fields: dict[str, Any] = {}
    for name, evaluation in (figures or {}).items():
        fields[f"accuracy_{name}"], fields[f"loss_{name}"] = evaluation.accuracy, evaluation.loss
    return PruningOutcome(
        idempotency_key=decision.idempotency_key,
        run_id=decision.run_id,
        epoch=decision.epoch,
        result=result,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        detail=detail,
        **fields,
    )


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
