"""What one order loses as a share of what another loses, paired by seed.

Promises: no ratio is given where the other order loses less than its own noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NOISE", "Ratio", "paired_ratio"]

NOISE = 2.0
"""Standard errors that the other's mean loss must exceed, or the ratio is of noise."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means over the same seeds."""

    value: float
    error: float
    """Standard error over seeds; NaN for one seed."""

    def __str__(self) -> str:
        return f"{self.value:.2f} ±{self.error:.2f}"


def paired_ratio(ours: Sequence[float], other: Sequence[float]) -> Ratio | None:
    """``mean(ours) / mean(other)``; None where ``mean(other)`` is not ``NOISE`` errors above zero.

    The error is that of ratio estimation (Cochran 1977, "Sampling Techniques", 6.4): of the
    residuals ``ours - ratio * other``, seed by seed, so that what both lose on a hard seed cancels.

    Args:
        ours: by seed, what is lost.
        other: the same of the other order, seeds in the same order.

    Raises:
        ValueError: if the two are not of the same seeds.
    """
    residuals = list(zip(ours, other, strict=True))
    mean = statistics.fmean(other)
    if mean <= 0 or (len(other) > 1 and mean <= NOISE * _error(other)):
        return None
    value = statistics.fmean(ours) / mean
    return Ratio(value, _error([a - value * b for a, b in residuals]) / mean)


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean; NaN for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
