"""A worker's counters (:class:`Status`, read by metrics, health and registry), and its telemetry
events, dead letters and log lines (:class:`Reports`).

Promises: work never waits for it. Events leave by the :class:`TelemetryBuffer`, after the work, in
their order, many in a round trip. While the bus is away, or where more waits than fits, events are
dropped with a line in the log that counts them, and the work goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from typing import Any, Literal, get_args

from opentelemetry.trace import SpanKind

from elesh.bus import Bus, BusUnavailable, CommitOutcome, Delivery, WorkerState
from elesh.bus.admission import Work, named_key
from elesh.bus.core import UNTRUSTED
from elesh.observe import SparseLines, carrier_of, get_logger, messaging, metrics, span
from elesh.safety import levels_of
from leyline import (
    AnalysisMetrics,
    BreakerTransition,
    ContractError,
    CutFallback,
    DeadLetter,
    IdempotencyKey,
    Level,
    Message,
    Priority,
    PruningOutcome,
    StructuralPruningDecision,
    StructuralValidationResult,
    TelemetryEvent,
)
from leyline.streams import TELEMETRY, VALIDATION, WORKERS, Stream

_NAMED = frozenset(level.value for level in Level) - {Level.JOINT.value}

_LONGEST = 8192
"""Of a text in a message, in characters."""
_RECENT = 1000
_SHORTENED, _HELD_BACK = "shortened", "held_back"
"""Names, in metrics, of ``PruningOutcome.shortened_to`` and ``CheckpointMetadata.held_back``."""
Doing = Literal["starting", "idle", "busy", "draining"]


@dataclass(frozen=True)
class Condition:
    """How a worker is, as its monitor sees it."""

    child: Literal["starting", "idle", "busy", "wedged", "dead"] = "starting"
    ready: bool = False
    why: str = "starting"
    """Why it is not ready; empty where it is."""


@dataclass
class Status:
    """Counters of one worker since it started."""

    worker_id: str
    version: str = field(default_factory=lambda: version("elesh"))
    clock: Callable[[], float] = time.time
    """Seconds since 1970. A worker takes the server's time, so that readers can compare it."""
    condition: Condition = field(default_factory=Condition)
    health_url: str = ""
    doing: Doing = "starting"
    lacks: str = ""
    """What it has no room for now; empty: nothing."""
    lacks_until: float = 0.0
    """It takes nothing more until then (monotonic seconds)."""
    completed: int = 0
    failed: int = 0
    fallbacks: int = 0
    dead_letters: int = 0
    peak_memory: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Trainers' outcomes that this worker heard of, by level and result."""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Of the last analyses."""

    def __post_init__(self) -> None:
        self.started = self.clock()
        self._in_flight: dict[tuple[str, str], tuple[str, float]] = {}

    def announce(self) -> None:
        """Begin the counters that rates are taken of: the first event must find them at zero."""
        for level in Level:
            for result in ("completed", "failed"):
                metrics.ANALYSES.add(0, {"level": level.value, "result": result})
            for result in ("applied", "rolled_back"):
                metrics.OUTCOMES.add(0, {"level": level.value, "result": result})
            metrics.REMOVED_UNITS.add(0, {"level": level.value})
        for code in _codes(ContractError):
            metrics.DEAD_LETTERS.add(0, {"code": code})
        for name in (*get_args(CutFallback), _SHORTENED, _HELD_BACK):
            metrics.TRAINER_FALLBACKS.add(0, {"fallback": name})
        metrics.SAVED_PARAMETERS.add(0)
        metrics.SAVED_MACS.add(0)

    def serving(self) -> None:
        """It can take work."""
        self.doing = "idle"

    def draining(self) -> None:
        """It takes no new work."""
        self.doing = "draining"

    def began(self, key: str, origin: tuple[str, str]) -> None:
        """It works on an entry, which belongs to the decision of ``key``."""
        self._in_flight[origin] = key, self.clock()
        if self.doing != "draining":
            self.doing = "busy"

    def ended(self, origin: tuple[str, str]) -> None:
        """It is done with an entry."""
        _, since = self._in_flight.pop(origin, ("", None))
        if since is not None:
            labels = {"messaging.system": "redis", "messaging.destination.name": origin[0]}
            metrics.PROCESS_SECONDS.record(self.clock() - since, labels)
        if self.doing == "busy" and not self._in_flight:
            self.doing = "idle"

    @property
    def longest(self) -> tuple[str, float]:
        """The entry that is longest in flight: the key of its decision, and since when."""
        return next(iter(self._in_flight.values()), ("", 0.0))

    def gave_up(self, level: Level) -> None:
        """An analysis gave no result."""
        self.failed += 1
        metrics.ANALYSES.add(1, {"level": level.value, "result": "failed"})

    def committed(self, decision: StructuralPruningDecision) -> None:
        """A decision was published."""
        for level in levels_of(decision):
            approved = decision.approved_for_application and level in decision.taken
            verdict = "approved" if approved else "rejected"
            # Else its first gate that failed, or that of the whole decision.
            failed = [gate.name for gate in decision.safety.gates if not gate.passed]
            own = [n.partition(".")[2] for n in failed if n.startswith(f"{level.value}.")]
            own += [n.removeprefix("joint.") for n in failed if n.partition(".")[0] not in _NAMED]
            reason = "none" if approved else next(iter(own), "nothing_to_remove")
            labels = {"level": level.value, "verdict": verdict, "reason": reason}
            metrics.DECISIONS.add(1, labels)

    def redelivered(self, cause: str) -> None:
        """An entry went round again."""
        metrics.REDELIVERIES.add(1, {"cause": cause})

    def dead_lettered(self, code: str) -> None:
        """An entry went to the dead letters."""
        self.dead_letters += 1
        metrics.DEAD_LETTERS.add(1, {"code": code})

    def heard(self, outcome: PruningOutcome, decision: StructuralPruningDecision) -> None:
        """A trainer reported what it made of a decision; of a monitored cut only the end counts."""
        if outcome.watched:
            return
        for level in decision.taken or levels_of(decision):
            self.outcomes[level.value, outcome.result] += 1
            metrics.OUTCOMES.add(1, {"level": level.value, "result": outcome.result})
        shortened = (_SHORTENED,) if outcome.shortened_to is not None else ()
        for name in (*outcome.fallbacks, *shortened):
            metrics.TRAINER_FALLBACKS.add(1, {"fallback": name})
        if outcome.result == "applied":
            _saved(outcome, decision)

    @property
    def completion_rate(self) -> float:
        """Share of analyses that gave a result; 1 before the first."""
        ended = self.completed + self.failed
        return self.completed / ended if ended else 1.0

    @property
    def duration_p95(self) -> float:
        """95th percentile of the last thousand analyses, in seconds; 0 before the first."""
        return metrics.p95(self.seconds)

    def confirmed(self) -> dict[str, float]:
        """By level, the share of applied cuts among those that the trainer's own check decided."""
        shares = {}
        for level in {level for level, _ in self.outcomes}:
            applied = self.outcomes[level, "applied"]
            decided = applied + self.outcomes[level, "rolled_back"]
            if decided:
                shares[level] = applied / decided
        return shares

    def state(self) -> WorkerState:
        """What the worker registry and the health page say of it."""
        key, since = self.longest
        return WorkerState(
            worker_id=self.worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=self.version,
            started_at=self.started,
            doing=self.doing,
            child=self.condition.child,
            ready=self.condition.ready,
            why=self.condition.why,
            key=key,
            since=since,
            health_url=self.health_url,
            completed=self.completed,
            failed=self.failed,
            fallbacks=self.fallbacks,
            dead_letters=self.dead_letters,
            duration_p95=self.duration_p95,
            peak_memory_bytes=self.peak_memory,
        )


