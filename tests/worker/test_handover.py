"""Leases through drains, stalls and deaths: run once, given back in time, counted by cause."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from servers import Server
from station import Station, checkpoint, faulty, ready

from elesh.bus import Bus, read_dead_letter
from elesh.settings import Settings
from elesh.worker import Worker
from elesh.worker.telemetry.monitor import FleetFigures
from leyline import EventEnvelope, encode, wrap
from leyline.streams import CHECKPOINTS, DEAD

HOLD = float(os.environ.get("ELESH_TEST_HOLD_SECONDS", "10"))
LEASE = float(os.environ.get("ELESH_TEST_LEASE_SECONDS", "0.5"))


@pytest.mark.timeout(HOLD * 3 + 900)
@pytest.mark.slow
def test_a_child_that_holds_the_interpreter_lock_through_a_drain_runs_once(
    station: Station,
) -> None:
    """Twenty leases long, half of them after SIGTERM.

    In full: ``ELESH_TEST_HOLD_SECONDS=60 ELESH_TEST_LEASE_SECONDS=2``.
    """
    holding = faulty(
        station, f"hold:{HOLD}", "always",
        bus={"lease_seconds": LEASE}, worker={"drain_seconds": 2 * HOLD + 30},
    )  # fmt: skip
    station.publish(checkpoint())
    station.wait_for(lambda: station.telemetry("fetched"), "the analysis to begin")
    begun = time.monotonic()
    station.worker(bus={"lease_seconds": LEASE})
    while time.monotonic() < begun + HOLD / 2:
        station.publish(checkpoint(number=2 + len(station.decisions())))
        station.wait_for(lambda: station.telemetry("settled"), "the other worker to be at work")
        if HOLD > 10:
            time.sleep(1)
    holding.process.terminate()
    if time.monotonic() > begun + HOLD - 6 * LEASE:
        pytest.skip("too slow a machine to show anything")
    assert holding.process.wait(2 * HOLD + 60) == 0
    first = str(checkpoint().key(checkpoint().levels[0]))
    committed = [e.worker_id for e in station.telemetry("settled") if e.idempotency_key == first]
    fetched = [e.worker_id for e in station.telemetry("fetched") if e.idempotency_key == first]
    assert (committed, fetched) == (["w1"], ["w1"])
    assert not station.telemetry("lost")
    assert not station.telemetry("reclaimed")
    assert time.monotonic() - begun > HOLD


@pytest.mark.slow
def test_a_kill_is_counted_as_a_crash_and_taken_over_within_a_lease(station: Station) -> None:
    first = station.worker(bus={"lease_seconds": 2.0})
    station.worker(bus={"lease_seconds": 2.0})
    for worker in station.workers:
        worker.child.suspend()
    station.publish(checkpoint())
    (fetched,) = station.wait_for(lambda: station.telemetry("fetched"), "the analysis to begin")
    holder, other = first, station.workers[1]
    if fetched.worker_id != first.name:
        holder, other = other, holder
    holder.process.kill()
    killed = time.monotonic()
    other.child.resume()
    station.wait_decisions(1)
    took = time.monotonic() - killed
    assert took < 60.0, "a lease of two seconds, a reaping pass, and much room; else five minutes"
    (reclaimed,) = station.telemetry("reclaimed")
    assert f"crash: of {holder.name}" in reclaimed.detail
    assert [event.figures["deliveries"] for event in station.telemetry("received")] == [1.0, 2.0]


@pytest.mark.slow
def test_a_drain_that_takes_too_long_hands_over_what_was_begun(station: Station) -> None:
    first = station.worker(worker={"drain_seconds": 1.0}, bus={"lease_seconds": 30.0})
    first.child.suspend()
    station.publish(checkpoint())
    station.wait_for(lambda: station.telemetry("fetched"), "the analysis to begin")
    assert first.end(signal.SIGTERM) == 0
    station.worker(bus={"lease_seconds": 30.0})
    station.wait_decisions(1)
    assert {event.figures["deliveries"] for event in station.telemetry("received")} == {1.0}


@pytest.mark.slow
def test_a_drained_worker_leaves_no_consumer_behind(station: Station) -> None:
    worker = station.worker()
    station.publish(checkpoint())
    station.wait_decisions(1)
    assert worker.end() == 0
    with Redis.from_url(station.url) as redis:
        consumers: Any = redis.xinfo_consumers(CHECKPOINTS.key(station.partition), "elesh-workers")
    assert consumers == []


@pytest.mark.slow
def test_an_idle_fleet_sends_at_most_two_commands_a_second_for_each_worker(
    tmp_path: Path,
) -> None:
    """On a server that nobody else uses, so that every command counts, keyless ones, too.

    Greetings of new connections are over once each worker has written its heartbeat again.
    """
    server = Server(tmp_path / "server").start()
    station = Station(server.url, "idle", tmp_path)
    heartbeat, seconds, sent = 5.0, 6.0, []
    try:
        for _ in range(2):
            station.worker(bus={"lease_seconds": 15.0})
        with server.client() as redis, redis.monitor() as monitor:
            begins = time.monotonic() + heartbeat
            while (now := time.monotonic()) < begins + seconds:
                command = monitor.next_command()
                if now > begins and command["client_type"] != "lua":  # those come from scripts
                    sent.append(command["command"])
    finally:
        for worker in station.workers:
            worker.end()
        server.kill()
    assert 0 < len(sent) <= 2 * 2 * seconds, "\n".join(sent)


def test_our_own_failure_goes_round_again_after_a_pause_and_is_counted_apart(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, so that the supervisor itself can fail: twice, then it works."""
    settings = Settings.load(station.settings_file(bus={"lease_seconds": 2.0}))
    monkeypatch.setattr("elesh.worker.supervisor._RETRY_SECONDS", 0.1)
    fails = iter([True, True])

    async def scenario() -> None:
        bus = await Bus.connect(station.url, settings.bus)
        worker = Worker(bus, settings, "w1")
        decide = worker._executor.decide

        async def failing(work: Any) -> Any:
            if next(fails, False):
                raise RuntimeError("ours")
            return await decide(work)

        monkeypatch.setattr(worker._executor, "decide", failing)
        running = asyncio.create_task(worker.run())
        await asyncio.to_thread(station.publish, checkpoint())
        await asyncio.to_thread(station.wait_decisions, 1)
        worker.drain()
        await running
        await bus.close()

    asyncio.run(scenario())
    assert [event.figures["deliveries"] for event in station.telemetry("received")] == [1, 2, 3]
    details = [event.detail for event in station.telemetry("retried")]
    assert len(details) == 2
    assert all("exception: RuntimeError: ours" in detail for detail in details)


