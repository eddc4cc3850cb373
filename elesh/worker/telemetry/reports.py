"""What a worker reports: telemetry events, dead letters, log lines.

Promises: work never waits for it. Events leave by the :class:`TelemetryBuffer`, after the work, in
their order, many in a round trip. While the bus is away, or where more waits than fits, events are
dropped with a line in the log that counts them, and the work goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from opentelemetry.trace import SpanKind

from elesh.bus import Bus, BusUnavailable, CommitOutcome, Delivery
from elesh.bus.admission import Work, named_key
from elesh.bus.core import UNTRUSTED
from elesh.observe import SparseLines, carrier_of, get_logger, messaging, span_from
from leyline import (
    AnalysisMetrics,
    BreakerTransition,
    ContractError,
    DeadLetter,
    IdempotencyKey,
    Message,
    Priority,
    StructuralPruningDecision,
    StructuralValidationResult,
    TelemetryEvent,
)
from leyline.streams import TELEMETRY, VALIDATION, WORKERS, Stream

from .status import Status

__all__ = ["Reports", "TelemetryBuffer", "record_receipts"]


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
    """Publishes what one worker tells the world."""

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
                await self._send()

    async def _send(self) -> None:
        """One round trip; all of it is asked for in one turn of the loop."""
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        publishing = (
            self._bus.publish(
                event.stream, event.message, source=_SOURCE, priority=Priority.LOW, **event.about
            )
            for event in batch
        )
        answers = await asyncio.gather(*publishing, return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        if dropped := self._dropped:
            self._dropped = 0
            self._lines.warning("telemetry dropped", dropped, reason=f"{_MOST} events waited")
        if failed:
            self._lines.warning("telemetry missed", len(failed), reason=str(failed[0]))


_COMMITTED = {
    CommitOutcome.COMMITTED: "settled",
    CommitOutcome.DUPLICATE: "duplicate",
    CommitOutcome.CONFLICT: "conflict",
    CommitOutcome.LOST: "lost",
}
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
        self.status = Status(worker_id)
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
            "at": datetime.now(UTC),
            "idempotency_key": str(key or work.key),
            "run_id": work.run_id,
            "epoch": work.epoch,
            "metrics": metrics,
            "figures": dict(figures or {}),
            "detail": detail,
        }
        self.telemetry_buffer.put(TELEMETRY, TelemetryEvent(**values), work.run_id, work.epoch)

    def analysed(
        self, work: Work, decision: StructuralPruningDecision, metrics: AnalysisMetrics
    ) -> None:
        """The child answered; fallbacks that the analysis itself took are reported, too.

        A joint decision repeats those of its levels, which were reported when they were analysed.
        """
        for taken in decision.fallbacks:
            own = taken.rung in _ANALYSIS_FALLBACKS and not decision.levels
            if own or taken.rung in _JOIN_FALLBACKS:
                self.fallback(work, str(decision.key), taken.rung, taken.reason)
        self.status.analysed(
            decision.key.level, metrics.duration_seconds, metrics.peak_memory_bytes
        )
        self.step("analysed", work, key=decision.key, metrics=metrics)

    def entry(self, step: str, stream: str, entry_id: str, cause: str, detail: str) -> None:
        """An entry went round again."""
        where = f"{stream}/{entry_id}"
        self.status.redelivered(cause)
        _log.warning(step.replace("_", " "), entry=where, cause=cause, reason=detail)
        event: dict[str, Any] = {
            "step": step,
            "worker_id": self._worker_id,
            "at": datetime.now(UTC),
            "detail": f"{where}: {cause}: {detail}"[:8192],
        }
        self.telemetry_buffer.put(TELEMETRY, TelemetryEvent(**event), "", None)

    def commit_outcome(
        self, work: Work, decision: StructuralPruningDecision, outcome: CommitOutcome
    ) -> None:
        """What became of a decision in the store; a committed one is Urabrask's business too."""
        verdict = "approved" if decision.approved_for_application else "rejected"
        _log.info(
            "decision " + _COMMITTED[outcome],
            key=decision.idempotency_key,
            verdict=verdict,
            reason=decision.rejection_reason or "-",
        )
        seconds = (datetime.now(UTC) - work.received).total_seconds()
        self.step(
            _COMMITTED[outcome],
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
            result = StructuralValidationResult(
                idempotency_key=decision.idempotency_key,
                outcome=decision.safety.outcome,
                gates=decision.safety.gates,
            )
            self.telemetry_buffer.put(VALIDATION, result, work.run_id, work.epoch)

    def fallback(self, work: Work, key: str, name: str, reason: str) -> None:
        """A fallback of the failure table was taken."""
        _log.warning("fallback", key=key, fallback=name, reason=reason)
        self.status.fell_back(name)
        self.step("fallback", work, key=IdempotencyKey.parse(key), detail=f"{name}: {reason}")

    async def transition(self, change: BreakerTransition | None) -> None:
        """A breaker changed its state; None where it did not."""
        if change is None:
            return
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
            _log.warning("transition missed", reason=str(error))

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
            at=datetime.now(UTC),
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
            epoch=work.epoch if work else None,
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
    deliveries: Sequence[Delivery], begun: int, server: tuple[str, int] | None = None
) -> None:
    """One span an entry, from when it was there and asked for until now.

    Args:
        begun: when it was asked for, in nanoseconds since 1970. What the poll waited before the
            entry was published is no part of the entry's story.
        server: that it came from.
    """
    now = time.time_ns()
    for delivery in deliveries:
        name = delivery.stream.name
        published = int(delivery.entry_id.partition("-")[0]) * 1_000_000
        waited = max(0, now - published) / 1e9
        with span_from(
            delivery.carrier,
            f"receive {name}",
            kind=SpanKind.CLIENT,
            attributes=messaging(
                "receive", name, entry_id=delivery.entry_id, group=WORKERS, server=server
            )
            | {"elesh.queued_seconds": waited},
            start=min(max(begun, published), now),
        ):
            pass
