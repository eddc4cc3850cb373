"""Whether a cut is safe: gates with figures and limits, and the breaker's view. Pure."""

from .breaker import BreakerStatus, Vote, breaker_gate, vote_of, votes
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
from .measured_gates import (
    MEASURED_GATES,
    accuracy_retention,
    class_accuracy,
    gradient_flow,
    measured_accuracy,
    measured_loss,
    predicted_loss,
    predicted_only,
)
from .rolled_back import fingerprint_of, refuse_rolled_back, rolled_back_cut
from .search import largest_safe
from .verification import Entry, Measured, Proposal, Verifier

__all__ = [
    "MEASURED_GATES",
    "MIN_SAMPLES",
    "BreakerStatus",
    "Entry",
    "Measured",
    "Proposal",
    "Verifier",
    "Vote",
    "accuracy_retention",
    "breaker_gate",
    "class_accuracy",
    "cumulative_limit",
    "fingerprint_of",
    "gradient_flow",
    "gradient_isolation",
    "largest_safe",
    "measured_accuracy",
    "measured_loss",
    "minimum_layers",
    "minimum_units",
    "mixed_owners",
    "noise",
    "phase_gate",
    "predicted_loss",
    "predicted_only",
    "predicted_shift",
    "refuse_rolled_back",
    "requirements",
    "rolled_back_cut",
    "statistics_sound",
    "structure",
    "verdict",
    "vote_of",
    "votes",
]
