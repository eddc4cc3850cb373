"""The supervisor: claim, admit, run, commit.

Several entries may be in flight at once, each in a task of its own; the compute child takes one
analysis after the other. How many it is worth to have in flight, and who waits for whom, is in
:mod:`.leases`.

Promises: every entry that a worker claims ends committed, as a duplicate, or as a dead letter with
its original bytes and the reason, or it goes round again for another worker; one decision for each
key; leases are renewed while the child computes and while draining; SIGTERM finishes what was begun
and releases what was not; a bus that is away or refuses is waited for, however long; nothing that
a server answers ends a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import signal
import socket
import time
from dataclasses import dataclass, field

from opentelemetry.trace import SpanKind, get_current_span

from elesh._process import is_alive
from elesh.bus import Backoff, Bus, BusUnavailable, Delivery, WorkerState, cancelled, repeatedly
from elesh.bus.admission import Work, admit, hear
from elesh.observe import SparseLines, get_logger, mark_failed, messaging, span
from elesh.settings import Settings
from elesh.worker.telemetry.auditor import auditing
from elesh.worker.telemetry.monitor import Monitor
from elesh.worker.telemetry.reports import Reports, record_receipts
from leyline import AnalysisItem, AnalysisRequest, ContractError, JoinItem, PruningOutcome
from leyline.streams import (
    CHECKPOINTS,
    DECISIONS,
    OUTCOMES,
    REDELIVERIES,
    REQUESTS,
    WORK,
    WORKERS,
    Stream,
)

from .executor import AnalysisExecutor
from .fan_out import FanOut
from .leases import LONG_SECONDS, Busy, Leases, ReapingLoop
from .parameter_executor import ParameterExecutor, parameter_key
from .result_handler import ResultHandler
from .spool import shortage_of, spool

GROUP = WORKERS
STREAMS = (REDELIVERIES, WORK, OUTCOMES, REQUESTS, CHECKPOINTS)
"""What was begun goes before what is new; outcomes and new work take turns."""
_BLOCK_SECONDS = 5.0
_MANY = 16
"""Outcomes that are taken at once beside a long analysis."""
AT_ONCE_BYTES = 64 << 20
"""Of blobs: all levels of a smaller checkpoint are decided in one analysis, which takes seconds; of
a larger one, each level is a part that any worker of the fleet takes."""
_BEGIN_SECONDS = 1.0
"""What has not begun so long after SIGTERM is released."""
_PROBE_SECONDS = 1.0
"""Between looks for trainers' outcomes while a long analysis is under way."""
_RETRY_SECONDS, _LONGEST_RETRY = 1.0, 60.0
_OUTCOMES_OF = "outcomes of "
"""Of a run: the lock that its outcomes share."""
_log = get_logger(__name__)
_lines = SparseLines(_log)


