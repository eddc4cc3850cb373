"""Hostile messages and blobs for a real worker on a real server, and what became of each.

Promises of the worker that are held to: no crash of it or of its compute child, no exception that
sends an entry round again, no hang, memory under the cap, and each entry ended: as a dead letter
with a reason people can read, or, if it is sound, decided or noted. Whether an entry is sound is
asked of the same reader that the worker asks, here; a letter for a sound one must say why.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from redis.asyncio import Redis
from station import WorkerProcess, ready

from elesh.bus import Bus, Delivery, Guard, read_dead_letter
from elesh.bus.admission import Work, admit, hear
from elesh.settings import BusSettings
from leyline import AnalysisRequest, ContractError, encode, read_envelope, unwrap, wrap
from leyline.codec import decode
from leyline.network.bundle import NETWORK_FILES
from leyline.streams import (
    CHECKPOINTS,
    DEAD,
    MESSAGES,
    OUTCOMES,
    REDELIVERIES,
    REQUESTS,
    TELEMETRY,
    WORK,
    WORKERS,
    Stream,
)

from .mutate import HOSTILE, mutated
from .readers import VECTORS, checkpoint

__all__ = ["Found", "besiege"]

SERVED = (CHECKPOINTS, REQUESTS, OUTCOMES, WORK, REDELIVERIES)
CHILD_CAP, SUPERVISOR_CAP = 1 << 30, 400 << 20
"""Bytes: what the settings give the child; what the supervisor may take with all its libraries."""
_PATIENCE = 120.0
"""Seconds without any entry ended that count as a hang."""
_BATCH = 500
_WINDOW = 60.0


@dataclass
class Found:
    """What came of a siege."""

    entries: int = 0
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    """By the code of the dead letter, or ``decided``, ``noted``, ``with another`` of its key."""
    supervisor_peak: int = 0
    child_peak: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Entries a second, published, served and audited."""
        return self.entries / self.seconds


@dataclass(frozen=True)
class _Entry:
    """What was put on a stream."""

    stream: Stream
    fields: dict[bytes, bytes]
    at: datetime
    sound: bool = False
    """Nothing about it is hostile: it must be decided."""


async def besiege(url: str, partition: str, folder: Path, count: int, seed: int) -> Found:
    """Publish ``count`` hostile entries in batches to one worker and audit each batch."""
    settings = BusSettings(partition=partition, blob_ttl_seconds=60)
    bus, redis = await Bus.connect(url, settings), Redis.from_url(url)
    worker = await asyncio.to_thread(_worker, url, partition, folder)
    try:
        siege = _Siege(bus, redis, worker, random.Random(seed))
        await siege.prepare()
        begun = time.monotonic()
        while siege.found.entries < count and not siege.over:
            await siege.batch(min(_BATCH, count - siege.found.entries))
        siege.found.seconds = time.monotonic() - begun
        return siege.found
    finally:
        if worker.process.poll() is None:
            await asyncio.to_thread(worker.end)
        await bus.close()
        await redis.aclose()


def _worker(url: str, partition: str, folder: Path) -> WorkerProcess:
    file = folder / "siege.yaml"
    values = {
        "bus": {"partition": partition},
        "worker": {"memory_limit": CHILD_CAP, "window_seconds": _WINDOW},
    }
    file.write_text(yaml.safe_dump({"elesh": values}))
    return WorkerProcess(url, file, "besieged", {}).wait_serving()


