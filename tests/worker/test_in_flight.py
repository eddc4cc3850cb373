"""Several entries in hand: what goes side by side, what waits for what, and what is given back.

The worker runs in this process, on the real server, with a child that answers when it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import layer_networks
import pytest
from station import Station, checkpoint, ready, send

from elesh import analyze
from elesh.bus import Bus
from elesh.bus.admission import Work, admit, hear
from elesh.settings import Settings
from elesh.worker import Worker
from elesh.worker import leases as keyed_locks
from elesh.worker.compute.process import ComputeChild
from elesh.worker.compute.protocol import Job, Reply
from elesh.worker.fan_out import FanOut
from elesh.worker.leases import Busy, InFlightLimit, KeyedLocks
from elesh.worker.result_handler import ResultHandler
from elesh.worker.telemetry.reports import Reports
from leyline import (
    CheckpointBundle,
    Level,
    PruningOutcome,
    TelemetryEvent,
    encode,
    read_envelope,
    unwrap,
)
from leyline.streams import CHECKPOINTS, OUTCOMES, TELEMETRY, WORKERS

DECISION = analyze(checkpoint(), settings=Settings())


class Child:
    """Answers what it is asked, once :attr:`free` is set."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.began: list[str] = []
        self._busy = False

    async def run(self, job: Job, *, timeout: float) -> Reply:
        assert not self._busy, "the child takes one at a time"
        self._busy = True
        self.began.append(job.key)
        try:
            await self.free.wait()
        finally:
            self._busy = False
        return Reply(encode(DECISION.model_copy(update={"idempotency_key": job.key})))


class Hall:
    """A partition with workers in this process."""

    def __init__(self, station: Station) -> None:
        self.settings = Settings.load(station.settings_file(bus={"lease_seconds": 30.0}))
        self.url = station.url
        self.workers: list[Worker] = []
        self.children: list[Child] = []

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Bus]:
        self.bus = await Bus.connect(self.url, self.settings.bus)
        running: list[asyncio.Task[None]] = []
        self.running = running
        try:
            yield self.bus
        finally:
            for worker, child in zip(self.workers, self.children, strict=True):
                child.free.set()
                worker.drain()
            await asyncio.gather(*running)
            await self.bus.close()

    def worker(self, *, light: bool) -> Child:
        """A worker, and its child; ``light``: analyses have been quick so far."""
        worker, child = Worker(self.bus, self.settings, f"w{len(self.workers) + 1}"), Child()
        worker._executor.child.run = child.run  # type: ignore[method-assign]
        if light:
            with worker._executor.in_flight_limit.analysing():
                pass
        self.workers.append(worker)
        self.children.append(child)
        self.running.append(asyncio.create_task(worker.run()))
        return child

    async def publish(self, *bundles: CheckpointBundle) -> list[str]:
        """Publish checkpoints; the keys of their decisions."""
        for bundle in bundles:
            await send(self.bus, CHECKPOINTS, await ready(self.bus, bundle))
        return [str(bundle.key(bundle.levels[0])) for bundle in bundles]

    async def telemetry(self, step: str = "") -> list[TelemetryEvent]:
        read = [unwrap(read_envelope(d.envelope)) for d in await self.bus.read(TELEMETRY)]
        return [e for e in read if isinstance(e, TelemetryEvent) and step in ("", e.step)]

    async def told(self, step: str, count: int) -> list[TelemetryEvent]:
        """The first ``count`` events of a step, waited for."""
        return await eventually(lambda: self._enough(step, count))

    async def begun(self, child: Child, count: int) -> None:
        """Wait until the child has begun so many analyses."""

        async def enough() -> bool:
            await self.bus.ping()
            return len(child.began) >= count

        await eventually(enough)
        assert len(child.began) == count

    async def _enough(self, step: str, count: int) -> list[TelemetryEvent]:
        found = await self.telemetry(step)
        return found if len(found) >= count else []


async def eventually(what: Callable[[], Awaitable[Any]]) -> Any:
    """The first true answer; each asks the server, so that the others have their turn."""
    async with asyncio.timeout(60):
        while not (found := await what()):
            pass
        return found


def of_run(name: str, number: int) -> CheckpointBundle:
    made = checkpoint(number=number)
    return replace(made, metadata=made.metadata.model_copy(update={"run_id": name}))


