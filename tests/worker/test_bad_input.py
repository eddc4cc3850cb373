"""Bad input never stops a worker and is never lost: a dead letter with its reason and its bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from redis.asyncio import Redis
from station import Station, checkpoint, ready, send

from elesh.bus import Bus, Delivery, read_dead_letter
from leyline import (
    CheckpointReady,
    DeadLetter,
    IdempotencyKey,
    PruningOutcome,
    StructuralAnalysisRequest,
    encode,
    wrap,
)
from leyline.arrays import pack_arrays, unpack_arrays
from leyline.streams import CHECKPOINTS, DEAD, OUTCOMES, REQUESTS

Case = Callable[[Bus, Redis], Awaitable[Any]]


async def raw(redis: Redis, bus: Bus, fields: dict[str, bytes]) -> None:
    await redis.xadd(CHECKPOINTS.key(bus.partition), fields)  # type: ignore[arg-type]


async def garbage(bus: Bus, redis: Redis) -> None:
    await raw(redis, bus, {"envelope": b"\xc1 not msgpack"})


async def no_envelope(bus: Bus, redis: Redis) -> None:
    await raw(redis, bus, {"something": b"else"})


async def truncated(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    await raw(redis, bus, {"envelope": encode(wrap(event, source="test"))[:-20]})


def edited(event: CheckpointReady, **outer: Any) -> dict[str, Any]:
    values = msgpack.unpackb(encode(wrap(event, source="test")))
    assert isinstance(values, dict)
    return values | outer


def payload_with(event: CheckpointReady, change: Callable[[dict[str, Any]], None]) -> bytes:
    values = msgpack.unpackb(encode(event))
    change(values)
    return bytes(msgpack.packb(edited(event, payload=msgpack.packb(values))))


async def newer_version(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    await raw(redis, bus, {"envelope": msgpack.packb(edited(event, schema_version=99))})


async def unknown_type(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    changed = edited(event, payload_type="Telepathy", event_type="Telepathy")
    await raw(redis, bus, {"envelope": msgpack.packb(changed)})


async def negative_epoch(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    data = payload_with(event, lambda values: values["metadata"].update(epoch=-1))
    await raw(redis, bus, {"envelope": data})


async def unknown_level(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    data = payload_with(event, lambda values: values.update(levels=["galaxy"]))
    await raw(redis, bus, {"envelope": data})


async def other_model(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    data = payload_with(event, lambda values: values["metadata"].update(model_hash="0" * 16))
    await raw(redis, bus, {"envelope": data})


async def oversized(bus: Bus, redis: Redis) -> None:
    await raw(redis, bus, {"envelope": b"\x00" * (9 << 20)})


async def missing_blob(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    gone = event.statistics.model_copy(update={"sha256": "ab" * 32, "uri": f"redis:{'ab' * 32}"})
    await send(bus, CHECKPOINTS, event.model_copy(update={"statistics": gone}))


async def wrong_digest(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint(seed=77))
    digest = event.statistics.sha256
    (chunk,) = [key async for key in redis.scan_iter(f"*{digest}*") if key.endswith(b":0")]
    await redis.setrange(chunk, 100, b"flipped")
    await send(bus, CHECKPOINTS, event)


async def declared_too_large(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    large = event.statistics.model_copy(update={"size": 2 << 30})
    await send(bus, CHECKPOINTS, event.model_copy(update={"statistics": large}))


def with_statistics(change: Callable[[dict[str, np.ndarray]], None]) -> Case:
    async def case(bus: Bus, redis: Redis) -> None:
        event = await ready(bus, checkpoint())
        arrays, _ = unpack_arrays(checkpoint().blobs()["statistics"])
        arrays = {name: array.copy() for name, array in arrays.items()}
        change(arrays)
        blob = pack_unchecked(arrays)
        changed = event.model_copy(update={"statistics": await bus.blobs.put(blob)})
        await send(bus, CHECKPOINTS, changed)

    return case


def pack_unchecked(arrays: dict[str, np.ndarray]) -> bytes:
    """Our writer refuses NaN: write a number that cannot occur, then overwrite its bytes."""
    marked = {n: np.where(np.isnan(a), np.float32(1.25e-30), a) for n, a in arrays.items()}
    blob = pack_arrays({n: a.astype(np.float32) for n, a in marked.items()})
    return blob.replace(np.float32(1.25e-30).tobytes(), np.float32(np.nan).tobytes())


def put_nan(arrays: dict[str, np.ndarray]) -> None:
    arrays["g1/taylor_importance"][3] = np.nan


def shorten(arrays: dict[str, np.ndarray]) -> None:
    for name in ("taylor_importance", "magnitude_importance", "activation_frequency"):
        arrays[f"g1/{name}"] = arrays[f"g1/{name}"][:-1]
    del arrays["g1/channel_correlations"]


def strange_group(arrays: dict[str, np.ndarray]) -> None:
    for name in ("taylor_importance", "magnitude_importance", "activation_frequency"):
        arrays[f"nowhere/{name}"] = arrays[f"g1/{name}"]


async def bad_key(bus: Bus, redis: Redis) -> None:
    event = await ready(bus, checkpoint())
    request = StructuralAnalysisRequest(
        request_id="rq-1",
        idempotency_key=f"60:{event.metadata.model_hash}:rq-1",
        current_architecture=event.architecture,
        metadata=event.metadata,
        statistics=event.statistics,
    )
    values = msgpack.unpackb(encode(request))
    values["idempotency_key"] = "60:what:rq-1"
    outer = msgpack.unpackb(encode(wrap(request, source="test")))
    outer["payload"] = msgpack.packb(values)
    await redis.xadd(REQUESTS.key(bus.partition), {"envelope": msgpack.packb(outer)})


async def unknown_decision(bus: Bus, redis: Redis) -> None:
    key = str(IdempotencyKey(3, "0" * 16, "never", checkpoint().levels[0]))
    outcome = PruningOutcome(idempotency_key=key, run_id="run", epoch=3, result="applied")
    await send(bus, OUTCOMES, outcome)


CASES: dict[str, tuple[Case, str, str]] = {
    "garbage": (garbage, "malformed", "envelope"),
    "no envelope": (no_envelope, "malformed", "envelope"),
    "truncated": (truncated, "malformed", "envelope"),
    "oversized": (oversized, "too_large", "envelope"),
    "newer version": (newer_version, "unsupported_version", "schema_version"),
    "unknown type": (unknown_type, "unknown_type", "Telepathy"),
    "negative epoch": (negative_epoch, "invalid_field", "metadata.epoch"),
    "unknown level": (unknown_level, "invalid_field", "galaxy"),
    "other model": (other_model, "identity_mismatch", "model_hash"),
    "missing blob": (missing_blob, "missing_blob", "abab"),
    "wrong digest": (wrong_digest, "digest_mismatch", "sha256"),
    "declared too large": (declared_too_large, "digest_mismatch", "2147483648"),
    "NaN importance": (with_statistics(put_nan), "not_finite", "g1/taylor_importance[3]"),
    "wrong shape": (with_statistics(shorten), "shape_mismatch", "g1"),
    "unknown group": (with_statistics(strange_group), "invalid_field", "nowhere"),
    "bad key": (bad_key, "invalid_field", "60:what:rq-1"),
    "unknown decision": (unknown_decision, "unknown_decision", "never"),
}


@pytest.mark.timeout(900)
def test_every_kind_of_bad_input_is_a_dead_letter_and_the_next_message_is_served(
    station: Station,
) -> None:
    worker = station.worker(breaker={"failures": 1000})

    async def publish_all(bus: Bus) -> None:
        redis = Redis.from_url(station.url)
        for case, _, _ in CASES.values():
            await case(bus, redis)
        await redis.aclose()

    station.on_bus(publish_all)
    station.publish(checkpoint(number=99))
    (decision,) = station.wait_decisions(1)
    assert decision.key.decision_id == "ck-99"
    dead_letters = station.wait_for(
        lambda: found if len(found := station.read(DEAD)) >= len(CASES) else [], "all dead letters"
    )
    read = by_reason(dead_letters)
    assert len(read) == len(CASES)
    for name, (_, code, part) in CASES.items():
        fitting = [dead_letter for dead_letter in read if part in dead_letter.reason]
        assert fitting, (
            f"{name}: no letter says {part}: {[dead_letter.reason for dead_letter in read]}"
        )
        assert not code or code in {dead_letter.error_code for dead_letter in fitting}, name
        assert all(
            "expected" in dead_letter.reason and "found" in dead_letter.reason
            for dead_letter in fitting
        )
    assert worker.process.poll() is None


def by_reason(deliveries: list[Delivery]) -> list[DeadLetter]:
    return [read_dead_letter(delivery) for delivery in deliveries]


def test_a_dead_letter_holds_the_original_bytes(station: Station) -> None:
    station.worker()
    station.on_bus(lambda bus: garbage(bus, Redis.from_url(station.url)))
    station.wait_for(lambda: station.read(DEAD), "the dead letter")
    (dead_letter,) = by_reason(station.read(DEAD))
    assert dead_letter.original == {"envelope": b"\xc1 not msgpack"}


def test_the_same_key_with_other_content_is_a_conflict_and_never_overwrites(
    station: Station,
) -> None:
    station.worker()
    station.publish(checkpoint(seed=1))
    (first,) = station.wait_decisions(1)
    station.publish(checkpoint(seed=2))
    station.wait_for(lambda: station.read(DEAD), "the dead letter")
    (dead_letter,) = by_reason(station.read(DEAD))
    assert dead_letter.error_code == "conflict"
    assert station.decisions() == [first]
