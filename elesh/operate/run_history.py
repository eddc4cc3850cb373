"""A memory of the streams: runs, their checkpoints, decisions and outcomes.

Promises: folding is pure (an entry in, facts kept); the same entries give the same history in
whatever pieces and whatever order they come; what is kept is bounded, and what was let go is
counted, so that a page can say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import singledispatchmethod
from typing import TypeVar

from elesh.bus import moment
from elesh.bus.admission import key_of
from leyline import (
    BreakerTransition,
    CheckpointMetadata,
    CheckpointReady,
    ContractError,
    Level,
    Message,
    PrunedArchitecture,
    PruningGroup,
    PruningOutcome,
    StructuralAnalysisRequest,
    StructuralPruningDecision,
)

from .explain import reasons

_RUNS = 5000
_ROWS = 2000
_TRANSITIONS = 100
K = TypeVar("K")
V = TypeVar("V")
Place = tuple[str, str]
"""A stream, by its short name, and the id of an entry in it."""


@dataclass(frozen=True)
class Entry:
    """A message and where it stands."""

    message: Message
    stream: str
    entry_id: str

    @property
    def order(self) -> tuple[int, int]:
        """Its place in time, by the server's clock."""
        milliseconds, _, number = self.entry_id.partition("-")
        return int(milliseconds), int(number)

    @property
    def at(self) -> datetime:
        """When the server took it."""
        return moment(self.order[0])


@dataclass(frozen=True)
class Width:
    """A group of a network: how many units it had, and has."""

    name: str
    level: str
    original: int
    size: int
    reason: str
    """Why it is left alone; empty where it may be cut."""


@dataclass(frozen=True)
class Shape:
    """A network's size at one moment."""

    parameters: int
    original_parameters: int
    macs: int
    """Multiply-accumulates of one sample."""
    original_macs: int
    widths: tuple[Width, ...]
    """From input to output."""
    blocks: tuple[tuple[str, bool], ...]
    """Layers that can be removed whole, and whether they were."""
    pruned: dict[Level, float]
    """Share of the original units that are gone, by level."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run as its trainer published it."""

    epoch: int
    order: tuple[int, int]
    accuracy: float | None
    loss: float | None
    shape: Shape


@dataclass(frozen=True)
class Decided:
    """One decision in brief; the whole of it is in its record."""

    key: str
    run_id: str
    epoch: int
    level: Level
    levels: tuple[str, ...]
    """Those that were asked for: several in a joint decision."""
    order: tuple[int, int]
    phase: str
    phase_limit: float
    approved: bool
    reason: str
    units: int
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    measured: bool
    failed_gates: tuple[str, ...]
    fallbacks: tuple[str, ...]
    shortfall: str
    """What was asked for or allowed and is not removed, and why."""


@dataclass
class Run:
    """Everything known of one run."""

    run_id: str
    order: tuple[int, int]
    """Of the entry that it was last heard of by."""
    version: int = 0
    """Rises with everything that is learnt of it."""
    let_go: int = 0
    """Rows that were not kept."""
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    """By epoch."""
    decisions: dict[str, Decided] = field(default_factory=dict)
    """By key."""
    outcomes: dict[str, list[PruningOutcome]] = field(default_factory=dict)
    """By key of the decision, oldest first; a monitored cut has two."""
    places: dict[str, Place] = field(default_factory=dict)
    """Of the events that asked for decisions, by the key of the decision."""
    _orders: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    _shapes: dict[str, Shape] = field(default_factory=dict)

    @property
    def at(self) -> datetime:
        """When it was last heard of, by the server's clock."""
        return moment(self.order[0])

    @property
    def epoch(self) -> int:
        """The last epoch that anything was heard of."""
        epochs = [*self.checkpoints, *(decided.epoch for decided in self.decisions.values())]
        return max(epochs, default=0)

    def outcome(self, key: str) -> PruningOutcome | None:
        """The last word about a decision."""
        outcomes = self.outcomes.get(key)
        return outcomes[-1] if outcomes else None

    def result(self, decided: Decided) -> str:
        """What became of a decision: a result of the trainer, or ``approved`` or ``rejected``."""
        outcome = self.outcome(decided.key)
        if outcome is not None:
            return str(outcome.result)
        return "approved" if decided.approved else "rejected"

    def shape(self, architecture: PrunedArchitecture) -> Shape:
        """The size of an architecture; equal ones share one."""
        known = self._shapes.get(architecture.model_hash)
        if known is None:
            known = self._shapes[architecture.model_hash] = _shape(architecture)
        return known

    def hear(self, outcome: PruningOutcome, order: tuple[int, int]) -> None:
        """Keep an outcome in the order of its time."""
        orders = self._orders.setdefault(outcome.idempotency_key, [])
        outcomes = self.outcomes.setdefault(outcome.idempotency_key, [])
        if order not in orders:
            place = sum(other < order for other in orders)
            orders.insert(place, order)
            outcomes.insert(place, outcome)


