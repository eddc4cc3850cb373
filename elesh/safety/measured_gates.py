"""What a verifier is asked and answers, and how what it measured on held-out data is judged: drops
and intervals, their gates, those that stand in where nothing was measured, and the search for the
largest part that passes. The one verifier there is, in ``elesh.program``, needs torch; nothing here
does.

Promises: pure; randomness is the bootstrap's and seeded. Drops and rises are compared by their
upper confidence bound: what was not proved is not approved. What the search returns was measured as
safe (or is empty); which parts are asked for depends on the answers alone; they are at most about
two logarithms of the length for each level. The order within a group stays; how groups compare is
measured where the whole of a cut is too much, since statistics tell units of one group apart better
than they compare groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from elesh.settings import CutLimits, PhaseLimits, Settings, VerificationSettings
from leyline import (
    Fallback,
    GateResult,
    Interval,
    Level,
    LossFactor,
    Phase,
    Reconstructed,
    Verification,
)

Entry = tuple[Level, str, int]
"""One unit: its level, the group's (or layer's) name, its number in it (0 for a layer)."""
IsSafe = Callable[[tuple[Entry, ...]], bool]
_MOST_PARTS = 16
"""That are measured alone: as many measurements more."""
_LEVELS = (Level.CHANNEL, Level.HEAD, Level.LAYER)


@dataclass(frozen=True)
class Proposal:
    """A cut that passed every gate of its statistics, in the order in which it would be made."""

    order: tuple[Entry, ...]
    """Cheapest first, in current numbering; a prefix of it is a smaller cut."""
    costs: tuple[float, ...]
    """What each cost when it was chosen, in that order, on a scale of its level's own."""
    phase: Phase
    """Which limits hold."""
    predicted_loss_rise: float | None = None
    """Of the whole cut, in nats a sample, where the statistics tell."""
    rounds: int = 1
    """In how many rounds it was chosen on the masked network; 1: once, from the statistics."""
    loss_factor: LossFactor | None = None
    """What this run's predictions are multiplied by, where it was calibrated."""


@dataclass(frozen=True)
class Measured:
    """The part of a proposal that was measured as safe, or why nothing could be measured."""

    kept: tuple[Entry, ...]
    """In the proposal's order; what is left of it. The whole of it where ``skipped``."""
    gates: tuple[GateResult, ...] = ()
    """The gates of what was measured, for the cut that is kept; all passed unless it is empty."""
    verification: Verification | None = None
    """The figures behind the gates; None where nothing was measured."""
    skipped: Fallback | None = None
    """Why nothing was measured: the decision is then a predicted one, under stricter gates."""
    reconstruction: Reconstructed | None = None
    """Whether the kept weights are to be refitted, where the checkpoint asked for that."""
    fallbacks: tuple[Fallback, ...] = ()
    """What was measured otherwise than asked for, and why."""


class Verifier(Protocol):
    """Measures proposals on the network of one checkpoint. The same proposal, the same answer."""

    def __call__(self, proposal: Proposal) -> Measured:
        """Never raises for the network's sake: what cannot be measured is ``skipped``."""
        ...


@dataclass(frozen=True)
class LogitGaps:
    """How far a masked network is from other answers, on N calibration rows.

    A row is a sample, or one position of it where a sample has many answers; the same rows at every
    mask. The answer is that of the whole network, so no labels are needed.
    """

    values: npt.NDArray[np.float32]
    """[N]: log of the odds against the whole network's answer."""
    gradients: Mapping[str, npt.NDArray[np.float32]]
    """By group [N, size]: derivatives of the gaps with respect to its units' gates."""


@runtime_checkable
class Remeasuring(Protocol):
    """A verifier that can measure gate gradients again on a masked network."""

    def remeasure(
        self, masked: Sequence[Entry], halved: Sequence[Entry] = ()
    ) -> LogitGaps | Fallback:
        """With ``masked`` gone and the gates of ``halved`` at one half; or why that cannot be
        measured, which then holds for every mask."""
        ...


@runtime_checkable
class Probing(Protocol):
    """A verifier that can say what masking some units does to the loss, without any gate."""

    def loss_increase(self, entries: Sequence[Entry]) -> float | Fallback:
        """In nats a held-out sample; or why it cannot be measured, which holds for every mask."""
        ...


