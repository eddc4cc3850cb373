"""Measuring cuts on held-out data, in the compute child.

Torch is asked for only where there is a network to measure: a worker without torch decides by
prediction, and every such decision says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from elesh import safety
from elesh.safety import Entry, Measured, Proposal, Verifier
from elesh.settings import Settings
from leyline import CheckpointBundle, Fallback, StructuralPruningDecision

__all__ = [
    "CALIBRATION_SKIPPED",
    "GROUPS_TIMEOUT",
    "RECONSTRUCTION_SKIPPED",
    "ROUNDS_SKIPPED",
    "ROUNDS_TIMEOUT",
    "SKIPPED",
    "TIMEOUT",
    "preload",
    "verifier",
]

SKIPPED = "verification_skipped"
"""The fallback of the failure table: program, weights, data or worker do not allow to measure."""
TIMEOUT = "verification_timeout"
"""The fallback of the failure table: measuring takes longer than its share of the window."""
ROUNDS_SKIPPED = "rounds_skipped"
"""The fallback of the failure table: measured at once, not in rounds; there is no calibration
data."""
ROUNDS_TIMEOUT = "rounds_timeout"
"""The fallback of the failure table: rounds take longer than half of what measuring may take."""

RECONSTRUCTION_SKIPPED = "reconstruction_skipped"
"""The fallback: cuts are measured with the weights as they are; what reads the units, or the
missing calibration data, does not allow to refit."""
CALIBRATION_SKIPPED = "calibration_skipped"
"""The fallback of the failure table: no calibration probe is measured in the preparation phase."""
GROUPS_TIMEOUT = "groups_timeout"
"""The fallback: how groups compare is not measured, as that takes longer than half of what
measuring may take; the order of the statistics holds."""


@dataclass(frozen=True)
class _Predicts:
    """Decides by prediction where the checkpoint carries a network that is not measured."""

    settings: Settings
    skipped: Fallback

    def __call__(self, proposal: Proposal) -> Measured:
        return safety.predicted_only(proposal, self.settings, self.skipped)

    def loss_increase(self, entries: Sequence[Entry]) -> Fallback:
        return Fallback(rung=CALIBRATION_SKIPPED, reason=self.skipped.reason)


def verifier(
    bundle: CheckpointBundle,
    settings: Settings,
    recorded: StructuralPruningDecision | None = None,
    refused: str = "",
) -> Verifier:
    """What measures the cuts of this checkpoint, or says why it cannot.

    Args:
        recorded: the decision that is replayed. Whether time ran out, or a worker had torch, is
            what another run could see otherwise, so that is taken from it.
        refused: why the checkpoint's network is not to be run, if it is not.
    """
    if refused:
        return _Predicts(settings, Fallback(rung=SKIPPED, reason=refused))
    if bundle.network is None:
        return lambda proposal: safety.predicted_only(proposal, settings)
    if not _has_torch():
        missing = Fallback(rung=SKIPPED, reason="this worker has no torch (elesh[torch])")
        return _Predicts(settings, missing)
    seconds = settings.verification.window_share * settings.window_seconds
    if recorded is not None:
        seconds = math.inf
        taken = [f for f in recorded.fallbacks if f.rung in (SKIPPED, TIMEOUT)]
        if recorded.safety.verification is None and (taken or recorded.approved_for_application):
            return lambda proposal: safety.predicted_only(proposal, settings, *taken[:1])
    from .network_verifier import NetworkVerifier

    # By fallback, what a recorded decision met that another run might not.
    chance = (ROUNDS_TIMEOUT, CALIBRATION_SKIPPED, GROUPS_TIMEOUT)
    met = {f.rung: f for f in recorded.fallbacks if f.rung in chance} if recorded else {}
    return NetworkVerifier(bundle, settings, seconds, met)


def preload() -> None:
    """Load torch now, if it is here, and not in the first window in which something is measured."""
    if _has_torch():
        import_module(".network_verifier", __name__)


def _has_torch() -> bool:
    return find_spec("torch") is not None and find_spec("safetensors") is not None
