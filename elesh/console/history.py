"""What the console remembers of the streams: runs, their checkpoints, decisions and outcomes.

Promises: folding is pure (a message in, facts kept); the same messages give the same history in
whatever pieces they come; what is kept is bounded: the oldest runs and rows are let go first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import singledispatchmethod
from typing import TypeVar

from leyline import (
    BreakerTransition,
    CheckpointMetadata,
    CheckpointReady,
    Level,
    Message,
    PrunedArchitecture,
    PruningOutcome,
    StructuralAnalysisRequest,
    StructuralPruningDecision,
)

__all__ = ["Checkpoint", "Decided", "History", "Run"]

_RUNS = 50
_ROWS = 2000
_TRANSITIONS = 100
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run as its trainer published it."""

    epoch: int
    at: datetime
    accuracy: float | None
    loss: float | None
    parameters: int
    original_parameters: int
    pruned: dict[Level, float]
    """Share of the original units that are gone, by level."""


@dataclass(frozen=True)
class Decided:
    """One decision in brief; the whole of it is in its record."""

    key: str
    epoch: int
    level: Level
    at: datetime
    phase: str
    phase_limit: float
    approved: bool
    reason: str
    units: int
    parameters_before: int
    parameters_after: int
    measured: bool
    failed_gates: tuple[str, ...]
    fallbacks: tuple[str, ...]


@dataclass
class Run:
    """Everything known of one run, in the order it came."""

    run_id: str
    at: datetime
    """When it was last heard of."""
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    """By epoch."""
    decisions: dict[str, Decided] = field(default_factory=dict)
    """By key."""
    outcomes: dict[str, list[PruningOutcome]] = field(default_factory=dict)
    """By key of the decision; a watched cut has two."""

    @property
    def epoch(self) -> int:
        """The last epoch that anything was heard of."""
        epochs = [*self.checkpoints, *(decided.epoch for decided in self.decisions.values())]
        return max(epochs, default=0)

    def outcome(self, key: str) -> PruningOutcome | None:
        """The last word about a decision."""
        told = self.outcomes.get(key)
        return told[-1] if told else None


class History:
    """The runs of a partition, by the order in which they were last heard of."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.transitions: deque[BreakerTransition] = deque(maxlen=_TRANSITIONS)

    def take(self, messages: Iterable[tuple[Message, datetime]]) -> None:
        """Fold messages with the times at which they were published."""
        for message, at in messages:
            self._take(message, at)
        while len(self.runs) > _RUNS:
            del self.runs[min(self.runs, key=lambda name: self.runs[name].at)]

    def recent(self) -> list[Run]:
        """The runs, last heard of first."""
        return sorted(self.runs.values(), key=lambda run: (run.at, run.run_id), reverse=True)

    @singledispatchmethod
    def _take(self, message: Message, at: datetime) -> None:
        """Anything else is no business of the console."""

    @_take.register
    def _(self, ready: CheckpointReady, at: datetime) -> None:
        self._checkpoint(ready.metadata, ready.architecture, at)

    @_take.register
    def _(self, request: StructuralAnalysisRequest, at: datetime) -> None:
        if request.metadata is not None:
            self._checkpoint(request.metadata, request.current_architecture, at)

    @_take.register
    def _(self, decision: StructuralPruningDecision, at: datetime) -> None:
        statistics, safety = decision.statistics, decision.safety
        units = sum(map(len, decision.units.values())) + len(decision.layers)
        _keep(
            self._run(decision.run_id, at).decisions,
            decision.idempotency_key,
            Decided(
                key=decision.idempotency_key,
                epoch=decision.epoch,
                level=decision.key.level,
                at=at,
                phase=safety.phase.value,
                phase_limit=statistics.phase_limit,
                approved=decision.approved_for_application,
                reason=decision.rejection_reason,
                units=units,
                parameters_before=statistics.parameters_before,
                parameters_after=statistics.parameters_after,
                measured=safety.measured,
                failed_gates=tuple(gate.name for gate in safety.gates if not gate.passed),
                fallbacks=tuple(fallback.rung for fallback in decision.fallbacks),
            ),
        )

    @_take.register
    def _(self, outcome: PruningOutcome, at: datetime) -> None:
        outcomes = self._run(outcome.run_id, at).outcomes
        told = [*outcomes.get(outcome.idempotency_key, []), outcome]
        _keep(outcomes, outcome.idempotency_key, told)

    @_take.register
    def _(self, change: BreakerTransition, at: datetime) -> None:
        self.transitions.append(change)

    def _checkpoint(
        self, metadata: CheckpointMetadata, architecture: PrunedArchitecture, at: datetime
    ) -> None:
        point = Checkpoint(
            epoch=metadata.epoch,
            at=at,
            accuracy=_known(metadata.accuracy),
            loss=_known(metadata.loss),
            parameters=architecture.parameters,
            original_parameters=architecture.original_parameters,
            pruned=_pruned(architecture),
        )
        _keep(self._run(metadata.run_id, at).checkpoints, metadata.epoch, point)

    def _run(self, run_id: str, at: datetime) -> Run:
        run = self.runs.setdefault(run_id, Run(run_id, at))
        run.at = max(run.at, at)
        return run


def _keep(rows: dict[K, V], name: K, row: V) -> None:
    rows[name] = row
    if len(rows) > _ROWS:
        del rows[next(iter(rows))]


def _known(value: float | None) -> float | None:
    """None for a figure that the trainer did not measure (NaN)."""
    return None if value is None or value != value else value


def _pruned(architecture: PrunedArchitecture) -> dict[Level, float]:
    shares = {}
    for level in (Level.CHANNEL, Level.HEAD):
        groups = [g for g in architecture.groups if g.level is level and g.prunable]
        original = sum(group.original_size for group in groups)
        if original:
            shares[level] = 1 - sum(group.size for group in groups) / original
    return shares