Doubles = npt.NDArray[np.float64]
_SEED = 20250114
_MIN_IN_CLASS = 10
"""Classes with fewer samples are ignored."""


@dataclass(frozen=True)
class Outcomes:
    """How a network did on N samples with P labelled positions (P = N for classifiers)."""

    losses: Doubles
    """[N] in nats a sample."""
    correct: npt.NDArray[np.bool_]
    """[P] whether the most likely class was the right one."""
    labels: npt.NDArray[np.int64]
    """[P] the right class."""
    sample: npt.NDArray[np.int64]
    """[P] the sample that a position belongs to."""
    answers: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[P] the class that was most likely."""

    @property
    def loss(self) -> float:
        """Mean over samples."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Share of positions."""
        return float(self.correct.mean())

    @property
    def shares(self) -> Doubles:
        """[N] how much of the accuracy comes from each sample, times N."""
        count, total = len(self.losses), len(self.correct)
        hits = np.bincount(self.sample, weights=self.correct, minlength=count)
        return np.asarray(hits * (count / total), np.float64)


def loss_increase(
    before: Outcomes, after: Outcomes, confidence: float, draws: int
) -> tuple[float, Interval, float]:
    """Mean increase of the loss, its interval and its one-sided upper bound, by paired bootstrap
    over samples (Efron and Tibshirani 1993, chapter 16)."""
    loss_increases = after.losses - before.losses
    rng = np.random.default_rng(_SEED)
    means = np.concatenate(
        [
            rng.multinomial(
                len(loss_increases), np.full(len(loss_increases), 1 / len(loss_increases)), size=100
            )
            @ loss_increases
            for _ in range(-(-draws // 100))
        ]
    ) / len(loss_increases)
    upper = float(np.quantile(means, confidence))
    return float(loss_increases.mean()), _interval(means, confidence), upper


def accuracy_drop(
    before: Outcomes, after: Outcomes, confidence: float, draws: int
) -> tuple[float, Interval, float]:
    """Drop of accuracy, where that of as many other samples lies, and the one-sided upper bound of
    the mean.

    Paired Bayesian bootstrap over samples (Rubin 1981). Half a sample that is lost and half a
    sample that is won are added (Jeffreys' prior of the two rates): where nothing changed on N
    samples, something may still have on the next N. The interval adds the next samples' own
    scatter to that of the mean; the bound does not.
    """
    drops = before.shares - after.shares
    values, counts = np.unique(np.append(drops, (-1.0, 1.0)), return_counts=True)
    prior = np.isin(values, (-1.0, 1.0)) * 0.5
    rng = np.random.default_rng(_SEED)
    weights = rng.dirichlet(counts - prior, size=draws)
    others = np.stack([rng.multinomial(len(drops), row) for row in weights])
    next_drops = others @ values / len(drops)
    drop = before.accuracy - after.accuracy
    upper = float(np.quantile(weights @ values, confidence))
    return drop, _interval(next_drops, confidence), upper


@dataclass(frozen=True)
class ClassDrop:
    """The class that lost most."""

    number: int
    drop: float
    """Of the accuracy within it."""
    error: float
    """One standard error of the drop."""


def class_drop(before: Outcomes, after: Outcomes) -> ClassDrop:
    """The largest drop of accuracy within a class of at least ten positions, less its error;
    classes of fewer are passed over."""
    worst = ClassDrop(0, 0.0, 0.0)
    for number in np.unique(before.labels):
        chosen = before.labels == number
        if chosen.sum() < _MIN_IN_CLASS:
            continue
        lost = before.correct[chosen].astype(float) - after.correct[chosen]
        error = float(lost.std(ddof=1) / np.sqrt(len(lost)))
        found = ClassDrop(int(number), float(lost.mean()), error)
        if found.drop - found.error > worst.drop - worst.error:
            worst = found
    return worst


def _interval(values: Doubles, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low = np.quantile(values, tail, method="lower")
    high = np.quantile(values, 1 - tail, method="higher")
    return Interval(low=float(low), high=float(high))


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
    their square and two points, as it may be of other samples and an epoch old. Labels of one class
    never pass: a network that always answers it would seem perfect.
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
    if before.labels.min() == before.labels.max():
        least, why = 1.0, f"all held-out labels are class {before.labels[0]}, which tells nothing"
    return GateResult(
        name="labels",
        passed=accuracy > least,
        measured=accuracy,
        limit=least,
        detail=f"{why}: do the labels belong to the inputs?",
    )


@dataclass(frozen=True)
class Harm:
    """What a cut did on held-out data."""

    increase: tuple[float, Interval, float]
    """Of the loss: as :func:`loss_increase`."""
    drop: tuple[float, Interval, float]
    """Of accuracy: as :func:`accuracy_drop`."""
    worst: ClassDrop
    flow: float
    """Relative change of the gradients' norm in the parameters that stay."""


def strictest_limits(
    settings: VerificationSettings, levels: Iterable[Level], phase: Phase
) -> CutLimits:
    """The strictest limits of the levels that a cut is made of."""
    own: list[PhaseLimits] = [getattr(settings, level) for level in sorted(levels)]
    # In phases that do not prune, the strictest.
    found: list[CutLimits] = [getattr(limits, phase, limits.conservative) for limits in own]
    factor = settings.limit_factor or 1.0
    return CutLimits.model_construct(  # of limits that were validated
        accuracy_drop=min(1.0, factor * min((x.accuracy_drop for x in found), default=0.0)),
        loss_rise=factor * min((x.loss_rise for x in found), default=0.0),
    )


def harm(
    before: Outcomes,
    after: Outcomes,
    flow: float,
    limits: CutLimits,
    settings: VerificationSettings,
) -> tuple[tuple[GateResult, ...], Harm]:
    """The gates of what was measured, and the figures behind them.

    Loss and accuracy are judged by their upper bounds; on few samples that of accuracy cannot get
    below some 2 / samples, whatever the cut. One standard error of the worst class's drop is
    allowed for.

    Args:
        flow: by which share the norm of the gradients changed.
        limits: of the cut's levels in its phase.
    """
    confidence, draws = settings.confidence, settings.bootstrap_samples
    increase = loss_increase(before, after, confidence, draws)
    drop = accuracy_drop(before, after, confidence, draws)
    worst, left = class_drop(before, after), before.accuracy
    share, within = after.accuracy / left if left > 0 else 1.0, worst.drop - worst.error
    gates = (
        GateResult(
            name="measured_loss",
            passed=increase[2] <= limits.loss_rise,
            measured=increase[2],
            limit=limits.loss_rise,
            detail=f"upper bound of the rise in nats a sample; measured {increase[0]:.4g}",
        ),
        GateResult(
            name="measured_accuracy",
            passed=drop[2] <= limits.accuracy_drop,
            measured=drop[2],
            limit=limits.accuracy_drop,
            detail=f"upper bound of the drop; measured {drop[0]:.4g} on {len(before.losses)} "
            "held-out samples",
        ),
        GateResult(
            name="accuracy_retention",
            passed=share >= settings.accuracy_retention,
            measured=share,
            limit=settings.accuracy_retention,
            detail="accuracy after the cut as a share of that before",
        ),
        GateResult(
            name="class_accuracy",
            passed=within <= settings.class_accuracy_drop,
            measured=within,
            limit=settings.class_accuracy_drop,
            detail=f"class {worst.number} loses {worst.drop:.4g}; one standard error less counts",
        ),
        GateResult(
            name="gradient_flow",
            passed=flow <= settings.gradient_flow_change,
            measured=flow,
            limit=settings.gradient_flow_change,
            detail="relative change of the gradients' norm in the parameters that stay",
        ),
    )
    return gates, Harm(increase, drop, worst, flow)


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
    increase: float | None, factor: float, limit: float, source: str = "default"
) -> GateResult:
    """Passed if the predicted loss increase, times what predictions are too low by, is within the
    limit that a measured increase would have to keep. The stricter gate of cuts not measured.

    Args:
        source: where the factor comes from.
    """
    if increase is None:
        detail = "not judged: nothing is cut, or no statistics tell the loss rise"
        return GateResult(name="predicted_loss", passed=True, limit=limit, detail=detail)
    return GateResult(
        name="predicted_loss",
        passed=increase * factor <= limit,
        measured=increase * factor,
        limit=limit,
        detail=f"nothing was measured: predicted rise {increase:.4g} nats a sample, "
        f"times {factor:g} ({source})",
    )


def predicted_only(
    proposal: Proposal, settings: Settings, skipped: Fallback | None = None
) -> Measured:
    """What a verifier answers where nothing can be measured: all of the cut, under a stricter gate.

    Args:
        skipped: why, where the checkpoint did carry its network.
    """
    limits = settings.verification
    levels, own = {entry[0] for entry in proposal.order}, proposal.loss_factor
    gate = predicted_loss(
        proposal.predicted_loss_rise,
        own.factor if own else limits.predicted_loss_factor,
        strictest_limits(limits, levels, proposal.phase).loss_rise,
        f"calibrated from {own.measurements} cuts of this run" if own else "default",
    )
    return Measured(proposal.order, (gate,), skipped=skipped)


def parts_alone(order: Sequence[Entry]) -> list[tuple[Entry, ...]]:
    """The parts of ``order`` that are measured alone: each group's, as far as these are
    :data:`_MOST_PARTS` at most; the smallest of more are one part together."""
    groups: dict[tuple[Level, str], list[Entry]] = {}
    for entry in order:
        groups.setdefault(entry[:2], []).append(entry)
    parts = sorted(groups.values(), key=len, reverse=True)
    if len(parts) > _MOST_PARTS:
        small = {entry[:2] for part in parts[_MOST_PARTS - 1 :] for entry in part}
        parts[_MOST_PARTS - 1 :] = [[entry for entry in order if entry[:2] in small]]
    return [tuple(part) for part in parts]


def by_measured_costs(
    order: Sequence[Entry],
    costs: Sequence[float],
    parts: Sequence[tuple[Sequence[Entry], float]],
) -> tuple[Entry, ...]:
    """``order`` by what each unit costs when the costs of a part add up to what was measured of it.

    Args:
        costs: of ``order``, on any scale that is one within a part. A unit is placed by the highest
            so far, as none may overtake its predecessors.
        parts: each with what it was measured to cost alone, above 0.
    """
    cost_of = dict(zip(order, costs, strict=True))
    measured: dict[Entry, float] = {}
    for part, whole in parts:
        heights = list(itertools.accumulate((max(cost_of[entry], 0.0) for entry in part), max))
        total = sum(heights)
        for entry, height in zip(part, heights, strict=True):
            measured[entry] = whole * (height / total if total > 0 else 1 / len(part))
    return tuple(sorted(order, key=measured.__getitem__))


def largest_safe(order: Sequence[Entry], is_safe: IsSafe) -> tuple[Entry, ...]:
    """The part of ``order`` that can go, in its order.

    All of it if that is safe; else the longest safe prefix that bisection finds, and then, level by
    level from channels to layers, as many of the units behind it as can go on top: a layer that is
    too much does not keep the channels behind it.
    """
    if not order or is_safe(tuple(order)):
        return tuple(order)
    kept = _longest((), order, is_safe)
    rest = order[len(kept) :]
    if len({level for level, _, _ in order}) > 1:
        for level in _LEVELS:
            kept = _extended(kept, [entry for entry in rest if entry[0] is level], is_safe)
    chosen = set(kept)
    return tuple(entry for entry in order if entry in chosen)


def _extended(kept: tuple[Entry, ...], more: Sequence[Entry], is_safe: IsSafe) -> tuple[Entry, ...]:
    if not more or is_safe((*kept, *more)):
        return (*kept, *more)
    return _longest(kept, more, is_safe)


def _longest(kept: tuple[Entry, ...], more: Sequence[Entry], is_safe: IsSafe) -> tuple[Entry, ...]:
    """``kept`` and the longest safe prefix of ``more``, all of which is known to be too much."""
    safe, unsafe = 0, len(more)
    while unsafe - safe > 1:
        middle = (safe + unsafe) // 2
        if is_safe((*kept, *more[:middle])):
            safe = middle
        else:
            unsafe = middle
    return (*kept, *more[:safe])