def _codes(kind: type[ContractError]) -> set[str]:
    """Every class of error that a dead letter can have."""
    return {kind.code}.union(*map(_codes, kind.__subclasses__()))


def _saved(outcome: PruningOutcome, decision: StructuralPruningDecision) -> None:
    """Count what a cut that stays has saved."""
    counts = {
        Level.CHANNEL: sum(len(target.channel_indices) for target in decision.channels),
        Level.HEAD: sum(len(target.head_indices) for target in decision.attention_heads),
        Level.LAYER: len(decision.layers),
    }
    for level, count in counts.items():
        if count:
            metrics.REMOVED_UNITS.add(count, {"level": level.value})
    parameters = outcome.parameters_before - outcome.parameters_after
    metrics.SAVED_PARAMETERS.add(max(0, parameters))
    statistics = decision.statistics
    metrics.SAVED_MACS.add(max(0, statistics.macs_before - statistics.macs_after))


_SOURCE = "elesh"
_MOST = 1000
"""Events that may wait."""
_BATCH = 100
"""Events of one round trip."""
_END_SECONDS = 3.0
"""For what is left when the worker ends."""


@dataclass(frozen=True)
class _Event:
    stream: Stream
    message: Message
    about: dict[str, Any]


class TelemetryBuffer:
    """Publishes what one worker does."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: deque[_Event] = deque()
        self._wake = asyncio.Event()
        self._ended = False
        self._dropped = 0
        self._lines = SparseLines(get_logger(__name__))

    def put(self, stream: Stream, message: Message, run_id: str, epoch: int | None) -> None:
        """Have a message published soon, in the trace that is current now."""
        about = {"run_id": run_id, "epoch": epoch, "carrier": carrier_of()}
        if len(self._waiting) >= _MOST:
            self._dropped += 1
            return
        self._waiting.append(_Event(stream, message, about))
        self._wake.set()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Publish until the block ends, and then what is left, for at most three seconds."""
        keeping = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            self._ended = True
            self._wake.set()
            await asyncio.wait({keeping}, timeout=_END_SECONDS)
            keeping.cancel()

    async def _keep(self) -> None:
        while not self._ended or self._waiting:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                # One round trip: all of it is asked for in one turn of the loop.
                batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
                publishing = (
                    self._bus.publish(
                        event.stream,
                        event.message,
                        source=_SOURCE,
                        priority=Priority.LOW,
                        **event.about,
                    )
                    for event in batch
                )
                answers = await asyncio.gather(*publishing, return_exceptions=True)
                failed = [answer for answer in answers if isinstance(answer, Exception)]
                if dropped := self._dropped:
                    self._dropped = 0
                    reason = f"{_MOST} events waited"
                    self._lines.warning("telemetry dropped", dropped, reason=reason)
                if failed:
                    self._lines.warning(
                        "telemetry not published", len(failed), reason=str(failed[0])
                    )


