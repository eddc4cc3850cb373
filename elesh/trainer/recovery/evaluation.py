"""How well a network does by the trainer's own figures, and when they fail a check. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from leyline import InvalidField

__all__ = ["Evaluation", "checked", "failed_check"]


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
