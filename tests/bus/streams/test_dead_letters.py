"""Dead letters: redriven once with their original bytes, dropped only with an audit event."""

from __future__ import annotations

import asyncio

import pytest
from bus_messages import GROUP, TRACE, claim, dead_letter, outcome, publish

from elesh.bus import Bus, DeadLetterEntry
from leyline import InvalidField, OperatorAction, encode, read_envelope, unwrap, wrap
from leyline.streams import DEAD, OPERATIONS, OUTCOMES


async def dead_lettered(bus: Bus, *epochs: int) -> list[DeadLetterEntry]:
    await publish(bus, *epochs)
    for _ in epochs:
        (delivery,) = await claim(bus)
        assert await bus.dead_letter(GROUP, "w1", delivery, dead_letter(delivery), TRACE)
    return await bus.dead_letters.all()


async def actions(bus: Bus) -> list[OperatorAction]:
    found = [unwrap(read_envelope(entry.envelope)) for entry in await bus.read(OPERATIONS)]
    assert all(isinstance(action, OperatorAction) for action in found)
    return found  # type: ignore[return-value]


def test_a_redriven_dead_letter_is_its_original_again_with_bytes_and_trace(with_bus):
    async def scenario(bus: Bus) -> None:
        (dead,) = await dead_lettered(bus, 7)
        (original,) = await bus.read(OUTCOMES)
        where = await bus.dead_letters.redrive(dead.entry_id, "jo@here", "mended")
        again = (await bus.read(OUTCOMES))[-1]
        assert (where.stream, where.entry_id, where.again) == ("outcomes", again.entry_id, True)
        assert again.original == original.original
        assert again.redriven is not None, "its time to live counts from now"
        assert again.carrier == TRACE
        (taken,) = await claim(bus)
        assert (taken.entry_id, taken.deliveries) == (again.entry_id, 1)
        (action,) = await actions(bus)
        assert (action.action, action.subject) == ("redrive", dead.entry_id)
        assert (action.operator, action.reason) == ("jo@here", "mended")

    with_bus(scenario)


def test_a_dead_letter_is_redriven_once_however_many_ask_at_once(with_bus):
    async def scenario(bus: Bus) -> None:
        (dead,) = await dead_lettered(bus, 1)
        asked = (bus.dead_letters.redrive(dead.entry_id, f"jo-{n}") for n in range(8))
        answers = await asyncio.gather(*asked)
        assert len({answer.entry_id for answer in answers}) == 1
        assert sum(answer.again for answer in answers) == 1
        assert len(await bus.read(OUTCOMES)) == 2
        assert len(await actions(bus)) == 1
        assert (await bus.dead_letters.get(dead.entry_id)).redriven_as == answers[0].entry_id

    with_bus(scenario)


def test_a_dropped_dead_letter_is_gone_and_the_audit_stream_says_who_did_it(with_bus):
    async def scenario(bus: Bus) -> None:
        first, second = await dead_lettered(bus, 1, 2)
        await bus.dead_letters.drop(first.entry_id, "jo@here", "sent by mistake")
        assert [dead.entry_id for dead in await bus.dead_letters.all()] == [second.entry_id]
        (action,) = await actions(bus)
        assert (action.action, action.operator) == ("drop", "jo@here")
        assert "outcomes/" in action.outcome
        with pytest.raises(InvalidField, match="elesh dead list"):
            await bus.dead_letters.drop(first.entry_id, "jo@here")
        assert len(await actions(bus)) == 1

    with_bus(scenario)


@pytest.mark.parametrize("wrong", ["", "-", "12", "1-1; FLUSHALL", "9999999999999-0"])
def test_a_dead_letter_that_is_none_is_named(with_bus, wrong):
    async def scenario(bus: Bus) -> None:
        await dead_lettered(bus, 1)
        for action in (bus.dead_letters.get, lambda text: bus.dead_letters.redrive(text, "jo")):
            with pytest.raises(InvalidField, match="letter"):
                await action(wrong)
        assert len(await bus.read(OUTCOMES)) == 1

    with_bus(scenario)


def test_what_is_no_dead_letter_is_listed_and_can_only_be_dropped(with_bus):
    async def scenario(bus: Bus) -> None:
        await bus._client.xadd(
            DEAD.key(bus.partition), {"envelope": encode(wrap(outcome(), source="x"))}
        )
        (dead,) = await bus.dead_letters.all()
        assert dead.message is None
        assert "DeadLetter" in dead.error
        with pytest.raises(InvalidField, match="readable"):
            await bus.dead_letters.redrive(dead.entry_id, "jo")
        await bus.dead_letters.drop(dead.entry_id, "jo")
        assert await bus.dead_letters.all() == []

    with_bus(scenario)