class _Siege:
    """One worker under fire."""

    def __init__(
        self, bus: Bus, redis: Redis, worker: WorkerProcess, chance: random.Random
    ) -> None:
        self.found = Found()
        self._bus, self._redis, self._worker, self._chance = bus, redis, worker, chance
        self._child = worker.child.pid
        self._buried: set[str] = set()
        """Keys that have a dead letter."""
        self._numbers = iter(range(1, 1 << 60))

    @property
    def over(self) -> bool:
        """Whether there is no point in going on."""
        return self._worker.process.poll() is not None or len(self.found.violations) > 100

    async def prepare(self) -> None:
        """Sound blobs and messages that mutations start from."""
        self._bundle = checkpoint()
        network = self._bundle.network
        assert network is not None
        self._blobs = {
            "statistics": self._bundle.blobs()["statistics"],
            "gates": self._bundle.blobs().get("gates") or b"",
            "program": network.program,
            "weights": network.weights,
            "held_out": network.held_out,
        }
        self._messages = [
            decode(kind, (VECTORS / f"{name}.bin").read_bytes()) for name, kind in MESSAGES.items()
        ]
        self._carried_by = {
            kind.__name__: stream for stream in SERVED for kind in reversed(stream.messages)
        }

    async def batch(self, count: int) -> None:
        """Publish ``count`` entries, wait until all of them have ended, audit them."""
        entries = [await self._entry() for _ in range(count)]
        pipe = self._redis.pipeline(transaction=False)
        for entry in entries:
            pipe.xadd(entry.stream.key(self._bus.partition), entry.fields)  # type: ignore[arg-type]
        ids = [entry_id.decode() for entry_id in await pipe.execute()]
        await self._until_ended()
        await self._audit(dict(zip(zip(_names(entries), ids, strict=True), entries, strict=True)))
        self.found.entries += count
        for stream in SERVED:
            await self._redis.xtrim(stream.key(self._bus.partition), maxlen=0)

    async def _entry(self) -> _Entry:
        draw, now = self._chance.random(), datetime.now(UTC)
        if draw < 0.1:
            return _Entry(CHECKPOINTS, {b"envelope": encode(await self._with_blob())}, now)
        message = self._chance.choice(self._messages)
        if draw < 0.25:
            message = await self._sound()
        name = type(message).__name__
        envelope = encode(wrap(message, source="fuzz", now=now))
        if draw < 0.13:
            return _Entry(CHECKPOINTS, {b"envelope": envelope}, now, sound=True)
        envelope = mutated(envelope, self._chance)
        stream = self._carried_by.get(name, CHECKPOINTS)
        if self._chance.random() < 0.2:
            stream = self._chance.choice(SERVED)
        return _Entry(stream, self._fields(envelope), now)

    def _fields(self, envelope: bytes) -> dict[bytes, bytes]:
        """The envelope, and sometimes what nobody should send beside it, or instead."""
        fields = {b"envelope": envelope}
        if self._chance.random() < 0.1:
            names = (b"traceparent", b"tracestate", b"history", b"redriven", b"\xff\x00", b"x" * 99)
            value = self._chance.choice(HOSTILE)
            text = value if isinstance(value, bytes) else repr(value).encode("utf-8", "replace")
            fields[self._chance.choice(names)] = text
        if self._chance.random() < 0.01:
            fields = {b"else": envelope}
        return fields

    async def _sound(self) -> Any:
        """A checkpoint that would be decided, with a key of its own."""
        metadata = self._bundle.metadata
        name = {"checkpoint_id": f"ck-{next(self._numbers)}"}
        bundle = replace(self._bundle, metadata=metadata.model_copy(update=name))
        event = await ready(self._bus, bundle)
        network = {n: await self._bus.blobs.put(self._blobs[n]) for n in NETWORK_FILES}
        return event.model_copy(update=network)

    async def _with_blob(self) -> Any:
        """A sound event whose statistics, network or held-out data are hostile."""
        event, which = await self._sound(), self._chance.choice(list(self._blobs))
        blob = await self._bus.blobs.put(mutated(self._blobs[which], self._chance))
        changed = event.model_copy(update={which: blob})
        return wrap(changed, source="fuzz")

    async def _until_ended(self) -> None:
        """Wait until nothing is waiting, pending or to be tried later."""
        least, changed = 1 << 60, time.monotonic()
        while True:
            self._measure()
            left = await self._left()
            if not left or self.over:
                return
            if left < least:
                least, changed = left, time.monotonic()
            if time.monotonic() - changed > _PATIENCE:
                raise AssertionError(f"{left} entries, none ended within {_PATIENCE:g} s")
            await asyncio.sleep(0.05)

    async def _left(self) -> int:
        left = int(await self._redis.zcard(f"elesh:{{{self._bus.partition}}}:delayed"))
        for stream in SERVED:
            pending = await self._bus.pending(WORKERS, stream)
            left += pending.pending + (pending.waiting or 0)
        return left

    def _measure(self) -> None:
        try:
            supervisor = psutil.Process(self._worker.process.pid)
            self.found.supervisor_peak = max(
                self.found.supervisor_peak, supervisor.memory_info().rss
            )
            for child in supervisor.children():
                self.found.child_peak = max(self.found.child_peak, child.memory_info().rss)
                if child.pid != self._child:
                    self._child = child.pid
                    self.found.violations.append("the compute child was replaced")
        except psutil.NoSuchProcess:
            self.found.violations.append("a process is gone")

    async def _audit(self, entries: dict[tuple[str, str], _Entry]) -> None:
        dead_letters = await self._new_letters()
        for place, entry in entries.items():
            if place in dead_letters:
                code = dead_letters.pop(place)
                self.found.ends[code] += 1
                if entry.sound:
                    self.found.violations.append(f"{'/'.join(place)}: sound, but {code}")
            else:
                self.found.ends[await self._good_end(place, entry)] += 1
        await self._look_at_telemetry()
        found = self.found
        for name, peak, cap in (
            ("the supervisor", found.supervisor_peak, SUPERVISOR_CAP),
            ("the child", found.child_peak, CHILD_CAP),
        ):
            if peak > cap:
                found.violations.append(f"{name} took {peak >> 20} MB")

    async def _new_letters(self) -> dict[tuple[str, str], str]:
        """The codes of new dead letters by stream and entry of what they are about."""
        found = {}
        for delivery in await self._new(DEAD):
            dead_letter = read_dead_letter(delivery)
            if (
                not dead_letter.reason
                or not dead_letter.reason.isprintable()
                or not dead_letter.original
            ):
                self.found.violations.append(
                    f"a letter without reason or bytes: {dead_letter}"[:300]
                )
            found[dead_letter.stream, dead_letter.entry_id] = dead_letter.error_code
            self._buried.add(dead_letter.idempotency_key)
        return found

    async def _good_end(self, place: tuple[str, str], entry: _Entry) -> str:
        """How an entry ended that is no dead letter; it must be sound."""
        delivery = Delivery(entry.stream, place[1], entry.fields, 1)
        try:
            heard = hear(delivery, Guard())
            asked = admit(heard, window=_WINDOW, now=entry.at, redriven=delivery.redriven)
        except ContractError as error:
            self.found.violations.append(f"{'/'.join(place)}: no letter, but {error}"[:300])
            return "lost"
        if isinstance(asked, Work | AnalysisRequest):
            key = asked.key if isinstance(asked, Work) else None
            if str(key) in self._buried:
                return "with another"  # of the same key, whose letter stands for both
            if key is None or await self._bus.record(key) is None:
                self.found.violations.append(f"{'/'.join(place)}: {key} has no decision")
            return "decided"
        return "noted"

    async def _look_at_telemetry(self) -> None:
        for delivery in await self._new(TELEMETRY):
            message = unwrap(read_envelope(delivery.envelope))
            if getattr(message, "step", "") in ("retried", "reclaimed"):
                self.found.violations.append(f"{message.step}: {message.detail}"[:300])  # type: ignore[attr-defined]

    async def _new(self, stream: Stream) -> Sequence[Delivery]:
        """What has come since the last look; it is taken away."""
        found = await self._bus.read(stream)
        await self._redis.xtrim(stream.key(self._bus.partition), maxlen=0)
        return found


def _names(entries: Sequence[_Entry]) -> list[str]:
    return [entry.stream.name for entry in entries]
