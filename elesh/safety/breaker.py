"""What a decision needs to know of its level's circuit breaker, and what a decision tells it.

Promises: the state is written into the decision's ``breaker`` gate completely, so that a replay
decides under the very same breaker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from leyline import GateResult, StructuralPruningDecision

__all__ = ["BreakerStatus", "breaker_gate", "counts_as_failure"]

State = Literal["closed", "open", "half_open"]

INTEGRITY_GATES = frozenset(
    {
        "statistics",
        "structure",
        "gradient_isolation",
        "minimum_channels",
        "minimum_heads",
        "cumulative_limit",
    }
)
"""Gates whose failure says that something is broken, not that a careful answer is no."""


@dataclass(frozen=True)
class BreakerStatus:
    """A circuit breaker as the caller saw it."""

    state: State = "closed"
    failures: int = 0
    reason: str = ""

    @classmethod
    def of(cls, decision: StructuralPruningDecision) -> BreakerStatus:
        """The breaker under which ``decision`` was made; closed where it has no such gate."""
        for gate in decision.safety.gates:
            if gate.name == "breaker":
                state, _, reason = gate.detail.partition(": ")
                return cls(cast(State, state), int(gate.measured or 0), reason)
        return cls()


def breaker_gate(status: BreakerStatus) -> GateResult:
    """Passed unless the breaker is open; a half-open one lets its trial through."""
    return GateResult(
        name="breaker",
        passed=status.state != "open",
        measured=status.failures,
        detail=f"{status.state}: {status.reason}" if status.reason else status.state,
    )


def counts_as_failure(decision: StructuralPruningDecision) -> bool:
    """Whether a decision is a failure of its level in the breaker's sense.

    Broken statistics or a cut that does not hold together are; a careful no (quota, phase, noise,
    predicted shift, requirements, the open breaker itself) is not.
    """
    return any(not g.passed and g.name in INTEGRITY_GATES for g in decision.safety.gates)
