"""``analyze``: a checkpoint in, a decision out. No I/O and no clock: the same input gives the same
bytes.

Promises: every gate is listed whether it passed or not; a rejected decision names what rejected it
and still carries its analysis as telemetry; nothing raises but :class:`leyline.ContractError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elesh.analysis.levels.analyze_level import draft_level
from elesh.analysis.selection.choose import Scorer
from elesh.safety import BreakerStatus, Verifier
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Fallback,
    IdempotencyKey,
    Level,
    LossFactor,
    RolledBackCut,
    StructuralPruningDecision,
)

from .join import JoinContext, joined


def analyze(
    bundle: CheckpointBundle,
    settings: Settings | None = None,
    *,
    level: Level | None = None,
    threads: int = 1,
    breakers: Mapping[Level, BreakerStatus] | None = None,
    key: IdempotencyKey | None = None,
    scorer: Scorer | None = None,
    fallbacks: Sequence[Fallback] = (),
    verify: Verifier | None = None,
    taken_back: Sequence[RolledBackCut] = (),
    loss_factor: LossFactor | None = None,
) -> StructuralPruningDecision:
    """Decide what can be removed from the network of ``bundle``.

    Args:
        bundle: a checkpoint's architecture and statistics.
        settings: the defaults of the design document if not given.
        level: decide on this level alone; all levels that the bundle asks for if not given.
        threads: numerical work runs on so many threads; the decision does not depend on it.
        breakers: the circuit breakers of the levels; those not given are closed.
        key: the key of the decision; the bundle's own if not given.
        scorer: overrides the scorer of request and settings, where a fallback asks for another.
        fallbacks: fallbacks of the failure table that led here, to be recorded in the decision.
        verify: measures the cut on held-out data (``elesh.program.verifier``).
        taken_back: cuts of the run that its trainer rolled back; they are not proposed again.
        loss_factor: of the run, where its predictions were calibrated.

    Raises:
        InvalidField: if a level is not analysed here, or the request names unknown layers.
        IdentityMismatch: if the key speaks of another checkpoint.
    """
    settings = settings or Settings()
    asked = tuple(dict.fromkeys(bundle.levels)) if level is None else (level,)
    levels = [
        draft_level(
            bundle,
            settings,
            each,
            key=None if key is None else key.at(each),
            scorer=scorer,
            fallbacks=fallbacks,
            threads=threads,
        )
        for each in asked
    ]
    context = JoinContext(
        breakers=breakers or {},
        verify=verify,
        rolled_back=taken_back,
        loss_factor=loss_factor,
    )
    return joined(bundle, levels, settings, context)
