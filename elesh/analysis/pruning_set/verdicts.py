"""How any decision is put together: verdict and reason follow from the gates, in one place.

Promises: a decision is approved if and only if something goes and every gate that counts passed;
one that is not says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

from elesh import safety
from elesh.settings import Settings
from leyline import (
    AttentionHeadTarget,
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    GateResult,
    IdempotencyKey,
    LayerPruningTarget,
    LevelPart,
    Outcome,
    Phase,
    PruningStatistics,
    SafetyValidation,
    SparedGroup,
    StructuralPruningDecision,
)

from .loss_increase import with_loss_increases
from .plans import Target

__all__ = ["FALLBACK_DISCOUNT", "by_kind", "decided", "targets_of"]

FALLBACK_DISCOUNT = 0.8
"""What each fallback of the failure table leaves of the confidence."""
_SAFETY_FAILURE = "safety_failure"


def decided(
    bundle: CheckpointBundle,
    settings: Settings,
    key: IdempotencyKey,
    *,
    targets: Iterable[Target],
    statistics: PruningStatistics,
    phase: Phase,
    gates: Sequence[GateResult],
    confidence: float,
    reason: str = "",
    counted: Sequence[GateResult] | None = None,
    fallbacks: tuple[Fallback, ...] = (),
    ignored: tuple[tuple[str, str], ...] = (),
    spared: tuple[SparedGroup, ...] = (),
    levels: tuple[LevelPart, ...] = (),
) -> StructuralPruningDecision:
    """The decision.

    Args:
        counted: the gates that the verdict rests on; all of ``gates`` if not given.
        reason: why it is not approved even if they passed; empty if nothing speaks against it.
    """
    counted, broken = gates if counted is None else counted, _broken(gates)
    if broken:
        # A row of the failure table: nothing of a cut that does not hold together is applied.
        counted = tuple(dict.fromkeys((*counted, *broken)))
        if not any(taken.rung == _SAFETY_FAILURE for taken in fallbacks):
            fallbacks += (Fallback(rung=_SAFETY_FAILURE, reason=safety.rejection(broken)),)
    outcome = safety.verdict(counted, measured=False)
    reason = (safety.rejection(counted) or reason)[:8192]
    return StructuralPruningDecision(
        idempotency_key=str(key),
        run_id=bundle.metadata.run_id,
        epoch=bundle.metadata.epoch,
        model_hash=bundle.metadata.model_hash,
        **by_kind(with_loss_increases(bundle, targets)),
        statistics=statistics,
        safety=SafetyValidation(
            outcome=outcome, phase=phase, gates=tuple(gates), confidence=confidence
        ),
        approved_for_application=not reason and outcome is not Outcome.NO_GO,
        rejection_reason=reason,
        fallbacks=fallbacks,
        ignored=ignored,
        spared=spared,
        levels=levels,
        settings_hash=settings.analysis_hash,
        elesh_version=_elesh_version(),
    )


def _broken(gates: Iterable[GateResult]) -> tuple[GateResult, ...]:
    """The gates of the architecture's integrity that failed, of whichever level."""
    return tuple(
        gate
        for gate in gates
        if not gate.passed and gate.name.rpartition(".")[2] in safety.ARCHITECTURE_GATES
    )


def targets_of(decision: StructuralPruningDecision) -> tuple[Target, ...]:
    """All targets of a decision: channels, then heads, then layers."""
    return (*decision.channels, *decision.attention_heads, *decision.layers)


def by_kind(targets: Iterable[Target]) -> dict[str, Any]:
    """Targets by the field of a decision that they belong in."""
    kinds = {
        "channels": ChannelPruningTarget,
        "attention_heads": AttentionHeadTarget,
        "layers": LayerPruningTarget,
    }
    listed = tuple(targets)
    return {
        field: tuple(target for target in listed if isinstance(target, kind))
        for field, kind in kinds.items()
    }


@cache
def _elesh_version() -> str:
    return version("elesh")
