"""The supervisor: claim, admit, run, settle.

Promises: every entry that a worker claims ends settled, as a duplicate, or as a dead letter with
its original bytes and the reason, or it goes round again for another worker; one decision for each
key; leases are renewed while the child computes and while draining; SIGTERM finishes what was begun
and hands over what was not; a bus that is away is waited for, with one line in the log.
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
import time
from collections import deque
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elesh.bus import Bus, BusUnavailable, Delivery
from elesh.observe import current_span, get_logger, messaging, span_from
from elesh.settings import Settings
from leyline import AnalysisItem, AnalysisRequest, ContractError, JoinItem, PruningOutcome
from leyline.streams import CHECKPOINTS, OUTCOMES, REDELIVERIES, REQUESTS, WORK, WORKERS, Stream

from .admission import Admitted, Work, admit
from .analysis import Analyst
from .auditor import auditing
from .fanout import FanOut
from .leases import Leases
from .monitor import Monitor
from .parameters import ParameterExecutor, parameter_key
from .receipts import record_receipts
from .reports import Reports
from .settlement import Clerk
from .shards import parts_of
from .sweeps import Sweeps

__all__ = ["GROUP", "STREAMS", "Worker", "serve"]

GROUP = WORKERS
STREAMS = (REDELIVERIES, WORK, OUTCOMES, REQUESTS, CHECKPOINTS)
"""What was begun goes before what is new; outcomes and new work take turns."""
_BLOCK_SECONDS = 5.0
_BEGIN_SECONDS = 1.0
"""What has not begun so long after SIGTERM is handed over."""
_RETRY_SECONDS, _LONGEST_RETRY = 1.0, 60.0
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
        self._clerk = Clerk(bus, settings, self.worker_id, self._reports)
        self._fan_out = FanOut(
            bus, settings, self.worker_id, self._analyst, self._clerk, self._reports
        )
        self._parameters = ParameterExecutor(
            bus, settings, self.worker_id, self._analyst, self._spool
        )
        self._leases = Leases(bus, self.worker_id, STREAMS, self._lost)
        self._sweeps = Sweeps(bus, self.worker_id, STREAMS, self._reports)
        self._status = self._reports.status
        self._monitor = Monitor(bus, settings.observe, self._status, self._analyst.look)
        self._draining = asyncio.Event()
        self._ready: deque[Delivery] = deque()
        self._serving: tuple[Delivery, asyncio.Task[None]] | None = None
        self._turn = 0

    def drain(self) -> None:
        """Claim nothing new, finish what was begun, hand over what was not, then end."""
        self._status.draining()
        self._draining.set()

    async def run(self) -> None:
        """Serve until drained, and say meanwhile how it goes."""
        async with self._monitor.running(), self._reports.outbox.open():
            await self._run()

    async def _run(self) -> None:
        beside = [
            asyncio.create_task(keeping) for keeping in (self._leases.keep(), self._sweeps.keep())
        ]
        try:
            await self._analyst.start()
            self._status.serving()
            _log.info("serving", worker=self.worker_id, group=GROUP)
            while not self._draining.is_set():
                await self._serve_next()
        finally:
            await self._leave()
            await _end(*beside)
            shutil.rmtree(self._spool, ignore_errors=True)
        _log.info("drained", worker=self.worker_id)

    async def _serve_next(self) -> None:
        delivery = None
        try:
            delivery = await self._next()
            if delivery is not None:
                await self._until_served(delivery)
        except BusUnavailable as error:
            _log.warning("bus away, waiting", reason=str(error))
            if await self._bus.when_available(stop=self._draining) and delivery is not None:
                # Its result is lost with the connection, but nobody has to wait for the lease.
                with contextlib.suppress(BusUnavailable):
                    await self._leases.hand_over(delivery, "the bus was away")
        finally:
            self._status.ended()
            if delivery is not None:
                self._leases.drop(delivery)

    async def _next(self) -> Delivery | None:
        """The next entry to serve; None after a while without any, or when draining begins."""
        if not self._ready:
            streams, prefetch = self._streams(), self._settings.worker.prefetch
            begun = time.time_ns()
            claiming = self._leases.claim(streams, prefetch, _BLOCK_SECONDS)
            found = await self._unless_draining(claiming) or []
            record_receipts(found, begun)
            self._ready.extend(found)
        if not self._ready or self._draining.is_set():
            return None
        return self._ready.popleft()

    def _streams(self) -> tuple[Stream, ...]:
        """The streams in order of preference: the new ones take turns."""
        self._turn = (self._turn + 1) % 3
        new = STREAMS[2:]
        return (*STREAMS[:2], *new[self._turn :], *new[: self._turn])

    async def _unless_draining(
        self, claiming: Coroutine[Any, Any, list[Delivery]]
    ) -> list[Delivery] | None:
        """What is claimed; None if draining begins first (what came meanwhile is handed over)."""
        task, drain = asyncio.create_task(claiming), asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({task, drain}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            await _end(task, drain)

    async def _until_served(self, delivery: Delivery) -> None:
        """Serve an entry, unless its lease is lost, or draining begins before the analysis does."""
        task = asyncio.create_task(self._serve(delivery))
        drain = asyncio.create_task(self._draining.wait())
        self._serving = delivery, task
        try:
            await asyncio.wait({task, drain}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self._hand_over_ready()
                await asyncio.wait({task}, timeout=_BEGIN_SECONDS)
            if task.done() or self._analyst.begun:
                await asyncio.wait({task})
                if not task.cancelled():
                    task.result()
        finally:
            self._serving = None
            await _end(task, drain)

    async def _hand_over_ready(self) -> None:
        """Give back what was claimed ahead."""
        while self._ready:
            await self._hand_over(self._ready.popleft())

    async def _hand_over(self, delivery: Delivery) -> None:
        if await self._leases.hand_over(delivery, "drained before it began"):
            stream, entry = delivery.origin
            self._reports.entry("handed_over", stream, entry, "handover", "draining")

    def _lost(self, delivery: Delivery) -> None:
        """What is computed for an entry that another worker has is in vain.

        Only then: an entry that is not ours any more after its analysis is one that we ended.
        """
        if self._serving is not None and self._serving[0] is delivery and self._analyst.begun:
            _log.warning("lease lost", entry="/".join(delivery.origin))
            self._serving[1].cancel()

    async def _leave(self) -> None:
        """End the child, hand over whatever is still pending here, leave the group."""
        await self._analyst.stop()
        with contextlib.suppress(BusUnavailable):
            if given := await self._leases.leave():
                _log.warning("handed over", worker=self.worker_id, entries=given)
                for _ in range(given):
                    self._status.redelivered("handover")

    async def _serve(self, delivery: Delivery) -> None:
        name, entry_id = delivery.origin
        attributes = messaging("process", name, entry_id=entry_id, group=GROUP) | {
            "elesh.deliveries": delivery.deliveries,
            "elesh.crashes": delivery.history.crashes,
            "elesh.exceptions": delivery.history.exceptions,
            "elesh.handovers": delivery.history.handovers,
        }
        with span_from(
            delivery.carrier,
            f"process {name}",
            attributes=attributes,
            redelivered=delivery.deliveries > 1 or delivery.redriven is not None,
        ):
            try:
                await self._admit_run_settle(delivery)
            except ContractError as error:
                await self._clerk.bury(delivery, error)
            except BusUnavailable:
                raise
            except Exception as error:
                # Ours, not the message's: it goes round again, and is poison after a few tries.
                _log.exception("entry goes round again", entry=f"{name}/{entry_id}")
                await self._retry(delivery, error)

    async def _admit_run_settle(self, delivery: Delivery) -> None:
        delivery.check(self._bus.guard)
        now, window = datetime.now(UTC), self._settings.window_seconds
        asked = admit(
            delivery.envelope,
            window=window,
            now=now,
            redriven=delivery.redriven,
            stream=delivery.published_on,
        )
        self._begin(delivery, asked)
        match asked:
            case Work():
                await self._decide(delivery, asked)
            case AnalysisItem():
                await self._fan_out.analyse(delivery, asked)
            case JoinItem():
                await self._fan_out.join(delivery, asked)
            case AnalysisRequest():
                self._clerk.refuse_poison(delivery)
                await self._parameters.serve(delivery, asked)
            case PruningOutcome():
                self._clerk.refuse_poison(delivery)
                await self._clerk.note(delivery, asked)

    def _begin(self, delivery: Delivery, asked: Admitted) -> None:
        """Say what is worked on, in status and span."""
        key = _key_of(asked)
        self._status.began(key, delivery.origin[0])
        current_span().set_attribute("elesh.key", key)

    async def _decide(self, delivery: Delivery, work: Work) -> None:
        self._clerk.refuse_poison(delivery)
        self._reports.step("received", work, figures={"deliveries": delivery.deliveries})
        try:
            if await self._clerk.is_decided(delivery, work):
                return
            if len(parts := parts_of(work, self._settings)) > 1:
                await self._fan_out.plan(delivery, work, parts)
                return
            decision = await self._analyst.decide(work)
        except ContractError as error:
            await self._clerk.fail(delivery, work, error)
            return
        await self._clerk.settle(delivery, work, decision)

    async def _retry(self, delivery: Delivery, error: Exception) -> None:
        """Send an entry round again after a pause that doubles each time."""
        pause = _RETRY_SECONDS * 2 ** min(delivery.history.exceptions, 10)
        pause = min(pause, _LONGEST_RETRY) * random.uniform(0.5, 1.0)
        reason = f"{type(error).__name__}: {error}"
        if await self._leases.retry(delivery, reason, pause):
            stream, entry = delivery.origin
            self._reports.entry("retried", stream, entry, "exception", reason)


def _key_of(asked: Admitted) -> str:
    """The key of the decision that something belongs to."""
    match asked:
        case Work():
            return str(asked.key)
        case AnalysisItem() | JoinItem():
            return asked.plan
        case AnalysisRequest():
            return str(parameter_key(asked))
        case PruningOutcome():
            return asked.idempotency_key


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what is not done, and wait for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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
                _log.warning("drain time over; what was begun is handed over")
    finally:
        await bus.close()
