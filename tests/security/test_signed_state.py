"""State that decisions are built from is signed for its place: forged or moved, it does nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from bus_messages import GROUP, TRACE, claim, key, publish, result

from contracts import examples
from elesh.bus import Bus, Plan, unframed
from leyline import (
    AnalysisItem,
    BadSignature,
    ContractError,
    IdentityMismatch,
    ItemResult,
    Level,
    RolledBackCut,
    Unsigned,
    encode,
)
from leyline.streams import WORK

CHANNEL = Level.CHANNEL
KEY = str(key(1, Level.JOINT))
ITEMS = [AnalysisItem(plan=KEY, level=level) for level in (Level.CHANNEL, Level.HEAD)]
PLAN = Plan(KEY, "one", b"", TRACE, tuple(item.name for item in ITEMS), "checkpoints/1-0")
CUT = RolledBackCut(idempotency_key=KEY, epoch=3, units=(("a", (1,)),), scores=(0.5,))


async def planned(bus: Bus) -> list[Any]:
    await publish(bus, 1)
    [delivery] = await claim(bus)
    await bus.plans.plan(GROUP, "w1", delivery, PLAN, ITEMS, window_seconds=60)
    return await claim(bus, count=9, streams=(WORK,))


def test_a_result_that_nobody_who_may_decide_has_written_is_refused(signed):
    async def scenario(bus: Bus) -> None:
        parts = await planned(bus)
        plan = await bus.plans.load(KEY)
        for part, item in zip(parts, ITEMS, strict=True):
            await bus.plans.store(GROUP, "w1", part, plan, item, ItemResult(failed=item.name))
        assert sorted(await bus.plans.results(plan)) == ["channel", "head"]
        name = bus.keys.named("results", KEY)
        genuine = await bus._client.hgetall(name)
        forged = {
            "unsigned": encode(ItemResult(failed="x")),
            "of another part": genuine[b"head"],
            "cut off": genuine[b"channel"][:12],
        }
        for what, value in forged.items():
            await bus._client.hset(name, "channel", value)
            with pytest.raises(ContractError):
                raise AssertionError(what, await bus.plans.results(plan))
        await bus._client.hset(name, "channel", genuine[b"channel"])
        await bus._client.hset(name, "another", b"what is no part is not looked at")
        assert sorted(await bus.plans.results(plan)) == ["channel", "head"]

    signed(scenario)


def test_a_plan_that_was_changed_or_moved_is_refused(signed):
    async def scenario(bus: Bus) -> None:
        await planned(bus)
        name = bus.keys.named("plan", KEY)
        plan = await bus.plans.load(KEY)
        assert (plan.items, plan.fingerprint) == (PLAN.items, "one")
        stored = await bus._client.hgetall(name)
        facts = msgpack.unpackb(unframed(stored[b"facts"]))
        fewer = msgpack.packb([*facts[:2], ["channel"], *facts[3:]])
        await bus._client.hset(name, "facts", fewer)
        with pytest.raises(Unsigned):
            await bus.plans.load(KEY)
        other = str(key(2, Level.JOINT))
        await bus._client.hset(bus.keys.named("plan", other), mapping=stored)
        with pytest.raises(BadSignature):
            await bus.plans.load(other)

    signed(scenario)


def test_a_record_of_another_key_or_without_a_signature_is_refused(signed):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1, 2)
        for number, delivery in enumerate(await claim(bus, count=2), 1):
            await bus.commit(GROUP, "w1", delivery, result(number))
        one, two = (bus.keys.named("record", str(key(number))) for number in (1, 2))
        assert await bus.record(key(1)) is not None
        envelope = await bus._client.hget(two, "envelope")
        await bus._client.hset(one, "envelope", envelope)
        with pytest.raises(IdentityMismatch):
            await bus.record(key(1))
        await bus._client.hset(one, "envelope", unframed(envelope))
        with pytest.raises(Unsigned):
            await bus.record(key(1))

    signed(scenario)


def test_an_outcome_that_nobody_took_in_is_not_said_to_be_and_a_forged_pointer_leads_nowhere(
    signed,
):
    async def scenario(bus: Bus) -> None:
        await publish(bus, 1)
        [delivery] = await claim(bus)
        made = replace(result(1), remember=True)
        await bus.commit(GROUP, "w1", delivery, made)
        await bus.record_outcome(key(1), "genuine")
        name = bus.keys.named("record", str(key(1)))
        genuine = await bus._client.hget(name, "outcome:genuine")
        await bus._client.hset(name, "outcome:forged", "1")
        await bus._client.hset(name, "outcome:moved", genuine)
        await bus._client.hset(name, b"outcome:\xff", "1")
        record = await bus.record(key(1))
        assert record is not None
        assert record.outcomes == {"genuine"}
        assert await bus.latest("run", CHANNEL, before=9) is not None
        pointer = bus.keys.named("latest", "run", CHANNEL)
        for forged in ({"key": "nonsense"}, {"epoch": "x"}, {"key": b"\xff"}):
            await bus._client.hset(pointer, mapping=forged)
            assert await bus.latest("run", CHANNEL, before=9) is None

    signed(scenario)


def test_forged_cuts_calibration_and_histories_count_as_absent(signed):
    async def scenario(bus: Bus) -> None:
        would_be = examples.MESSAGES["StructuralPruningDecision"].would_be
        await bus.runs.took_back("run", {"f": CUT})
        await bus.runs.measured_calibration_probe("run", KEY, would_be)
        store = bus.history(10, 10**6)
        assert await store.remember("run", 3, b"measured") == "kept"
        assert await store.remember("run", 3, b"measured") == "known"
        assert await bus.runs.taken_back("run") == [CUT]
        cuts, probes, past = (
            bus.keys.named(name, "run") for name in ("rolled-back", "would-be", "history")
        )
        genuine = await bus._client.hget(cuts, "f")
        await bus._client.hset(cuts, "forged", encode(CUT))
        await bus._client.hset(cuts, "moved", genuine)
        await bus._client.hset(probes, "forged", msgpack.packb([b"x"]))
        await bus._client.hset(past, "4", b"forged")
        await bus._client.hset(past, "5", await bus._client.hget(past, "3"))
        assert await bus.runs.taken_back("run") == [CUT]
        assert await bus.runs.calibration_cuts("run") == list(would_be)
        assert await store.recall("run", [3, 4, 5]) == {3: b"measured"}
        other = bus.keys.named("rolled-back", "other")
        await bus._client.hset(other, "f", genuine)
        assert await bus.runs.taken_back("other") == []

    signed(scenario)


def test_a_breaker_whose_state_is_forged_is_open_until_an_operator_resets_it(signed):
    async def scenario(bus: Bus) -> None:
        name = bus.keys.named("breaker", "run", "channel")
        for _ in range(3):
            await bus.breakers.failure("run", CHANNEL, "boom")
        genuine = await bus._client.hget(name, "signed")
        assert (await bus.breakers.view("run", CHANNEL)).state == "open"
        closed = msgpack.packb(["closed", 0, "", 0, 0, []])
        for forged in (closed, b"\xc1", b"nonsense", genuine[:-1] + b"\x00"):
            await bus._client.hset(name, "signed", forged)
            view = await bus.breakers.view("run", CHANNEL)
            assert (view.state, view.admitted) == ("open", False)
            assert "not to be believed" in view.reason
        moved = bus.keys.named("breaker", "other", "channel")
        await bus._client.hset(moved, "signed", genuine)
        assert "not to be believed" in (await bus.breakers.view("other", CHANNEL)).reason
        await bus.breakers.reset("run", CHANNEL)
        assert (await bus.breakers.admit("run", CHANNEL)).admitted

    signed(scenario)
