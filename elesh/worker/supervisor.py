"""The supervisor: claim, admit, run, settle.

Promises: every entry that a worker claims ends settled, as a duplicate, or as a dead letter with
its original bytes and the reason, or it stays pending for another worker; one decision for each
key; leases are renewed while the child computes and while draining; SIGTERM finishes what was
begun; a bus that is away is waited for, with one line in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import shutil
import signal
import socket
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from opentelemetry.trace import SpanKind

from elesh.bus import Bus, BusUnavailable, Delivery, Settlement, Settling
from elesh.observe import get_logger, messaging, onward, span, span_from
from elesh.safety import votes
from elesh.settings import Settings
from leyline import (
    Conflict,
    ContractError,
    IdempotencyKey,
    Poison,
    PruningOutcome,
    StructuralPruningDecision,
    UnknownDecision,
    read_envelope,
    unwrap,
)
from leyline.streams import CHECKPOINTS, OUTCOMES, REQUESTS, WORKERS

from .admission import Work, admit
from .analysis import Analyst
from .auditor import auditing
from .reports import Reports

__all__ = ["GROUP", "Worker", "serve"]

GROUP = WORKERS
STREAMS = (CHECKPOINTS, REQUESTS, OUTCOMES)
_BLOCK_SECONDS = 1.0
_TRIM_SECONDS = 60.0
_log = get_logger(__name__)


def worker_name() -> str:
    """A name that no other worker has: host and eight random digits."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


