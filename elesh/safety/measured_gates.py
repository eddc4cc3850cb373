"""The gates of what was measured on held-out data, and those that stand in where nothing was.

Pure functions, as in :mod:`.gates`. Drops and rises are compared by their upper confidence bound:
what was not proved is not approved.
"""

from __future__ import annotations

import math

import numpy as np

from elesh.settings import Settings
from leyline import Fallback, GateResult

from .paired import ClassDrop, Outcomes
from .verification import Measured, Proposal

__all__ = [
    "MEASURED_GATES",
    "accuracy_retention",
    "class_accuracy",
    "gradient_flow",
    "labels_belong",
    "measured_accuracy",
    "measured_loss",
    "predicted_loss",
    "predicted_only",
    "ranking_holds",
]

MEASURED_GATES = frozenset(
    {
        "measured_loss",
        "measured_accuracy",
        "accuracy_retention",
        "class_accuracy",
        "gradient_flow",
        "ranking",
    }
)


def labels_belong(before: Outcomes, said: float | None) -> GateResult:
    """Passed if the uncut network does on the held-out samples what the trainer said it does, and
    better than answers that have nothing to do with the labels.

    Chance is the accuracy of the network's own answers on labels drawn at random (the expected
    agreement of Cohen 1960); the allowance is three standard errors, for what was said twice
    their square and two points, as it may be of other samples and an epoch old.
    """
    count, accuracy = len(before.losses), before.accuracy
    labels, answers = np.bincount(before.labels), np.bincount(before.answers)
    size = min(len(labels), len(answers))
    chance = float(labels[:size] @ answers[:size]) / len(before.labels) ** 2
    least = chance + 3 * math.sqrt(chance * (1 - chance) / count)
    why = f"held-out accuracy of the uncut network; unrelated labels would give {chance:.4g}"
    if said is not None:
        error = math.sqrt(2 * said * (1 - said) / count)
        expected = said - 3 * error - 0.02
        if expected > least:
            least, why = expected, f"held-out accuracy of the uncut network; said was {said:.4g}"
    return GateResult(
        name="labels",
        passed=accuracy > least,
        measured=accuracy,
        limit=least,
        detail=f"{why}: do the labels belong to the inputs?",
    )


def measured_loss(rise: float, upper: float, limit: float) -> GateResult:
    """Passed if the held-out loss rises by at most ``limit`` nats a sample, bound included."""
    return GateResult(
        name="measured_loss",
        passed=upper <= limit,
        measured=upper,
        limit=limit,
        detail=f"upper bound of the rise in nats a sample; measured {rise:.4g}",
    )


def measured_accuracy(drop: float, upper: float, limit: float, samples: int) -> GateResult:
    """Passed if the held-out accuracy falls by at most ``limit``, bound included.

    On few samples the bound cannot get below some 2 / samples, whatever the cut.
    """
    return GateResult(
        name="measured_accuracy",
        passed=upper <= limit,
        measured=upper,
        limit=limit,
        detail=f"upper bound of the drop; measured {drop:.4g} on {samples} held-out samples",
    )


def accuracy_retention(before: float, after: float, limit: float) -> GateResult:
    """Passed if at least the share ``limit`` of the accuracy is left."""
    share = after / before if before > 0 else 1.0
    return GateResult(
        name="accuracy_retention",
        passed=share >= limit,
        measured=share,
        limit=limit,
        detail="accuracy after the cut as a share of that before",
    )


def class_accuracy(worst: ClassDrop, limit: float) -> GateResult:
    """Passed if no class loses more than ``limit`` of its accuracy, beyond one standard error."""
    return GateResult(
        name="class_accuracy",
        passed=worst.drop - worst.error <= limit,
        measured=worst.drop - worst.error,
        limit=limit,
        detail=f"class {worst.number} loses {worst.drop:.4g}; one standard error less counts",
    )


def gradient_flow(change: float, limit: float) -> GateResult:
    """Passed if the gradients of the outputs keep their norm in the parameters that stay."""
    return GateResult(
        name="gradient_flow",
        passed=change <= limit,
        measured=change,
        limit=limit,
        detail="relative change of the gradients' norm in the parameters that stay",
    )


def ranking_holds(kept: int, proposed: int, limit: float) -> GateResult:
    """Passed if at least the share ``limit`` of what the ranking proposed was measured as safe.

    A ranking that is wrong about most of its units may be wrong about the others on other samples.
    """
    share = kept / proposed if proposed else 1.0
    return GateResult(
        name="ranking",
        passed=share >= limit,
        measured=share,
        limit=limit,
        detail=f"{kept} of {proposed} proposed units were measured as safe",
    )


def predicted_loss(
    rise: float | None, factor: float, limit: float, source: str = "default"
) -> GateResult:
    """Passed if the predicted loss rise, times what predictions are too low by, is within the
    limit that a measured rise would have to keep. The stricter gate of cuts not measured.

    Args:
        source: where the factor comes from.
    """
    if rise is None:
        detail = "not judged: nothing is cut, or no statistics tell the loss rise"
        return GateResult(name="predicted_loss", passed=True, limit=limit, detail=detail)
    return GateResult(
        name="predicted_loss",
        passed=rise * factor <= limit,
        measured=rise * factor,
        limit=limit,
        detail=f"nothing was measured: predicted rise {rise:.4g} nats a sample, times {factor:g} "
        f"({source})",
    )


def predicted_only(
    proposal: Proposal, settings: Settings, skipped: Fallback | None = None
) -> Measured:
    """What a verifier answers where nothing can be measured: all of the cut, under a stricter gate.

    Args:
        skipped: why, where the checkpoint did carry its network.
    """
    limits = settings.verification
    levels, own = frozenset(entry[0] for entry in proposal.order), proposal.loss_factor
    gate = predicted_loss(
        proposal.predicted_loss_rise,
        own.factor if own else limits.predicted_loss_factor,
        limits.limits(levels, proposal.phase).loss_rise,
        f"calibrated from {own.measurements} cuts of this run" if own else "default",
    )
    return Measured(proposal.order, (gate,), skipped=skipped)
