"""Commands of one turn share a trip; each is answered, fails and is given up for itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from bus_messages import GROUP, claim, publish, result
from servers import Server

from elesh.bus import Bus, BusRefuses, BusUnavailable, CommitOutcome
from elesh.bus.server.client import open_client
from elesh.settings import BusSettings


def test_results_that_are_committed_side_by_side_need_one_connection(tmp_path: Path) -> None:
    """Each with its own fence and record: two of them are for one key, one is not ours any more."""
    server = Server(tmp_path).start()

    async def scenario() -> None:
        bus = await Bus.connect(server.url, BusSettings())
        await asyncio.gather(*(publish(bus, number) for number in range(20)))
        deliveries = await claim(bus, count=20)
        await bus.acknowledge(GROUP, "w1", deliveries[19])
        results = [result(min(number, 17)) for number in range(20)]
        committed = await asyncio.gather(
            *(
                bus.commit(GROUP, "w1", delivery, committing)
                for delivery, committing in zip(deliveries, results, strict=True)
            )
        )
        expected = [CommitOutcome.COMMITTED] * 18 + [CommitOutcome.DUPLICATE, CommitOutcome.LOST]
        assert committed == expected
        assert len(await bus._client.client_list()) == 1
        await bus.close()

    try:
        asyncio.run(scenario())
    finally:
        server.kill()


def test_a_command_that_fails_leaves_its_neighbours_alone(redis_url: str, partition: str) -> None:
    async def scenario() -> None:
        async with open_client(redis_url) as client:
            await client.set(f"{partition}:text", "x")
            await client.hset(f"{partition}:map", "a", "1")
            answers = await asyncio.gather(
                client.hgetall(f"{partition}:map"),
                client.hgetall(f"{partition}:text"),
                client.hmget(f"{partition}:map", ["a"]),
                return_exceptions=True,
            )
            assert answers[::2] == [{b"a": b"1"}, [b"1"]]
            assert isinstance(answers[1], BusRefuses)
            assert "WRONGTYPE" in str(answers[1])

    asyncio.run(scenario())


def test_a_task_that_is_cancelled_takes_no_answer_from_the_others(
    redis_url: str, partition: str
) -> None:
    async def scenario() -> None:
        async with open_client(redis_url) as client:
            for number in range(3):
                await client.hset(f"{partition}:{number}", "number", str(number))
            asking = [
                asyncio.ensure_future(client.hgetall(f"{partition}:{number}"))
                for number in range(3)
            ]
            await asyncio.sleep(0)  # all have asked
            asking[1].cancel()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert answers[::2] == [{b"number": b"0"}, {b"number": b"2"}]
            assert isinstance(answers[1], asyncio.CancelledError)
            assert await client.hgetall(f"{partition}:1") == {b"number": b"1"}

    asyncio.run(scenario())


def test_a_server_that_dies_is_unavailable_to_all_that_were_on_the_way(tmp_path: Path) -> None:
    server = Server(tmp_path).start()

    async def scenario() -> None:
        async with open_client(server.url) as client:
            await client.hgetall("before")
            server.freeze()
            asking = [asyncio.ensure_future(client.hgetall("during")) for _ in range(3)]
            await asyncio.sleep(0)  # all have asked
            assert server.process is not None
            server.process.kill()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(answer) for answer in answers] == [BusUnavailable] * 3
            with pytest.raises(BusUnavailable):
                await client.hgetall("after")

    asyncio.run(scenario())
