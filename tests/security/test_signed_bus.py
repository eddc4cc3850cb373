"""With a keyring, nothing unsigned, forged, moved or replayed reaches a worker's parser."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis.asyncio import Redis
from station import Station, checkpoint, ready

from elesh.bus import Bus, unframed
from elesh.bus.guard import Guard
from elesh.security import new_key
from elesh.settings import BusSettings, Settings
from elesh.trainer.session.bus_thread import with_blobs
from elesh.worker import serve
from leyline import (
    CheckpointReady,
    DeadLetter,
    NotAuthorized,
    PruningOutcome,
    Unreadable,
    Unsigned,
    encode,
    read_envelope,
    unwrap,
    wrap,
)
from leyline.streams import CHECKPOINTS, DEAD, DECISIONS, OUTCOMES

TRAINER = new_key("ed25519", "trainer")
WORKER = new_key("hmac-sha256", "worker")
OPERATOR = new_key("hmac-sha256", "operator")
STRANGER = new_key("hmac-sha256", "stranger")


@pytest.fixture
def keyrings(tmp_path: Path) -> Callable[[str], str]:
    """Writes the keyring of one party; everybody believes the same keys."""
    public = {key: value for key, value in TRAINER.items() if key != "private"}
    believed = [
        {**public, "may": ["checkpoints", "outcomes"]},
        {**WORKER, "may": ["decisions", "work", "telemetry", "dead", "audit"]},
        {**OPERATOR, "may": ["operations"]},
    ]

    def write(party: str) -> str:
        keys = [{**TRAINER, "may": ["checkpoints", "outcomes"]}, *believed[1:]]
        chosen = keys if party == "trainer" else believed
        if party == "stranger":
            chosen = [*believed, {**STRANGER}]
        path = tmp_path / f"{party}.yaml"
        path.write_text(yaml.safe_dump({"sign_with": party, "keys": chosen}))
        return str(path)

    return write


def as_party(station: Station, keyring: str, action: Callable[[Bus], Awaitable[Any]]) -> Any:
    """Run ``action`` on a bus with this keyring."""
    return as_party_with(station, {"keyring": keyring}, action)


def as_party_with(
    station: Station, security: dict[str, str], action: Callable[[Bus], Awaitable[Any]]
) -> Any:
    """Run ``action`` on a bus with these settings of security."""

    async def run() -> Any:
        settings = BusSettings(partition=station.partition, security=security)
        bus = await Bus.connect(station.url, settings)
        try:
            return await action(bus)
        finally:
            await bus.close()

    return asyncio.run(run())


async def publish(bus: Bus, number: int = 1) -> CheckpointReady:
    event = await ready(bus, checkpoint(number=number))
    await bus.publish(CHECKPOINTS, event, source="test", run_id="run")
    return event


def dead_letters(station: Station, count: int) -> list[DeadLetter]:
    def found() -> list[DeadLetter]:
        dead = [m for m in station.messages(DEAD) if isinstance(m, DeadLetter)]
        return dead if len(dead) >= count else []

    return station.wait_for(found, f"{count} dead letters")


def test_signed_work_is_decided_and_the_decision_is_signed(
    station: Station, keyrings: Callable[[str], str]
) -> None:
    station.worker(bus={"security": {"keyring": keyrings("worker")}})
    as_party(station, keyrings("trainer"), publish)
    station.wait_decisions(1)
    (delivery,) = station.read(DECISIONS)
    settings = BusSettings(security={"keyring": keyrings("trainer")}).security
    guard = Guard.of(settings, station.partition)
    assert guard.check(DECISIONS, delivery.framed).signer == "worker"
    assert unframed(delivery.framed) == delivery.envelope != delivery.framed


def test_what_is_unsigned_forged_or_out_of_place_is_refused_before_it_is_parsed(
    station: Station, keyrings: Callable[[str], str]
) -> None:
    station.worker(bus={"security": {"keyring": keyrings("worker")}})
    trainer, worker = keyrings("trainer"), keyrings("worker")

    async def genuine(bus: Bus) -> bytes:
        event = await ready(bus, checkpoint())
        return bus.guard.frame(CHECKPOINTS, encode(wrap(event, source="test")))

    signed = as_party(station, trainer, genuine)

    async def by_worker(bus: Bus) -> bytes:
        return bus.guard.frame(CHECKPOINTS, unframed(signed))

    flipped = signed[:-1] + bytes([signed[-1] ^ 1])
    hostile = {
        "unsigned": (CHECKPOINTS, unframed(signed)),
        "bad_signature": (CHECKPOINTS, flipped),
        "not_authorized": (CHECKPOINTS, as_party(station, worker, by_worker)),
        "malformed": (CHECKPOINTS, signed[:9]),
    }

    async def send(bus: Bus) -> None:
        async with Redis.from_url(station.url) as redis:
            for stream, content in hostile.values():
                await redis.xadd(stream.key(station.partition), {"envelope": content})
            await redis.xadd(OUTCOMES.key(station.partition), {"envelope": signed})

    station.on_bus(send)
    found = dead_letters(station, 5)
    assert sorted(dead_letter.error_code for dead_letter in found) == sorted(
        [*hostile, "bad_signature"]  # a genuine entry on another stream than it was signed for
    )
    assert station.decisions() == []
    originals = {dead_letter.original["envelope"] for dead_letter in found}
    assert originals == {content for _, content in hostile.values()} | {signed}


@pytest.mark.slow
def test_a_message_of_another_kind_than_its_stream_carries_is_refused(
    station: Station, keyrings: Callable[[str], str]
) -> None:
    station.worker(bus={"security": {"keyring": keyrings("worker")}})

    async def outcome_as_checkpoint(bus: Bus) -> None:
        outcome = PruningOutcome(
            idempotency_key="1:0123456789abcdef:ck:channel", run_id="run", epoch=1, result="applied"
        )
        await bus.publish(CHECKPOINTS, outcome, source="test")

    as_party(station, keyrings("trainer"), outcome_as_checkpoint)
    (dead_letter,) = dead_letters(station, 1)
    assert dead_letter.error_code == "unknown_type"
    assert "checkpoints" in dead_letter.reason


@pytest.mark.slow
def test_only_an_operator_can_send_an_old_entry_again(
    station: Station, keyrings: Callable[[str], str]
) -> None:
    station.worker(bus={"security": {"keyring": keyrings("worker")}})
    trainer, operator = keyrings("trainer"), keyrings("operator")

    async def expired(bus: Bus) -> bytes:
        event = await ready(bus, checkpoint())
        long_ago = datetime.now(UTC) - timedelta(days=1)
        framed = bus.guard.frame(CHECKPOINTS, encode(wrap(event, source="test", now=long_ago)))
        async with Redis.from_url(station.url) as redis:
            await redis.xadd(CHECKPOINTS.key(station.partition), {"envelope": framed})
        return bytes(framed)

    framed = as_party(station, trainer, expired)
    (dead_letter,) = dead_letters(station, 1)
    assert dead_letter.error_code == "expired"

    async def replayed(bus: Bus) -> None:
        word = bus.guard.frame(bus.guard.redrive_of(framed), b"1893456000000")
        async with Redis.from_url(station.url) as redis:
            for redriven in (b"1893456000000", word):
                fields: Any = {"envelope": framed, "redriven": redriven}
                await redis.xadd(CHECKPOINTS.key(station.partition), fields)

    as_party(station, trainer, replayed)
    codes = {dead_letter.error_code for dead_letter in dead_letters(station, 3)}
    assert codes == {"expired", "unsigned", "not_authorized"}
    assert station.decisions() == []

    async def redrive(bus: Bus) -> None:
        first = (await bus.dead_letters.all())[0]
        await bus.dead_letters.redrive(first.entry_id, "op")

    as_party(station, operator, redrive)
    station.wait_decisions(1)


@pytest.mark.slow
def test_sealed_checkpoints_are_decided_as_plain_ones_and_unreadable_without_the_key(
    station: Station, tmp_path: Path
) -> None:
    shared = new_key("hmac-sha256", "shared")
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump({"sign_with": "shared", "keys": [shared]}))
    sealed = {"keyring": str(path), "blob_key": "shared"}

    async def publish_both(bus: Bus) -> None:
        for number in (1, 2):
            bundle = checkpoint(number=number)
            event = await with_blobs(bus, bundle, "")
            assert event.statistics.sealed == bundle.metadata.model_hash
            if number == 2:
                moved = event.statistics.model_copy(update={"sealed": "f" * 16})
                event = event.model_copy(update={"statistics": moved})
            await bus.publish(CHECKPOINTS, event, source="test", run_id="run")

    as_party_with(station, sealed, publish_both)
    station.worker(bus={"security": sealed})
    (decision,) = station.wait_decisions(1)
    assert decision.channels
    (dead_letter,) = dead_letters(station, 1)
    assert (dead_letter.error_code, dead_letter.field) == (
        "identity_mismatch",
        "statistics.safetensors.sealed",
    )

    async def read_plain(bus: Bus) -> None:
        (first, *_) = await bus.read(CHECKPOINTS)
        event = unwrap(read_envelope(first.envelope))
        assert isinstance(event, CheckpointReady)
        with pytest.raises(Unreadable, match="sealed"):
            await bus.blobs.get(event.statistics)

    station.on_bus(read_plain)


@pytest.mark.parametrize("signer", ["trainer", "operator", "nobody"])
def test_a_worker_that_nobody_would_believe_does_not_start_and_leaves_checkpoints_to_others(
    station: Station, keyrings: Callable[[str], str], signer: str, tmp_path: Path
) -> None:
    ring = yaml.safe_load(Path(keyrings("trainer")).read_text())
    ring["sign_with"] = "" if signer == "nobody" else signer
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(ring))
    security = {"keyring": str(file), "require_signatures": True}
    settings = Settings.model_validate(
        {"bus": {"partition": station.partition, "security": security}}
    )
    with pytest.raises((NotAuthorized, Unsigned), match="signature"):
        asyncio.run(serve(station.url, settings))