def test_a_checkpoint_after_its_time_is_a_named_dead_letter_that_can_be_redriven(
    station: Station,
) -> None:
    worker = station.worker()

    async def publish_late(bus: Bus) -> EventEnvelope:
        event = await ready(bus, checkpoint())
        envelope = wrap(event, source="test", now=datetime.now(UTC) - timedelta(hours=1))
        key = CHECKPOINTS.key(bus.partition)
        await bus._client.xadd(key, {"envelope": encode(envelope)})
        return envelope

    station.on_bus(publish_late)
    (dead,) = station.wait_for(lambda: station.read(DEAD), "the dead letter")
    dead_letter = read_dead_letter(dead)
    assert dead_letter.error_code == "expired"
    assert "redrive it if its decision still matters" in dead_letter.reason
    assert not station.telemetry("fetched"), "it is not analysed"
    station.on_bus(lambda bus: bus.dead_letters.redrive(dead.entry_id, "jo", "still wanted"))
    (decision,) = station.wait_decisions(1)
    assert decision.approved_for_application, worker.log


def test_what_was_shed_is_a_gauge_by_stream_and_priority() -> None:
    figures = FleetFigures(shed={"checkpoints:low": 3, "requests:normal": 1})
    assert figures.of_shed() == [
        (3, {"stream": "checkpoints", "priority": "low"}),
        (1, {"stream": "requests", "priority": "normal"}),
    ]