@pytest.fixture(autouse=True)
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started: the fake answers."""

    async def nothing(_: ComputeChild) -> None:
        return None

    async def forever(_: ComputeChild) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(ComputeChild, "start", nothing)
    monkeypatch.setattr(ComputeChild, "keep", forever)


def test_checkpoints_of_other_runs_are_fetched_while_one_is_analysed(station: Station) -> None:
    hall = Hall(station)

    async def scenario() -> None:
        async with hall.open():
            keys = await hall.publish(*(of_run(f"run-{n}", n) for n in range(5)))
            child = hall.worker(light=True)
            await hall.told("fetched", 5)
            await hall.begun(child, 1)
            child.free.set()
            committed = await hall.told("settled", 5)
            assert sorted(event.idempotency_key for event in committed) == sorted(keys)
            assert sorted(child.began) == sorted(keys)

    asyncio.run(scenario())


def test_checkpoints_of_one_run_are_served_in_their_order(station: Station) -> None:
    hall = Hall(station)

    async def scenario() -> None:
        async with hall.open():
            keys = await hall.publish(*(of_run("run", n) for n in range(4)))
            child = hall.worker(light=True)
            child.free.set()
            await hall.told("settled", 4)
            assert child.began == keys
            steps = [event.step for event in await hall.telemetry()]
            assert steps == ["received", "fetched", "analysed", "settled"] * 4

    asyncio.run(scenario())


def test_a_checkpoint_and_its_parts_do_not_share_their_folder(station: Station) -> None:
    """Two workers have taken it: the one makes parts of it while the other decides it at once."""
    hall = Hall(station)
    bundle = replace(layer_networks.network(), levels=(Level.CHANNEL, Level.LAYER))

    async def scenario() -> None:
        async with hall.open() as bus:
            await hall.publish(bundle, bundle)
            (delivery,) = await bus.groups.claim(
                WORKERS, "other", (CHECKPOINTS,), count=1, block_seconds=1
            )
            child = hall.worker(light=True)
            worker, users = hall.workers[0], list[int]()
            fetched = worker._executor._fetched

            @contextlib.asynccontextmanager
            async def watched(*args: Any, **keywords: Any) -> AsyncIterator[Any]:
                async with fetched(*args, **keywords) as folder:
                    users.append(worker._executor._used[folder])
                    yield folder

            worker._executor._fetched = watched  # type: ignore[method-assign]
            await hall.begun(child, 1)
            heard = hear(delivery, bus.guard)
            work = admit(heard, window=60, now=await bus.clock.now(), redriven=None)
            assert isinstance(work, Work)
            reports = Reports(bus, "other")
            handler = ResultHandler(bus, hall.settings, "other", reports)
            other = FanOut(bus, hall.settings, "other", worker._executor, handler, reports)
            assert await other.plan(delivery, work)

            async def taken() -> bool:
                await bus.ping()
                return len(worker._in_flight) == 3

            await eventually(taken)
            for _ in range(50):  # So long, they could have fetched what they need.
                await bus.ping()
            child.free.set()
            await hall.told("stored", 2)
            assert users == [1, 1, 1]

    asyncio.run(scenario())


def test_a_worker_whose_analyses_take_long_has_one_in_hand(station: Station) -> None:
    hall = Hall(station)

    async def scenario() -> None:
        async with hall.open() as bus:
            await hall.publish(*(of_run(f"run-{n}", n) for n in range(3)))
            hall.worker(light=False)
            await hall.told("fetched", 1)
            other = hall.worker(light=False)
            other.free.set()
            await hall.told("settled", 2)
            pending = await bus.pending(WORKERS, CHECKPOINTS)
            assert (pending.pending, pending.waiting) == (1, 0)
            assert not await hall.telemetry("handed_over")

    asyncio.run(scenario())


def test_outcomes_are_heard_while_a_long_analysis_is_under_way(station: Station) -> None:
    hall = Hall(station)

    async def scenario() -> None:
        async with hall.open() as bus:
            (first,) = await hall.publish(of_run("run", 1))
            child = hall.worker(light=True)
            child.free.set()
            await hall.told("settled", 1)
            child.free.clear()
            await hall.publish(of_run("run", 2))
            await hall.told("fetched", 2)
            values = {"idempotency_key": first, "run_id": "run", "epoch": 60, "result": "applied"}
            await send(bus, OUTCOMES, PruningOutcome.model_validate(values))
            status = hall.workers[0]._status

            async def heard() -> bool:
                await bus.ping()
                return sum(status.outcomes.values()) == 1

            await eventually(heard)
            assert len(await hall.telemetry("settled")) == 1, "the analysis still goes on"

    asyncio.run(scenario())


def test_what_waits_behind_a_long_analysis_is_left_to_a_free_worker(station: Station) -> None:
    hall = Hall(station)

    async def scenario() -> None:
        async with hall.open():
            keys = await hall.publish(of_run("run-1", 1), of_run("run-2", 2))
            child = hall.worker(light=True)
            await hall.told("handed_over", 1)
            (begun,) = child.began  # Of two runs either may be fetched first.
            (waiting,) = (key for key in keys if key != begun)
            other = hall.worker(light=True)
            other.free.set()
            (committed,) = await hall.told("settled", 1)
            assert (committed.worker_id, committed.idempotency_key) == ("w2", waiting)
            received = await hall.telemetry("received")
            assert {event.figures["deliveries"] for event in received} == {1.0}, "none counts"

    asyncio.run(scenario())


def test_a_drain_ends_what_was_begun_and_hands_over_the_rest(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed_locks, "PATIENCE_SECONDS", 60.0)
    hall = Hall(station)

    async def scenario() -> None:
        async with hall.open():
            await hall.publish(*(of_run(f"run-{n}", n) for n in range(3)))
            child = hall.worker(light=True)
            await hall.told("fetched", 3)
            await hall.begun(child, 1)
            hall.workers[0].drain()
            other = hall.worker(light=False)
            other.free.set()
            committed = await hall.told("settled", 2)  # nothing waits for the thirty seconds
            assert {event.worker_id for event in committed} == {"w2"}
            child.free.set()
            committed = await hall.told("settled", 3)
            assert (committed[2].worker_id, committed[2].idempotency_key) == ("w1", child.began[0])
            received = await hall.telemetry("received")
            assert {event.figures["deliveries"] for event in received} == {1.0}
            assert len(await hall.telemetry("handed_over")) == 2

    asyncio.run(scenario())


def test_one_key_is_not_analysed_twice_at_once(station: Station) -> None:
    hall = Hall(station)

    async def scenario() -> None:
        async with hall.open():
            keys = await hall.publish(*[of_run("run", 1)] * 3)
            child = hall.worker(light=True)
            child.free.set()
            await hall.told("duplicate", 2)
            assert child.began == keys[:1]
            assert not await hall.telemetry("retried")

    asyncio.run(scenario())


def test_a_lost_lease_ends_the_one_analysis_only(station: Station) -> None:
    hall = Hall(station)

    async def scenario() -> None:
        async with hall.open():
            keys = await hall.publish(of_run("run-1", 1), of_run("run-2", 2))
            child = hall.worker(light=True)
            await hall.told("fetched", 2)
            await hall.begun(child, 1)
            (worker,) = hall.workers
            lost = child.began[0]  # Of two runs either may be fetched first.
            (other,) = (key for key in keys if key != lost)
            (first,) = (held for held in worker._in_flight if held.key == lost)
            worker._lost(first.delivery)
            child.free.set()
            (committed,) = await hall.told("settled", 1)
            assert committed.idempotency_key == other
            assert child.began == [lost, other]

    asyncio.run(scenario())


def test_tasks_of_one_key_come_in_order_and_others_do_not_wait() -> None:
    came: list[str] = []

    async def take(order: KeyedLocks, name: str, number: int) -> None:
        async with order.of(name):
            came.append(f"{name}{number}")
            await asyncio.sleep(0)

    async def scenario() -> None:
        order = KeyedLocks(lambda: False)
        async with order.of("a"):
            waiting = [asyncio.create_task(take(order, "a", n)) for n in range(3)]
            await take(order, "b", 0)
        await asyncio.gather(*waiting)

    asyncio.run(scenario())
    assert came == ["b0", "a0", "a1", "a2"]


def test_only_who_waits_for_a_long_analysis_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed_locks, "PATIENCE_SECONDS", 0.01)
    long, came = True, []

    async def take(order: KeyedLocks) -> None:
        async with order.of("a"):
            came.append(1)

    async def scenario() -> None:
        nonlocal long
        order = KeyedLocks(lambda: long)
        async with order.of("a"):
            with pytest.raises(Busy, match="more than"):
                await take(order)
            long = False
            waiting = asyncio.create_task(take(order))
            await asyncio.wait({waiting}, timeout=0.1)
            assert not waiting.done()
        await waiting

    asyncio.run(scenario())
    assert came == [1]


def test_a_lock_that_is_waited_for_no_more_is_free() -> None:
    async def scenario() -> None:
        order = KeyedLocks(lambda: False)

        async def take() -> None:
            async with order.of("a"):
                pass

        for late in (False, True):
            async with order.of("a"):
                waiting = asyncio.create_task(take())
                await asyncio.wait({waiting}, timeout=0.01)
                if not late:
                    waiting.cancel()
            waiting.cancel()  # late: the turn has come to it, and it has not heard of it
            await asyncio.wait({waiting})
            async with asyncio.timeout(5):
                await take()

    asyncio.run(scenario())


def test_a_worker_has_as_much_in_hand_as_a_quarter_of_a_second_takes() -> None:
    now = 0.0
    in_flight_limit = InFlightLimit(32, clock=lambda: now)
    assert in_flight_limit.entries == 1, "nothing is known yet"

    def analyse(seconds: float) -> None:
        nonlocal now
        with in_flight_limit.analysing():
            now += seconds

    analyse(0.025)
    assert in_flight_limit.entries == 10
    for _ in range(60):
        analyse(0.001)
    assert in_flight_limit.entries == 32
    analyse(20.0)
    assert in_flight_limit.entries == 1
    with in_flight_limit.analysing():
        now += 0.2
        assert not in_flight_limit.long
        now += 0.1
        assert in_flight_limit.long
    assert not in_flight_limit.long
