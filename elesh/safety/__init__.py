"""Whether a cut is safe: gates with figures and limits, and the breaker's view. Pure."""

from .breaker import BreakerStatus, breaker_gate, counts_as_failure
from .gates import (
    MIN_SAMPLES,
    cumulative_limit,
    gradient_isolation,
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
from .layer_gates import layer_isolation, layer_phase, layer_structure, minimum_layers
from .verification import Entry, Measured, Proposal, Verifier

__all__ = [
    "MIN_SAMPLES",
    "BreakerStatus",
    "Entry",
    "Measured",
    "Proposal",
    "Verifier",
    "breaker_gate",
    "counts_as_failure",
    "cumulative_limit",
    "gradient_isolation",
    "layer_isolation",
    "layer_phase",
    "layer_structure",
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
]
