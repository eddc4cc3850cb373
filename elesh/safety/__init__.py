"""Whether a cut is safe: gates with figures and limits, and the breaker's view. Pure."""

from .breaker import ARCHITECTURE_GATES, BreakerStatus, Vote, breaker_gate, votes
from .gates import (
    MIN_SAMPLES,
    cumulative_limit,
    gradient_isolation,
    minimum_layers,
    minimum_units,
    mixed_owners,
    noise,
    phase_gate,
    predicted_shift,
    requirements,
    statistics_sound,
    structure,
    verdict,
)
from .verification import Entry, Measured, Proposal, Verifier

__all__ = [
    "ARCHITECTURE_GATES",
    "MIN_SAMPLES",
    "BreakerStatus",
    "Entry",
    "Measured",
    "Proposal",
    "Verifier",
    "Vote",
    "breaker_gate",
    "cumulative_limit",
    "gradient_isolation",
    "minimum_layers",
    "minimum_units",
    "mixed_owners",
    "noise",
    "phase_gate",
    "predicted_shift",
    "requirements",
    "statistics_sound",
    "structure",
    "verdict",
    "votes",
]
