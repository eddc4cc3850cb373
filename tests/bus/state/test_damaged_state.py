"""What stands on the bus and is damaged is told, passed over or replaced; it holds up nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from bus_messages import GROUP, STREAMS, claim, key, publish, result
from redis.exceptions import RedisError

from elesh.bus import Bus, BusUnavailable, CommitOutcome, WorkerState
from leyline import ContractError, Level, RolledBackCut
from leyline.streams import AUDIT, OUTCOMES

JUNK = (b"\xff\xfe x", b"", b"x" * 70, b"-1e999", b"nan")


async def everything(bus: Bus) -> Any:
    """Something of every kind that is kept; the reference of a blob."""
    ref = await bus.blobs.put(b"x" * 100)
    await publish(bus, 1)
    (delivery,) = await claim(bus)
    assert await bus.commit(GROUP, "w1", delivery, result(1)) is CommitOutcome.COMMITTED
    await bus.record_outcome(key(1), "event")
    await bus.breakers.trip("run", Level.CHANNEL, "by hand")
    await bus.registry.heartbeat(WorkerState(worker_id="w1", host="h", pid=1), seconds=60)
    await bus.runs.claim("run", "token", "who", 60)
    await bus.runs.attempt("run", "token", "who")
    cut = RolledBackCut(idempotency_key=str(key(1)), epoch=1, units=())
    await bus.runs.took_back("run", {"cut": cut})
    await bus.history(8, 1 << 20).remember("run", 1, b"measured")
    await bus.reaper.reap(GROUP, "w1", STREAMS)
    await publish(bus, 2)
    (delivery,) = await claim(bus)
    await bus.groups.requeue(GROUP, "w1", delivery, cause="exception", delay_seconds=600)
    await bus._client.hset(bus.keys.named("shed"), "outcomes:low", 1)
    await bus._client.hset(bus.keys.named("audit", "head"), "number", 1)
    return ref


async def damage(bus: Bus, junk: bytes) -> None:
    """Every value that is no stream; lives go on."""
    client = bus._client
    for name in await client.keys(f"elesh:{{{bus.partition}}}:*"):
        match await client.type(name):
            case b"hash":
                fields = dict.fromkeys(await client.hkeys(name), junk)
                await client.hset(name, mapping={**fields, b"\xff" + junk[:3]: junk})
            case b"string":
                await client.set(name, junk, keepttl=True)
            case b"zset":
                await client.zadd(name, {junk: 1})
            case b"set":
                await client.sadd(name, junk)


def readings(bus: Bus, ref: Any) -> dict[str, Callable[[], Awaitable[Any]]]:
    """All that reads what was damaged, or changes it."""
    runs, history = bus.runs, bus.history(8, 1 << 20)
    return {
        "blob": lambda: bus.blobs.get(ref),
        "record": lambda: bus.record(key(1)),
        "latest": lambda: bus.latest("run", Level.CHANNEL, before=9),
        "breakers": bus.breakers.show,
        "admit": lambda: bus.breakers.admit("run", Level.CHANNEL),
        "workers": bus.registry.workers,
        "backlog": bus.registry.backlog,
        "claim": lambda: runs.claim("run", "other", "who", 60),
        "attempt": lambda: runs.attempt("run", "token", "who"),
        "rolled back": lambda: runs.taken_back("run"),
        "calibration": lambda: runs.calibration_cuts("run"),
        "epochs": lambda: history.epochs("run"),
        "remember": lambda: history.remember("run", 2, b"measured"),
        "shed": bus.shed,
        "audit": bus.audit.head,
        "plan": lambda: bus.plans.load(str(key(1))),
        "trim": bus.trim,
        "reap": lambda: bus.reaper.reap(GROUP, "w1", STREAMS),
        "dead letters": lambda: bus.dead_letters.newest(9),
        "last": lambda: bus.follow(AUDIT, last_id="$", block_seconds=0),
    }


@pytest.mark.parametrize("junk", JUNK, ids=["bytes", "nothing", "long", "minus", "nan"])
def test_damaged_state_is_told_or_passed_over_and_the_next_message_is_decided(with_bus, junk):
    async def scenario(bus: Bus) -> None:
        ref = await everything(bus)
        await damage(bus, junk)
        for name, read in readings(bus, ref).items():
            try:
                await read()
            except ContractError:
                pass  # it is said what is wrong
            except (BusUnavailable, RedisError) as error:
                raise AssertionError(f"{name} waits for ever: {error}") from error
        # What was delayed, or stood in its place, goes on; the next one is decided.
        await publish(bus, 3)
        left = await claim(bus, count=9)
        (delivery,) = [each for each in left if each.stream is OUTCOMES]
        assert await bus.commit(GROUP, "w1", delivery, result(3)) is CommitOutcome.COMMITTED
        assert (await bus.record(key(3))) is not None

    with_bus(scenario)


def test_who_reaps_and_whose_a_run_is_for_ever_is_nobody_s_word(with_bus):
    async def scenario(bus: Bus) -> None:
        await bus._client.hset(bus.keys.named("reaper"), "holder", "somebody")
        await bus._client.hset(bus.keys.named("claim", "run"), "token", "somebody")
        assert (await bus.reaper.reap(GROUP, "w1", STREAMS)) is not None
        assert await bus._client.pttl(bus.keys.named("reaper")) > 0
        assert await bus.runs.claim("run", "mine", "who", 60) is None

    with_bus(scenario)
