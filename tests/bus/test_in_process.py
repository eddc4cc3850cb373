"""The bus against fakeredis, in this process: the same scripts without any server.

Only the plain path: fakeredis is no oracle for leases, blocking or durability.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from bus_messages import outcome
from fakeredis import FakeAsyncRedis

from elesh.bus import Bus, Commit, CommitOutcome
from elesh.settings import BusSettings
from leyline import IdempotencyKey, Level, read_envelope, unwrap
from leyline.streams import DECISIONS, OUTCOMES


def test_publish_claim_and_commit_work_on_a_server_of_pure_python():
    async def scenario() -> tuple[Any, ...]:
        bus = Bus(cast(Any, FakeAsyncRedis()), BusSettings())
        await bus.publish(OUTCOMES, outcome(), source="test", event_id="once")
        await bus.publish(OUTCOMES, outcome(), source="test", event_id="once")
        (delivery,) = await bus.groups.claim("g", "c", (OUTCOMES,), count=5, block_seconds=0)
        key = IdempotencyKey(1, "0" * 16, "ck-1", Level.CHANNEL)
        result = Commit(key, "f" * 64, outcome(), {})
        committed = await bus.commit("g", "c", delivery, result)
        again = await bus.groups.claim("g", "c", (OUTCOMES,), count=5, block_seconds=0)
        return committed, again, await bus.read(DECISIONS)

    committed, again, published = asyncio.run(scenario())
    assert committed is CommitOutcome.COMMITTED
    assert again == []
    assert [unwrap(read_envelope(d.envelope)) for d in published] == [outcome()]


def test_blobs_come_back_whole_from_a_server_of_pure_python():
    async def scenario() -> bytes:
        bus = Bus(cast(Any, FakeAsyncRedis()), BusSettings())
        return await bus.blobs.get(await bus.blobs.put(b"x" * 5_000_000))

    assert asyncio.run(scenario()) == b"x" * 5_000_000


@pytest.mark.parametrize("failures", [2, 3])
def test_a_breaker_opens_at_the_third_failure_on_a_server_of_pure_python(failures):
    async def scenario() -> str:
        bus = Bus(cast(Any, FakeAsyncRedis()), BusSettings())
        for number in range(failures):
            await bus.breakers.failure("run", Level.CHANNEL, "test", token=str(number))
        return (await bus.breakers.view("run", Level.CHANNEL)).state

    assert asyncio.run(scenario()) == ("open" if failures == 3 else "closed")