_ANALYSIS_FALLBACKS = frozenset({"safety_failure", "taylor_failure"})
"""Rows of the failure table that are answered inside the analysis."""
_JOIN_FALLBACKS = frozenset(
    {
        "verification_skipped",
        "verification_timeout",
        "rounds_skipped",
        "rounds_timeout",
        "rounds_refused",
        "calibration_skipped",
        "groups_timeout",
        "reconstruction_skipped",
    }
)
"""Those that only the join of all levels can take."""
_log = get_logger(__name__)


class Reports:
    """Publishes what one worker does."""

    def __init__(self, bus: Bus, worker_id: str) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self.status = Status(worker_id, clock=lambda: bus.clock.latest().timestamp())
        self.telemetry_buffer = TelemetryBuffer(bus)

    def step(
        self,
        step: str,
        work: Work,
        *,
        key: IdempotencyKey | None = None,
        metrics: AnalysisMetrics | None = None,
        figures: Mapping[str, float] | None = None,
        detail: str = "",
    ) -> None:
        """One step of one analysis."""
        values: dict[str, Any] = {
            "step": step,
            "worker_id": self._worker_id,
            "at": self._bus.clock.latest(),
            "idempotency_key": str(key or work.key),
            "run_id": work.run_id,
            "epoch": work.key.epoch,
            "metrics": metrics,
            "figures": dict(figures or {}),
            "detail": detail[:_LONGEST],
        }
        self.telemetry_buffer.put(TELEMETRY, TelemetryEvent(**values), work.run_id, work.key.epoch)

    def analysed(
        self, work: Work, decision: StructuralPruningDecision, figures: AnalysisMetrics
    ) -> None:
        """The child answered; fallbacks that the analysis itself took are reported, too.

        A joint decision repeats those of its levels, which were reported when they were analysed.
        """
        for taken in decision.fallbacks:
            own = taken.rung in _ANALYSIS_FALLBACKS and not decision.levels
            if own or taken.rung in _JOIN_FALLBACKS:
                self.fallback(work, str(decision.key), taken.rung, taken.reason)
        level, status, seconds = decision.key.level.value, self.status, figures.duration_seconds
        status.completed += 1
        status.seconds.append(seconds)
        status.peak_memory = max(status.peak_memory, figures.peak_memory_bytes)
        metrics.ANALYSES.add(1, {"level": level, "result": "completed"})
        metrics.ANALYSIS_SECONDS.record(seconds, {"level": level})
        self.step("analysed", work, key=decision.key, metrics=figures)

    def entry(self, step: str, stream: str, entry_id: str, cause: str, detail: str) -> None:
        """An entry went round again."""
        where = f"{stream}/{entry_id}"
        self.status.redelivered(cause)
        _log.warning(step.replace("_", " "), entry=where, cause=cause, reason=detail)
        event: dict[str, Any] = {
            "step": step,
            "worker_id": self._worker_id,
            "at": self._bus.clock.latest(),
            "detail": f"{where}: {cause}: {detail}"[:8192],
        }
        self.telemetry_buffer.put(TELEMETRY, TelemetryEvent(**event), "", None)

    def commit_outcome(
        self, work: Work, decision: StructuralPruningDecision, outcome: CommitOutcome
    ) -> None:
        """Report what became of a decision in the store; a committed one to Urabrask, too."""
        verdict = "approved" if decision.approved_for_application else "rejected"
        _log.info(
            f"decision {outcome}",
            key=decision.idempotency_key,
            verdict=verdict,
            reason=decision.rejection_reason or "-",
        )
        seconds = (self._bus.clock.latest() - work.received).total_seconds()
        self.step(
            outcome.value,
            work,
            key=decision.key,
            detail=verdict,
            figures={
                "seconds": seconds,
                "approved": float(decision.approved_for_application),
                "units": float(sum(len(units) for units in decision.units.values())),
            },
        )
        if outcome is CommitOutcome.COMMITTED:
            self.status.committed(decision)
            if work.document.metadata.held_back:
                metrics.TRAINER_FALLBACKS.add(1, {"fallback": _HELD_BACK})
            result = StructuralValidationResult(
                idempotency_key=decision.idempotency_key,
                outcome=decision.safety.outcome,
                gates=decision.safety.gates,
            )
            self.telemetry_buffer.put(VALIDATION, result, work.run_id, work.key.epoch)

    def fallback(self, work: Work, key: str, name: str, reason: str) -> None:
        """A fallback of the failure table was taken."""
        _log.warning("fallback", key=key, fallback=name, reason=reason)
        self.status.fallbacks += 1
        # "rung": the label of the version before.
        metrics.FALLBACKS.add(1, {"fallback": name, "rung": name})
        self.step("fallback", work, key=IdempotencyKey.parse(key), detail=f"{name}: {reason}")

    async def transition(self, change: BreakerTransition) -> None:
        """A breaker changed its state."""
        _log.warning(
            "breaker",
            run=change.run_id,
            level=change.level.value,
            before=change.before,
            after=change.after,
            reason=change.reason,
        )
        try:
            # Awaited: the audit log has it from here.
            await self._bus.publish(
                TELEMETRY,
                change,
                source=_SOURCE,
                carrier=carrier_of(),
                priority=Priority.LOW,
                run_id=change.run_id,
            )
        except BusUnavailable as error:
            _log.warning("breaker transition not published", reason=str(error))

    def dead_letter(
        self, delivery: Delivery, error: ContractError, work: Work | None
    ) -> DeadLetter:
        """The dead letter of an entry, with its original bytes and its history."""
        stream, entry_id = delivery.origin
        return DeadLetter(
            stream=stream,
            entry_id=entry_id,
            error_code=error.code,
            field=error.field[:8192],
            reason=str(error)[:8192],
            deliveries=delivery.deliveries,
            worker_id=self._worker_id,
            at=self._bus.clock.latest(),
            original=delivery.original,
            idempotency_key=str(work.key) if work else _named_key(delivery, error),
            traceparent=delivery.carrier.get("traceparent", ""),
            history=delivery.history.attempts,
        )

    def dead_lettered(self, dead_letter: DeadLetter, work: Work | None) -> None:
        """An entry went to the dead letters."""
        self.status.dead_lettered(dead_letter.error_code)
        event = TelemetryEvent(
            step="dead_letter",
            worker_id=self._worker_id,
            at=dead_letter.at,
            idempotency_key=dead_letter.idempotency_key,
            run_id=work.run_id if work else "",
            epoch=work.key.epoch if work else None,
            detail=dead_letter.reason,
        )
        self.telemetry_buffer.put(TELEMETRY, event, event.run_id, event.epoch)


def _named_key(delivery: Delivery, error: ContractError) -> str:
    """The key that an entry names; empty if it is not to be believed or cannot be read."""
    if error.code in UNTRUSTED:
        return ""
    try:
        return named_key(delivery.envelope)
    except ContractError:
        return ""


def record_receipts(
    deliveries: Sequence[Delivery],
    begun: int,
    there: datetime,
    server: tuple[str, int] | None = None,
) -> None:
    """One span an entry, from when it was there and asked for until now.

    Args:
        begun: when it was asked for, in nanoseconds since 1970. What the poll waited before the
            entry was published is no part of the entry's story.
        there: the time by the server's clock, which the entries' ids are of.
        server: that they came from.
    """
    now = time.time_ns()
    for delivery in deliveries:
        name = delivery.stream.name
        published = int(delivery.entry_id.partition("-")[0])
        waited = max(0.0, there.timestamp() - published / 1000)
        with span(
            f"receive {name}",
            kind=SpanKind.CLIENT,
            carrier=delivery.carrier,
            attributes=messaging(
                "receive", name, entry_id=delivery.entry_id, group=WORKERS, server=server
            )
            | {"elesh.queued_seconds": waited},
            start=min(max(begun, now - round(waited * 1e9)), now),
        ):
            pass
