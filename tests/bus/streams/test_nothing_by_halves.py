"""A script that the server refuses half way leaves nothing that counts twice or goes missing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from bus_messages import GROUP, TRACE, claim, end_lease, key, outcome, publish, reap, result
from redis import Redis

from elesh.bus import Bus, BusRefuses, CommitOutcome, Plan, Planned
from elesh.observe import verify
from elesh.settings import BusSettings
from elesh.worker.telemetry.auditor import audit_links, write_audit
from leyline import AnalysisItem, Level
from leyline.streams import AUDIT, DECISIONS, OUTCOMES, REDELIVERIES, WORK, Stream

KEY = str(key(1, Level.JOINT))
PART = AnalysisItem(plan=KEY, level=Level.CHANNEL)
PLAN = Plan(KEY, "one", b"", TRACE, (PART.name,), "outcomes/1-0")
Scenario = Callable[[Bus], Awaitable[None]]


class Withheld:
    """A user of whom rights are taken, and keys that hold something else for a while."""

    def __init__(self, url: str, partition: str) -> None:
        self._admin, self._name, self._partition = Redis.from_url(url), f"u-{partition}", partition
        server = url.rpartition("@")[2].removeprefix("redis://")
        self.url = f"redis://{self._name}:secret@{server}"
        self.give()

    def take(self, *commands: str) -> None:
        self._admin.execute_command("ACL SETUSER", self._name, *(f"-{name}" for name in commands))

    def give(self) -> None:
        self._admin.execute_command(
            "ACL SETUSER", self._name, "on", ">secret", "~*", "+@all", "-@dangerous", "+info"
        )

    def spoil(self, stream: Stream) -> None:
        self._admin.set(stream.key(self._partition), "no stream")

    def mend(self, stream: Stream) -> None:
        self._admin.delete(stream.key(self._partition))

    def close(self) -> None:
        self._admin.execute_command("ACL DELUSER", self._name)
        self._admin.close()


@pytest.fixture
def withheld(redis_url: str, partition: str) -> Iterator[Withheld]:
    made = Withheld(redis_url, partition)
    yield made
    made.close()


@pytest.fixture
def run(withheld: Withheld, partition: str) -> Callable[[Scenario], Any]:
    async def connected(scenario: Scenario) -> None:
        bus = await Bus.connect(withheld.url, BusSettings(partition=partition))
        try:
            await scenario(bus)
        finally:
            await bus.close()

    return lambda scenario: asyncio.run(connected(scenario))


async def refused(call: Callable[[], Awaitable[Any]], code: str) -> None:
    for _ in range(3):
        with pytest.raises(BusRefuses) as error:
            await call()
        assert error.value.code == code


def test_a_publish_that_cannot_be_remembered_is_not_there_and_later_there_once(run, withheld):
    async def scenario(bus: Bus) -> None:
        def again() -> Awaitable[str]:
            return bus.publish(OUTCOMES, outcome(1), source="test", event_id="one")

        withheld.take("set")
        await refused(again, "NOPERM")
        assert await bus.read(OUTCOMES) == []
        withheld.give()
        assert await again() == await again()
        assert len(await bus.read(OUTCOMES)) == 1

    run(scenario)


def test_a_decision_that_cannot_be_published_has_no_record_and_later_both_are_there(run, withheld):
    async def scenario(bus: Bus) -> None:
        (delivery,) = await published(bus)

        def commit() -> Awaitable[CommitOutcome]:
            return bus.commit(GROUP, "w1", delivery, result(1))

        withheld.spoil(DECISIONS)
        await refused(commit, "WRONGTYPE")
        assert await bus.record(key(1)) is None
        withheld.mend(DECISIONS)
        assert await commit() is CommitOutcome.COMMITTED
        assert len(await bus.read(DECISIONS)) == 1
        assert await bus.record(key(1)) is not None

    run(scenario)


@pytest.mark.parametrize("right", ["xack", "hset", "xadd", "expire"])
def test_a_decision_is_published_once_whatever_right_is_missing_for_a_while(run, withheld, right):
    async def scenario(bus: Bus) -> None:
        (delivery,) = await published(bus)

        def commit() -> Awaitable[CommitOutcome]:
            return bus.commit(GROUP, "w1", delivery, result(1))

        withheld.take(right)
        await refused(commit, "NOPERM")
        withheld.give()
        await commit()
        assert len(await bus.read(DECISIONS)) == 1
        assert await bus.record(key(1)) is not None
        assert (await bus.pending(GROUP, OUTCOMES)).pending == 0

    run(scenario)


def test_what_cannot_be_acknowledged_does_not_go_round_again_until_it_can(run, withheld):
    async def scenario(bus: Bus) -> None:
        (delivery,) = await published(bus)
        withheld.take("xack")
        await refused(lambda: bus.groups.requeue(GROUP, "w1", delivery), "NOPERM")
        await end_lease(bus, delivery)
        await refused(lambda: reap(bus), "NOPERM")
        assert await bus.read(REDELIVERIES) == []
        withheld.give()
        await reap(bus)
        assert len(await bus.read(REDELIVERIES)) == 1

    run(scenario)


def test_a_plan_whose_parts_cannot_be_queued_is_none_and_later_has_them(run, withheld):
    async def scenario(bus: Bus) -> None:
        (delivery,) = await published(bus)

        def plan() -> Awaitable[Planned]:
            made = replace(PLAN, envelope=delivery.envelope)
            return bus.plans.plan(GROUP, "w1", delivery, made, [PART], window_seconds=60)

        withheld.spoil(WORK)
        await refused(plan, "WRONGTYPE")
        withheld.mend(WORK)
        assert await plan() is Planned.PLANNED
        assert len(await bus.read(WORK)) == 1

    run(scenario)


def test_a_join_that_cannot_be_queued_is_queued_later(run, withheld):
    async def scenario(bus: Bus) -> None:
        (delivery,) = await published(bus)
        made = replace(PLAN, envelope=delivery.envelope)
        await bus.plans.plan(GROUP, "w1", delivery, made, [PART], window_seconds=0)
        withheld.mend(WORK)
        withheld.spoil(WORK)
        await refused(lambda: bus.plans.join_overdue(KEY), "WRONGTYPE")
        withheld.mend(WORK)
        assert KEY in (await reap(bus)).overdue
        assert len(await bus.read(WORK)) == 1
        assert not await bus.plans.join_overdue(KEY)

    run(scenario)


async def published(bus: Bus) -> list[Any]:
    await publish(bus, 1)
    return await claim(bus)


@pytest.mark.parametrize("way", ["another type", "no right to the head", "no right to append"])
def test_what_the_audit_log_cannot_take_is_in_it_later_and_once(run, withheld, way):
    async def scenario(bus: Bus) -> None:
        await published(bus)
        if way == "another type":
            withheld.spoil(AUDIT)
            await refused(lambda: write_audit(bus), "WRONGTYPE")
            withheld.mend(AUDIT)
        else:
            withheld.take("hset" if "head" in way else "xadd")
            await refused(lambda: write_audit(bus), "NOPERM")
            withheld.give()
        assert await write_audit(bus) == 1
        links = [link async for link in audit_links(bus)]
        head = await bus.audit.head()
        assert (len(links), head.number) == (1, 1)
        assert verify(links, number=head.number, digest=head.digest) == []

    run(scenario)


def test_a_script_that_is_forgotten_again_and_again_runs_all_the_same(run):
    async def scenario(bus: Bus) -> None:
        texts = bus._scripts._texts
        for name, (text, _) in texts.items():
            texts[name] = text, "0" * 40  # as if somebody flushed the scripts before every call
        (delivery,) = await published(bus)
        assert await bus.commit(GROUP, "w1", delivery, result(1)) is CommitOutcome.COMMITTED

    run(scenario)