class RunHistory:
    """The runs of a partition, by the order in which they were last heard of."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.version = 0
        """Rises with everything that is learnt."""
        self.let_go = 0
        """Runs that were not kept: there were more than are remembered."""
        self._gone: set[str] = set()
        self._transitions: dict[tuple[int, int], BreakerTransition] = {}

    @property
    def transitions(self) -> list[BreakerTransition]:
        """The latest changes of breakers, newest first."""
        return [self._transitions[order] for order in sorted(self._transitions, reverse=True)]

    @property
    def full(self) -> bool:
        """Whether older runs would only be let go again."""
        return len(self.runs) >= _RUNS

    def take(self, entries: Iterable[Entry]) -> None:
        """Fold entries, in whatever order."""
        for entry in entries:
            self._take(entry.message, entry)
            self.version += 1
        while len(self.runs) > _RUNS:
            oldest = min(self.runs, key=lambda name: self.runs[name].order)
            del self.runs[oldest]
            self._gone.add(oldest)
            self.let_go = len(self._gone)

    def recent(self) -> list[Run]:
        """The runs, last heard of first."""
        return sorted(self.runs.values(), key=lambda run: (run.order, run.run_id), reverse=True)

    @singledispatchmethod
    def _take(self, message: Message, entry: Entry) -> None:
        """Other messages do not concern a run."""

    @_take.register
    def _(self, ready: CheckpointReady, entry: Entry) -> None:
        self._checkpoint(ready, ready.metadata, ready.architecture, entry)

    @_take.register
    def _(self, request: StructuralAnalysisRequest, entry: Entry) -> None:
        if request.metadata is not None:
            self._checkpoint(request, request.metadata, request.current_architecture, entry)

    @_take.register
    def _(self, decision: StructuralPruningDecision, entry: Entry) -> None:
        run = self._run(decision.run_id, entry)
        if decision.idempotency_key not in run.decisions:
            _keep(run, run.decisions, decision.idempotency_key, _decided(decision, entry.order))

    @_take.register
    def _(self, outcome: PruningOutcome, entry: Entry) -> None:
        self._run(outcome.run_id, entry).hear(outcome, entry.order)

    @_take.register
    def _(self, change: BreakerTransition, entry: Entry) -> None:
        self._transitions[entry.order] = change
        while len(self._transitions) > _TRANSITIONS:
            del self._transitions[min(self._transitions)]

    def _checkpoint(
        self,
        asked: CheckpointReady | StructuralAnalysisRequest,
        metadata: CheckpointMetadata,
        architecture: PrunedArchitecture,
        entry: Entry,
    ) -> None:
        run = self._run(metadata.run_id, entry)
        with contextlib.suppress(ContractError):  # a request with a malformed key is a dead letter
            run.places[str(key_of(asked))] = entry.stream, entry.entry_id
        known = run.checkpoints.get(metadata.epoch)
        if known is not None and known.order >= entry.order:
            return
        point = Checkpoint(
            epoch=metadata.epoch,
            order=entry.order,
            accuracy=_known(metadata.accuracy),
            loss=_known(metadata.loss),
            shape=run.shape(architecture),
        )
        _keep(run, run.checkpoints, metadata.epoch, point)

    def _run(self, run_id: str, entry: Entry) -> Run:
        run = self.runs.get(run_id)
        if run is None:
            run = self.runs[run_id] = Run(run_id, entry.order, let_go=int(run_id in self._gone))
        run.order = max(run.order, entry.order)
        run.version += 1
        return run


def _decided(decision: StructuralPruningDecision, order: tuple[int, int]) -> Decided:
    statistics, safety = decision.statistics, decision.safety
    return Decided(
        key=decision.idempotency_key,
        run_id=decision.run_id,
        epoch=decision.epoch,
        level=decision.key.level,
        levels=tuple(part.level.value for part in decision.levels) or (decision.key.level.value,),
        order=order,
        phase=safety.phase.value,
        phase_limit=statistics.phase_limit,
        approved=decision.approved_for_application,
        reason=reasons(decision),
        units=sum(map(len, decision.units.values())) + len(decision.layers),
        parameters_before=statistics.parameters_before,
        parameters_after=statistics.parameters_after,
        macs_before=statistics.macs_before,
        macs_after=statistics.macs_after,
        measured=safety.measured,
        failed_gates=tuple(gate.name for gate in safety.gates if not gate.passed),
        fallbacks=tuple(fallback.rung for fallback in decision.fallbacks),
        shortfall=statistics.shortfall,
    )


def _keep(run: Run, rows: dict[K, V], name: K, row: V) -> None:
    """Keep a row; of too many the one with the earliest epoch or time goes."""
    rows[name] = row
    if len(rows) > _ROWS:
        del rows[min(rows, key=lambda each: rows[each].order)]  # type: ignore[attr-defined]
        run.let_go += 1


def _known(value: float | None) -> float | None:
    """None for a figure that the trainer did not measure (NaN)."""
    return None if value is None or value != value else value


def _shape(architecture: PrunedArchitecture) -> Shape:
    shares = {}
    for level in (Level.CHANNEL, Level.HEAD):
        groups = [g for g in architecture.groups if g.level is level and g.prunable]
        original = sum(group.original_size for group in groups)
        if original:
            shares[level] = 1 - sum(group.size for group in groups) / original
    return Shape(
        parameters=architecture.parameters,
        original_parameters=architecture.original_parameters,
        macs=architecture.macs,
        original_macs=architecture.original_macs,
        widths=tuple(
            Width(g.name, g.level.value, g.original_size, g.size, "" if g.prunable else g.reason)
            for g in sorted(architecture.groups, key=lambda group: _depth(architecture, group))
        ),
        blocks=tuple((block.name, block.removed) for block in architecture.blocks),
        pruned=shares,
    )


def _depth(architecture: PrunedArchitecture, group: PruningGroup) -> int:
    """Where a group's units come first, in the order of the layers."""
    names = set(group.layers)
    for place, layer in enumerate(architecture.layers):
        if layer.name in names or layer.name.startswith(f"{group.name}."):
            return place
    return len(architecture.layers)