class Worker:
    """One worker of the fleet: serves one entry at a time until :meth:`drain` is called."""

    def __init__(self, bus: Bus, settings: Settings, worker_id: str = "") -> None:
        self.worker_id = worker_id or worker_name()
        self._bus = bus
        self._settings = settings
        self._reports = Reports(bus, self.worker_id)
        self._spool = Path(tempfile.mkdtemp(prefix="elesh-worker-"))
        self._analyst = Analyst(bus, settings, self._reports, self._spool)
        self._draining = asyncio.Event()
        self._held: Delivery | None = None
        self._next_trim = 0.0

    def drain(self) -> None:
        """Claim nothing new, finish what was begun, then end."""
        self._draining.set()

    async def run(self) -> None:
        """Serve until drained."""
        leases = asyncio.create_task(self._keep_lease())
        try:
            await self._analyst.start()
            _log.info("serving", worker=self.worker_id, group=GROUP)
            while not self._draining.is_set():
                await self._serve_next()
        finally:
            leases.cancel()
            await self._analyst.stop()
            with contextlib.suppress(BusUnavailable):
                await self._bus.leave(GROUP, self.worker_id, STREAMS)
            shutil.rmtree(self._spool, ignore_errors=True)
        _log.info("drained", worker=self.worker_id)

    async def _serve_next(self) -> None:
        try:
            delivery = await self._claim()
            if delivery is not None:
                await self._serve(delivery)
            else:
                await self._tidy()
        except BusUnavailable as error:
            _log.warning("bus away, waiting", reason=str(error))
            await self._bus.when_available(stop=self._draining)
        finally:
            self._held = None

    async def _tidy(self) -> None:
        """Now and then, shorten the streams below what every group has done."""
        now = asyncio.get_running_loop().time()
        if now >= self._next_trim:
            # Spread over the fleet: workers that started together do not trim together.
            self._next_trim = now + _TRIM_SECONDS * random.uniform(0.5, 1.5)
            await self._bus.trim()

    async def _claim(self) -> Delivery | None:
        """An entry whose owner's lease ran out, else a new one, else None after a moment."""
        found = await self._bus.reclaim(GROUP, self.worker_id, STREAMS, count=1)
        if not found:
            found = await self._bus.claim(
                GROUP, self.worker_id, STREAMS, count=1, block_seconds=_BLOCK_SECONDS
            )
        self._held = found[0] if found else None
        return self._held

    async def _serve(self, delivery: Delivery) -> None:
        name = delivery.stream.name
        attributes = messaging("process", name, entry_id=delivery.entry_id, group=GROUP)
        with span_from(
            delivery.carrier,
            f"process {name}",
            attributes=attributes | {"elesh.deliveries": delivery.deliveries},
            redelivered=delivery.deliveries > 1,
        ):
            try:
                await self._admit_run_settle(delivery)
            except ContractError as error:
                await self._bury(delivery, error)
            except (BusUnavailable, asyncio.CancelledError):
                raise
            except Exception:
                # Ours, not the message's: it stays pending, and is poison after a few tries.
                _log.exception("entry left for another try", entry=delivery.entry_id)

    async def _admit_run_settle(self, delivery: Delivery) -> None:
        self._refuse_poison(delivery)
        now = datetime.now(UTC)
        work = admit(delivery.envelope, window=self._settings.worker.window_seconds, now=now)
        if isinstance(work, PruningOutcome):
            await self._note_outcome(delivery, work)
            return
        await self._reports.step("received", work, figures={"deliveries": delivery.deliveries})
        if await self._is_decided(work):
            await self._bus.acknowledge(GROUP, self.worker_id, delivery)
            await self._reports.step("duplicate", work)
            return
        try:
            decisions = await self._analyst.decide(work)
        except ContractError as error:
            await self._note_failure(work, delivery, str(error))
            await self._bury(delivery, error, work)
            return
        await self._settle(delivery, work, decisions)

    def _refuse_poison(self, delivery: Delivery) -> None:
        limit = self._settings.bus.max_deliveries
        if delivery.deliveries > limit:
            raise Poison(
                "deliveries",
                f"at most {limit} before it is settled",
                str(delivery.deliveries),
                hint="it stopped every worker that took it",
            )

    async def _is_decided(self, work: Work) -> bool:
        """Whether every key has its decision already.

        Raises:
            Conflict: if one was decided for other content.
        """
        records = [await self._bus.record(key) for key in work.keys]
        for key, record in zip(work.keys, records, strict=True):
            if record is not None and record.fingerprint != work.fingerprint:
                raise _conflict(key, work)
        return all(record is not None for record in records)

    async def _settle(
        self, delivery: Delivery, work: Work, decisions: list[StructuralPruningDecision]
    ) -> None:
        name, carrier = delivery.stream.name, onward(delivery.carrier)
        with span(
            f"settle {name}",
            kind=SpanKind.CLIENT,
            attributes=messaging("settle", name, entry_id=delivery.entry_id, group=GROUP),
        ):
            settled = await self._bus.settle(
                GROUP,
                self.worker_id,
                delivery,
                [
                    # The trainer's own context, not ours: it outlives this worker (decision 0050).
                    Settling(
                        decision.key, work.fingerprint, decision, carrier, work.run_id, work.epoch
                    )
                    for decision in decisions
                ],
            )
        for decision, outcome in zip(decisions, settled, strict=True):
            await self._reports.settlement(work, decision, outcome)
            if outcome is Settlement.CONFLICT:
                raise _conflict(decision.key, work)
            if outcome is Settlement.SETTLED:
                await self._count(work, decision)

    async def _count(self, work: Work, decision: StructuralPruningDecision) -> None:
        """Feed the breakers: an approved level counts only once the trainer reports on it."""
        breakers = self._bus.breakers
        for level, vote in votes(decision).items():
            if vote == "failure":
                reason, token = decision.rejection_reason or _gap(decision), f"{decision.key}"
                change = await breakers.failure(work.run_id, level, reason, token=token)
                await self._reports.transition(change)
            elif vote == "success":
                await self._reports.transition(await breakers.success(work.run_id, level))

    async def _note_outcome(self, delivery: Delivery, outcome: PruningOutcome) -> None:
        key = IdempotencyKey.parse(outcome.idempotency_key)
        record = await self._bus.record(key)
        if record is None:
            raise UnknownDecision(
                "idempotency_key", "the key of a published decision", outcome.idempotency_key
            )
        decision, breakers = unwrap(read_envelope(record.envelope)), self._bus.breakers
        assert isinstance(decision, StructuralPruningDecision)
        for level in decision.taken:
            change = None
            if outcome.result == "rolled_back":
                reason = f"rolled back by the trainer: {outcome.detail}"
                change = await breakers.failure(outcome.run_id, level, reason, token=str(key))
            elif outcome.result == "applied":
                change = await breakers.success(outcome.run_id, level)
            await self._reports.transition(change)
        await self._bus.acknowledge(GROUP, self.worker_id, delivery)

    async def _note_failure(self, work: Work, delivery: Delivery, reason: str) -> None:
        for level in work.levels:
            change = await self._bus.breakers.failure(
                work.run_id, level, reason, token=f"{delivery.entry_id}:{work.keys[0]}"
            )
            await self._reports.transition(change)

    async def _bury(
        self, delivery: Delivery, error: ContractError, work: Work | None = None
    ) -> None:
        letter = self._reports.letter(delivery, error, work)
        if await self._bus.dead_letter(
            GROUP, self.worker_id, delivery, letter, onward(delivery.carrier)
        ):
            _log.warning(
                "dead letter",
                stream=delivery.stream.name,
                entry=delivery.entry_id,
                code=error.code,
                reason=str(error),
            )
            await self._reports.buried(letter, work)

    async def _keep_lease(self) -> None:
        """Renew the lease of what is held, four times a lease, whatever else goes on."""
        while True:
            await asyncio.sleep(self._settings.bus.lease_seconds / 4)
            held = self._held
            if held is None:
                continue
            with contextlib.suppress(BusUnavailable):
                if await self._bus.renew(GROUP, self.worker_id, [held]):
                    # Another worker has it now; our settle will be refused as LOST.
                    _log.warning("lease lost", entry=held.entry_id)


def _gap(decision: StructuralPruningDecision) -> str:
    """What kept levels out of an approved joint decision."""
    return "; ".join(f"{p.level}: {p.reason}" for p in decision.levels if p.verdict == "rejected")


def _conflict(key: IdempotencyKey, work: Work) -> Conflict:
    return Conflict(
        "idempotency_key",
        f"the content that {key} was decided for",
        f"content {work.fingerprint[:16]}",
        hint="give other content another key",
    )


async def serve(url: str, settings: Settings, worker_id: str = "") -> None:
    """Connect (waiting for the bus as long as it takes), serve until SIGTERM or SIGINT, drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    bus = await Bus.connect_when_available(url, settings.bus, settings.breaker, stop=stop)
    if bus is None:
        return
    try:
        worker = Worker(bus, settings, worker_id)
        async with auditing(bus, settings.audit):
            running = asyncio.create_task(worker.run())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            worker.drain()
            try:
                await asyncio.wait_for(running, settings.worker.drain_seconds)
            except TimeoutError:
                _log.warning("drain time over; what was begun is left for other workers")
    finally:
        await bus.close()