def worker_name() -> str:
    """A name that no other worker has: host and eight random digits."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


@dataclass(eq=False)
class _InFlight:
    """An entry that is being served."""

    delivery: Delivery
    key: str = ""
    """Of the decision that it belongs to, once it is admitted."""
    task: asyncio.Task[None] = field(init=False)


class Worker:
    """One worker of the fleet: serves entries until :meth:`drain` is called."""

    def __init__(self, bus: Bus, settings: Settings, worker_id: str = "") -> None:
        self.worker_id = worker_id or worker_name()
        self._bus = bus
        self._settings = settings
        self._reports = Reports(bus, self.worker_id)
        self._keeping = contextlib.ExitStack()
        self._spool = self._keeping.enter_context(spool())
        self._executor = AnalysisExecutor(bus, settings, self._reports, self._spool)
        self._draining = asyncio.Event()
        self._result_handler = ResultHandler(
            bus, settings, self.worker_id, self._reports, self._draining
        )
        self._fan_out = FanOut(
            bus,
            settings,
            self.worker_id,
            self._executor,
            self._result_handler,
            self._reports,
            self._draining,
        )
        self._parameters = ParameterExecutor(
            bus, settings, self.worker_id, self._executor, self._spool
        )
        self._leases = Leases(bus, self.worker_id, STREAMS, self._lost)
        self._reaping = ReapingLoop(bus, self.worker_id, STREAMS, self._reports)
        self._status = self._reports.status
        self._monitor = Monitor(bus, settings.observe, self._status, self._executor.child.probe)
        self._in_flight: set[_InFlight] = set()
        self._moved = asyncio.Event()
        self._order = self._executor.keyed_locks
        self._claiming, self._serving = (Backoff(bus.outage, self._draining) for _ in range(2))
        self._short = Backoff(stop=self._draining)
        self._turn = 0

    def drain(self) -> None:
        """Claim nothing new, finish what was begun, release what was not, then end."""
        self._status.draining()
        self._draining.set()
        self._moved.set()

    async def run(self) -> None:
        """Serve until drained; report health and telemetry meanwhile."""
        async with self._monitor.running(), self._reports.telemetry_buffer.open():
            beside = [
                asyncio.create_task(keeping)
                for keeping in (
                    self._leases.keep(),
                    repeatedly("reaping", self._reaping.step, self._bus.outage),
                )
            ]
            try:
                await self._executor.start()
                self._status.serving()
                _log.info("serving", worker=self.worker_id, group=GROUP)
                while not self._draining.is_set():
                    await self._take()
                await self._finish()
            finally:
                await cancelled(*(held.task for held in self._in_flight))
                await self._leave()
                await cancelled(*beside)
                self._keeping.close()
            _log.info("drained", worker=self.worker_id)

    async def _take(self) -> None:
        """Take what there is room for, or wait until there is."""
        self._moved.clear()
        capacity = self._executor.in_flight_limit.entries - len(self._in_flight)
        try:
            if (seconds := self._status.lacks_until - time.monotonic()) > 0:
                await self._until_moved(seconds)
            elif self._executor.in_flight_limit.long:
                # Nothing that needs the child, which others may have free.
                await self._claim((OUTCOMES,), _MANY, 0)
                await self._until_moved(_PROBE_SECONDS)
            elif capacity > len(self._in_flight):
                # In order of preference; those of new work take turns.
                self._turn = (self._turn + 1) % 3
                new = STREAMS[2:]
                streams = (*STREAMS[:2], *new[self._turn :], *new[: self._turn])
                await self._claim(streams, capacity, _BLOCK_SECONDS)
            else:
                await self._until_moved(LONG_SECONDS)
            self._claiming.served()
        except BusUnavailable as error:
            await self._claiming.pause(error)
        except Exception as error:
            _lines.warning("claiming failed", reason=f"{type(error).__name__}: {error}")
            await self._claiming.pause(error)

    async def _claim(self, streams: tuple[Stream, ...], count: int, seconds: float) -> None:
        """Claim up to ``count`` entries and begin to serve them; wait for the first so long."""
        begun = time.time_ns()
        claiming = asyncio.create_task(self._leases.claim(streams, count, seconds))
        drain = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({claiming, drain}, return_when=asyncio.FIRST_COMPLETED)
            # Entries that arrive after draining began are released when this worker leaves.
            found = claiming.result() if claiming.done() else []
        finally:
            await cancelled(claiming, drain)
        record_receipts(found, begun, self._bus.clock.latest(), self._bus.server)
        for held in map(_InFlight, found):
            self._in_flight.add(held)
            held.task = asyncio.create_task(self._serve(held))

    async def _until_moved(self, seconds: float) -> None:
        """Wait until an entry ends or draining begins, at most so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._moved.wait(), seconds)

    async def _finish(self) -> None:
        """End what was begun; what has not begun within a second is released."""
        if tasks := [held.task for held in self._in_flight]:
            await asyncio.wait(tasks, timeout=_BEGIN_SECONDS)
        for held in list(self._in_flight):
            if not self._executor.begun(held.key):
                await cancelled(held.task)
                with contextlib.suppress(BusUnavailable):
                    await self._release(held.delivery, "draining", "drained before it began")
        await asyncio.gather(*(held.task for held in self._in_flight), return_exceptions=True)

    async def _release(self, delivery: Delivery, why: str, detail: str) -> None:
        if await self._leases.release(delivery, detail):
            stream, entry = delivery.origin
            self._reports.entry("handed_over", stream, entry, "handover", why)

    def _lost(self, delivery: Delivery) -> None:
        """Stop the analysis of an entry whose lease another worker has taken over.

        Only while it is waiting or being analysed: afterwards this worker has ended it itself.
        """
        for held in self._in_flight:
            computing = self._executor.begun(held.key) or self._executor.waits(held.key)
            if held.delivery is delivery and computing:
                _log.warning("lease lost", entry="/".join(delivery.origin))
                held.task.cancel()

    async def _leave(self) -> None:
        """End the child, release whatever is still pending here, leave the group."""
        await self._executor.stop()
        with contextlib.suppress(BusUnavailable):
            if given := await self._leases.leave():
                _log.warning("entries released", worker=self.worker_id, entries=given)
                for _ in range(given):
                    self._status.redelivered("handover")

    async def _serve(self, held: _InFlight) -> None:
        """One entry from its claim to its end, whatever that is."""
        delivery = held.delivery
        try:
            await self._traced(held)
            self._serving.served()
        except BusUnavailable as error:
            if await self._serving.pause(error):
                # The work is lost, but nobody has to wait for the lease to run out.
                with contextlib.suppress(BusUnavailable):
                    await self._leases.release(delivery, "the bus could not serve")
        except Exception:
            _log.exception("entry failed, its lease runs out", entry="/".join(delivery.origin))
        finally:
            self._status.ended(delivery.origin)
            self._leases.drop(delivery)
            self._in_flight.discard(held)
            self._moved.set()

    async def _traced(self, held: _InFlight) -> None:
        delivery = held.delivery
        name, entry_id = delivery.origin
        attributes = messaging(
            "process", name, entry_id=entry_id, group=GROUP, server=self._bus.server
        ) | {
            "elesh.deliveries": delivery.deliveries,
            "elesh.crashes": delivery.history.crashes,
            "elesh.exceptions": delivery.history.exceptions,
            "elesh.handovers": delivery.history.handovers,
        }
        with span(
            f"process {name}",
            kind=SpanKind.CONSUMER,
            carrier=delivery.carrier,
            attributes=attributes,
            redelivered=delivery.deliveries > 1 or delivery.redriven is not None,
        ):
            try:
                await self._admit_run_commit(held)
            except ContractError as error:
                await self._result_handler.dead_letter(delivery, error)
            except BusUnavailable:
                raise
            except Busy as busy:
                await self._release(delivery, "busy", str(busy))
            except Exception as error:
                mark_failed(type(error).__qualname__, str(error))
                if lacking := shortage_of(error):
                    await self._lack(delivery, lacking)
                    return
                # The fault is ours, not the message's: it is delivered again, a few times at most.
                _log.exception("entry goes round again", entry=f"{name}/{entry_id}")
                await self._retry(delivery, error)

    async def _admit_run_commit(self, held: _InFlight) -> None:
        """Serve one entry. A run's checkpoints are served in their order, after the outcomes that
        came before them; entries of one key, one at a time."""
        delivery = held.delivery
        heard = hear(delivery, self._bus.guard)
        now, window = await self._bus.clock.now(), self._settings.window_seconds
        asked = admit(heard, window=window, now=now, redriven=delivery.redriven)
        # The key of its decision, and the lock that it takes first: its run's, that of the run's
        # outcomes, or the key's.
        match asked:
            case Work():
                held.key, lock = str(asked.key), f"run {asked.run_id}"
            case AnalysisItem() | JoinItem():
                held.key = lock = asked.plan
            case AnalysisRequest():
                held.key = lock = str(parameter_key(asked))
            case PruningOutcome():
                held.key, lock = asked.idempotency_key, _OUTCOMES_OF + asked.run_id
        self._status.began(held.key, delivery.origin)
        level = getattr(asked, "level", "")
        levels = asked.document.levels if isinstance(asked, Work) else (level,)
        get_current_span().set_attributes(
            {"elesh.key": held.key, "elesh.levels": ",".join(map(str, levels))}
        )
        async with self._order.of(lock):
            match asked:
                case Work():
                    async with self._order.of(_OUTCOMES_OF + asked.run_id):
                        pass
                    async with self._order.of(held.key):  # That of its parts.
                        await self._decide(delivery, asked)
                case AnalysisItem():
                    await self._fan_out.analyse(delivery, asked)
                case JoinItem():
                    await self._fan_out.join(delivery, asked)
                case AnalysisRequest():
                    self._result_handler.refuse_poison(delivery)
                    await self._parameters.serve(delivery, asked)
                case PruningOutcome():
                    self._result_handler.refuse_poison(delivery)
                    await self._result_handler.record_outcome(
                        delivery, asked, heard.envelope.event_id
                    )

    async def _decide(self, delivery: Delivery, work: Work) -> None:
        self._result_handler.refuse_poison(delivery)
        self._reports.step("received", work, figures={"deliveries": delivery.deliveries})
        try:
            if await self._result_handler.is_decided(delivery, work):
                return
            apart = await self._goes_in_parts(delivery, work)
            if apart and await self._fan_out.plan(delivery, work):
                return
            try:
                decision = await self._executor.decide(work)
            except ContractError as error:
                # What keeps one level from being analysed does not keep the others.
                if not await self._fan_out.plan(delivery, work, why=str(error)):
                    raise
                _log.warning("levels are analysed apart", key=str(work.key), reason=str(error))
                return
        except ContractError as error:
            await self._result_handler.fail(delivery, work, error)
            return
        self._short.served()
        self._status.lacks, self._status.lacks_until = "", 0.0
        await self._result_handler.commit(delivery, work, decision)

    async def _goes_in_parts(self, delivery: Delivery, work: Work) -> bool:
        """Whether a checkpoint is not decided at once: it is large; a worker ended with it, and as
        parts, the level that was the cause leaves the others alone; or it has parts already."""
        large = sum(blob.size for blob in work.blobs.values()) > AT_ONCE_BYTES
        again = delivery.deliveries > 1
        return large or again or await self._bus.plans.is_planned(str(work.key))

    async def _lack(self, delivery: Delivery, lacking: str) -> None:
        """Release an entry that this worker lacks resources for, and claim nothing for a while."""
        pause = self._short.next_pause()
        self._status.lacks, self._status.lacks_until = lacking, time.monotonic() + pause
        _lines.warning("this worker lacks resources, entries wait", reason=lacking)
        if await self._leases.release(delivery, f"no room there: {lacking}", pause):
            stream, entry = delivery.origin
            self._reports.entry("handed_over", stream, entry, "handover", lacking)

    async def _retry(self, delivery: Delivery, error: Exception) -> None:
        """Send an entry round again after a pause that doubles each time."""
        pause = _RETRY_SECONDS * 2 ** min(delivery.history.exceptions, 10)
        pause = min(pause, _LONGEST_RETRY) * random.uniform(0.5, 1.0)
        reason = f"{type(error).__name__}: {error}"
        if await self._leases.retry(delivery, reason, pause):
            stream, entry = delivery.origin
            self._reports.entry("retried", stream, entry, "exception", reason)


