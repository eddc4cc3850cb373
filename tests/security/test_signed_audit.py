"""With a keyring the audit log is signed: what was not written by an auditor is named."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from contracts import examples
from elesh.bus import Bus, audit_envelope
from elesh.observe import AuditFile, sound, verify
from elesh.security import new_key
from elesh.settings import BusSettings
from elesh.worker.telemetry.auditor import audit_links, extend_file, write_audit
from leyline import GENESIS, AuditEntry, encode, wrap
from leyline.streams import AUDIT, DECISIONS

T = TypeVar("T")
DECISION = examples.MESSAGES["StructuralPruningDecision"]


async def decide(bus: Bus, times: int = 1) -> None:
    for _ in range(times):
        await bus.publish(DECISIONS, DECISION, source="elesh")


async def proven(bus: Bus, signed_from: int = 1) -> tuple[list[str], str]:
    head = await bus.audit.head()
    links = [link async for link in audit_links(bus)]
    faults = verify(links, number=head.number, digest=head.digest, signed_from=signed_from)
    found = [str(fault) for fault in faults]
    return found + ([head.doubt] if head.doubt else []), sound(links, faults)


async def rewrite(bus: Bus, after: int) -> None:
    """Replace the entries after the one of this number by others, as who has no key can."""
    number, digest = 0, GENESIS
    key = AUDIT.key(bus.partition)
    for delivery in await bus.read(AUDIT):
        [link] = [x async for x in audit_links(bus) if x.place.endswith(delivery.entry_id)]
        assert link.entry is not None
        if link.entry.number <= after:
            number, digest = link.entry.number, link.entry.digest
            continue
        await bus._client.xdel(key, delivery.entry_id)
        event = link.entry.event.model_copy(update={"actor": "somebody-else"})
        entry = AuditEntry(number=number + 1, previous=digest, event=event)
        number, digest = entry.number, entry.digest
        await bus._client.xadd(key, {"envelope": encode(audit_envelope(entry))})
    await bus._client.hset(f"{key}:head", mapping={"number": number, "digest": digest})


def test_entries_hold_whose_key_was_valid_when_they_were_written(
    redis_url: str, partition: str, tmp_path: Path
) -> None:
    old, new = (new_key("hmac-sha256", name) for name in ("old", "new"))

    def as_auditor(keys: dict[str, Any], scenario: Callable[[Bus], Awaitable[T]]) -> T:
        file = tmp_path / "ring.yaml"
        file.write_text(yaml.safe_dump(keys))

        async def connected() -> T:
            settings = BusSettings(partition=partition, security={"keyring": str(file)})
            bus = await Bus.connect(redis_url, settings)
            try:
                return await scenario(bus)
            finally:
                await bus.close()

        return asyncio.run(connected())

    async def record(bus: Bus) -> datetime:
        await decide(bus)
        await write_audit(bus)
        newest = [link.entry async for link in audit_links(bus)][-1]
        assert newest is not None
        return newest.event.at

    def rotated(until: datetime) -> dict[str, Any]:
        return {"sign_with": "new", "keys": [old | {"not_after": until}, new]}

    before = as_auditor({"sign_with": "old", "keys": [old]}, record)
    as_auditor({"sign_with": "old", "keys": [old]}, record)
    as_auditor({"sign_with": "new", "keys": [old, new]}, record)
    after = datetime.now(UTC)
    assert as_auditor(rotated(after), proven) == ([], "1 to 3")
    faults, trusted = as_auditor(rotated(before), proven)
    assert len(faults) == 1, "written by a key that was no longer valid"
    assert trusted == "1, 3"


def test_a_genuine_log_holds(signed):
    async def scenario(bus: Bus) -> None:
        await decide(bus, 3)
        await write_audit(bus)
        await decide(bus, 2)
        await write_audit(bus)
        assert await proven(bus) == ([], "1 to 5")

    signed(scenario)


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_tail_that_was_rewritten_without_a_key_is_refused_from_its_place_on(signed, after):
    async def scenario(bus: Bus) -> None:
        await decide(bus, 5)
        await write_audit(bus)
        await rewrite(bus, after)
        faults, trusted = await proven(bus)
        assert sum("is not an auditor's" in fault for fault in faults) == 5 - after
        assert "another" in faults[-1] or "not as it was" in faults[-1], "the chain's end"
        assert trusted == {0: "", 2: "1 to 2", 4: "1 to 4"}[after]

    signed(scenario)


def test_an_auditor_goes_on_with_a_changed_log_and_writes_that_down(signed, tmp_path: Path):
    async def scenario(bus: Bus) -> None:
        await decide(bus, 3)
        await write_audit(bus, tmp_path / "audit.jsonl")
        await decide(bus, 2)
        await write_audit(bus)
        await rewrite(bus, 3)
        await decide(bus)
        await write_audit(bus)
        links = [link async for link in audit_links(bus)]
        assert [link.entry.event.action for link in links if link.entry][5:] == [
            "audit_head_changed",
            "approved",
        ]
        faults, trusted = await proven(bus)
        assert len(faults) == 2
        assert trusted == "1 to 3, 6 to 7"
        with pytest.raises(ValueError, match="signature"):
            await extend_file(bus, AuditFile(tmp_path / "audit.jsonl"))

    signed(scenario)


def test_a_log_that_began_without_a_keyring_is_vouched_for_from_where_that_is_said(signed):
    async def before(bus: Bus) -> None:
        await decide(bus, 2)
        await write_audit(bus)

    async def after(bus: Bus) -> None:
        await decide(bus)
        await write_audit(bus)
        faults, trusted = await proven(bus)
        assert len(faults) == 2
        assert trusted == "3 to 6", "the change, the two that nobody signed, and the signed one"
        assert await proven(bus, signed_from=3) == ([], "1 to 6")

    async def unread(bus: Bus) -> None:
        await decide(bus, 2)

    signed(before, keyring=False)
    signed(unread, keyring=False)
    signed(after)


def test_decisions_that_nobody_may_make_are_recorded_as_such_and_not_as_approved(signed):
    async def scenario(bus: Bus) -> None:
        plain = encode(wrap(DECISION, source="elesh"))
        key = DECISIONS.key(bus.partition)
        await bus._client.xadd(key, {"envelope": plain})
        moved = bus.guard.frame(AUDIT, plain)
        await bus._client.xadd(key, {"envelope": moved})
        other = encode(wrap(DECISION, source="elesh", run_id="another"))
        await bus._client.xadd(key, {"envelope": bus.guard.frame(DECISIONS, other)})
        await decide(bus)
        await write_audit(bus)
        events = [link.entry.event async for link in audit_links(bus) if link.entry]
        assert [event.kind for event in events] == ["decision"] * 4
        actions = [event.action for event in events]
        assert actions == ["unsigned", "bad_signature", "identity_mismatch", "approved"]
        assert [event.actor for event in events[:3]] == ["unknown"] * 3

    signed(scenario)
