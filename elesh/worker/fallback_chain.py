"""The fallback chain of the design document: which fallback answers which failure.

Pure. A fallback that was taken is a :class:`leyline.Fallback` of the decision, and what it changes
in an analysis follows from its name alone (:attr:`.compute.protocol.Job.scope`): a replay of the
decision takes the same one.

========================  =====================================================================
fallback                      what it does
========================  =====================================================================
``analysis_timeout``      basic importance scoring: the three vectors, no joint order
``worker_crash``          a fresh child and the same analysis, in what is left of the window
``memory_overflow``       channels only, from the vectors alone, within the conservative limit
``data_corruption``       the run's previous decision stands in, as telemetry, never approved
``safety_failure``        the cut does not hold together: all of it is rejected (in the analysis)
``taylor_failure``        ranked by magnitude, with less confidence (in the analysis)
========================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

from elesh.worker.compute.protocol import (
    CRASH,
    MEMORY,
    TIMEOUT,
    ChildDied,
    ChildFailure,
    ChildOverMemory,
    ChildTimeout,
    Job,
)
from leyline import (
    CheckpointDocument,
    ContractError,
    DigestMismatch,
    Fallback,
    GateResult,
    Level,
    Malformed,
    NotFinite,
    Outcome,
    SafetyValidation,
    ShapeMismatch,
    StructuralPruningDecision,
)

CORRUPTION = "data_corruption"

_FALLBACKS: Mapping[type[ChildFailure], str] = {
    ChildTimeout: TIMEOUT,
    ChildDied: CRASH,
    ChildOverMemory: MEMORY,
}
CORRUPT: tuple[type[ContractError], ...] = (DigestMismatch, Malformed, NotFinite, ShapeMismatch)
"""What says that a checkpoint's data is broken."""
_EXTRA = 0.25
"""Basic scoring after a timeout may take this share of the window, on top of it."""


def fallback_for(failure: ChildFailure, job: Job) -> str:
    """The fallback that answers ``failure`` of ``job``; empty if there is none left.

    Each is taken once. There is none for a head or layer level that does not fit into memory: what
    remains of it then are the channels, which have an analysis of their own. Several levels that
    are decided at once get a fresh child only: each has its own fallbacks once they are parts.
    """
    name = _FALLBACKS[type(failure)]
    if name in dict(job.fallbacks):
        return ""
    if job.kind == "decide" and len(job.levels) > 1 and name != CRASH:
        return ""
    if job.kind == "level" and job.levels[0] is not Level.CHANNEL and name == MEMORY:
        return ""
    return name


def time_for(name: str, window: float, elapsed: float) -> float:
    """Seconds that the next try may take; at most zero if the window does not allow one."""
    return window * _EXTRA if name == TIMEOUT else window - elapsed


def is_corruption(error: ContractError) -> bool:
    """Whether ``error`` says that the checkpoint's data is broken (and not, say, gone)."""
    return isinstance(error, CORRUPT)


def stand_in(
    previous: StructuralPruningDecision, current: CheckpointDocument, key: str, error: ContractError
) -> StructuralPruningDecision:
    """The previous checkpoint's analysis under the key of one whose data is corrupt.

    It is telemetry: the gate ``data`` fails, so it is never approved, whatever architecture it
    speaks of (targets are in the numbering of ``previous``, which the reason names).
    """
    reason = f"the analysis of {previous.idempotency_key} stands in: {error}"[:8192]
    gate = GateResult(name="data", passed=False, detail=reason)
    return previous.model_copy(
        update={
            "idempotency_key": key,
            "run_id": current.metadata.run_id,
            "epoch": current.metadata.epoch,
            "model_hash": current.metadata.model_hash,
            "approved_for_application": False,
            "rejection_reason": f"data: {reason}"[:8192],
            "stands_in": previous.idempotency_key,
            "fallbacks": (*previous.fallbacks, Fallback(rung=CORRUPTION, reason=reason)),
            "safety": SafetyValidation(
                outcome=Outcome.NO_GO,
                phase=previous.safety.phase,
                gates=(*previous.safety.gates, gate),
                confidence=0.0,
            ),
        }
    )
