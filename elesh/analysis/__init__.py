"""What can be removed, and in which order: pure numerics from a checkpoint to a decision."""

from .decide import analyze
from .explain import Explanation, UnitExplanation, explain
from .schedule import Allowance, allowance, curve, phase_at

__all__ = [
    "Allowance",
    "Explanation",
    "UnitExplanation",
    "allowance",
    "analyze",
    "curve",
    "explain",
    "phase_at",
]
