"""Callbacks, on the training thread, for what a session publishes and what becomes of decisions.

Promises: an observer that fails is left out from then on, with its error in the log; training goes
on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from elesh.observe import get_logger
from leyline import CheckpointBundle, PruningOutcome, StructuralPruningDecision

__all__ = ["Observers", "SessionObserver"]

_log = get_logger(__name__)


class SessionObserver(Protocol):
    """Told of a run's checkpoints and decisions as they happen."""

    def on_checkpoint(self, bundle: CheckpointBundle) -> None:
        """A checkpoint is published."""

    def on_outcome(self, decision: StructuralPruningDecision, outcome: PruningOutcome) -> None:
        """A decision was applied, rolled back, refused or had been rejected."""

    def close(self) -> None:
        """The session ends."""


class Observers:
    """The observers of one session that have not failed."""

    def __init__(self, observers: Sequence[SessionObserver]) -> None:
        self._left = list(observers)

    def on_checkpoint(self, bundle: CheckpointBundle) -> None:
        """Tell all of them."""
        self._tell(lambda observer: observer.on_checkpoint(bundle))

    def on_outcome(self, decision: StructuralPruningDecision, outcome: PruningOutcome) -> None:
        """Tell all of them."""
        self._tell(lambda observer: observer.on_outcome(decision, outcome))

    def close(self) -> None:
        """Tell all of them."""
        self._tell(lambda observer: observer.close())

    def _tell(self, what: Callable[[SessionObserver], None]) -> None:
        for observer in tuple(self._left):
            try:
                what(observer)
            except Exception:
                self._left.remove(observer)
                _log.exception("observer left out", observer=type(observer).__name__)
