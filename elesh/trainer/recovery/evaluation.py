"""How well a network does by the trainer's own figures, and when they fail a check. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Evaluation", "failed_check"]


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


def failed_check(before: float, now: Evaluation, limit: float) -> str:
    """Why ``now`` is not good enough after an accuracy of ``before``; empty if it is."""
    if not math.isfinite(now.loss):
        return f"loss is {now.loss:g}"
    if not math.isfinite(now.accuracy) or not before - now.accuracy <= limit:
        return f"accuracy {before:.4f} fell to {now.accuracy:.4f}, more than {limit:g},"
    return ""
