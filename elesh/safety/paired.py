"""What a cut does to samples that were measured before and after it: means, intervals, classes.

Pure: the same outcomes give the same figures. Randomness is the bootstrap's and seeded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from leyline import Interval

__all__ = ["ClassDrop", "Outcomes", "accuracy_drop", "class_drop", "loss_rise"]

Doubles = npt.NDArray[np.float64]
_SEED = 20250114
_MIN_IN_CLASS = 10
"""Classes of fewer samples say nothing."""


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


def loss_rise(
    before: Outcomes, after: Outcomes, confidence: float, draws: int
) -> tuple[float, Interval, float]:
    """Mean rise of the loss, its interval and its one-sided upper bound, by paired bootstrap over
    samples (Efron and Tibshirani 1993, chapter 16)."""
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
    return float(loss_increases.mean()), _interval(means, confidence), _upper(means, confidence)


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
    return drop, _interval(next_drops, confidence), _upper(weights @ values, confidence)


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


def _upper(values: Doubles, confidence: float) -> float:
    return float(np.quantile(values, confidence))