async def serve(url: str, settings: Settings, worker_id: str = "") -> None:
    """Connect (waiting for the bus as long as it takes), serve until SIGTERM, SIGINT or SIGHUP,
    drain.

    Raises:
        BadAddress: if ``url`` names no bus.
        Unsigned, BadSignature, NotAuthorized: if nobody would believe this worker's decisions.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and shells' background
            loop.add_signal_handler(number, stop.set)
    bus = await Bus.connect_when_available(url, settings.bus, settings.breaker, stop=stop)
    if bus is None:
        return
    try:
        bus.guard.require_believed(DECISIONS, WORK)
        name = await _own_name(bus, worker_id or worker_name(), settings, stop)
        if name:
            await _serve_on(bus, settings, name, stop)
    finally:
        await bus.close()


async def _serve_on(bus: Bus, settings: Settings, name: str, stop: asyncio.Event) -> None:
    worker = Worker(bus, settings, name)
    async with auditing(bus, settings.audit):
        await _warn_of_eviction(bus)
        running = asyncio.create_task(worker.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        worker.drain()
        await asyncio.wait({running}, timeout=settings.worker.drain_seconds)
        if not running.done():
            _log.warning("drain time over, unfinished entries are released")
            await cancelled(running)
        elif not running.cancelled() and (error := running.exception()):
            raise error


async def _own_name(bus: Bus, name: str, settings: Settings, stop: asyncio.Event) -> str:
    """The name, or one like it if a living worker has it; empty if ``stop`` comes first."""
    seconds = 3 * settings.observe.heartbeat_seconds
    state = WorkerState(worker_id=name, host=socket.gethostname(), pid=os.getpid())
    registry = bus.registry
    taken = await bus.persistently(lambda: registry.heartbeat(state, seconds=seconds), stop=stop)
    if taken is None:
        return name
    if taken.host == state.host and not is_alive(taken.pid):
        await registry.take_over(state, seconds=seconds)  # it was killed
        return name
    own, other = f"{name}-{secrets.token_hex(2)}", f"{taken.host}:{taken.pid}"
    _log.warning("worker name is taken by a living worker", name=name, other=other, own=own)
    return own


async def _warn_of_eviction(bus: Bus) -> None:
    with contextlib.suppress(BusUnavailable):
        if warning := await bus.eviction():
            _log.warning("the server may evict what Elesh keeps", reason=warning)
