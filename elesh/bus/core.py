"""The bus: publish, claim, renew, commit, dead-letter, read, trim, on Redis Streams.

Promises: at-least-once delivery, exactly-once effect. An entry is served by its owner in the
consumer group; ownership is a lease that is renewed, taken over when it ran out, and checked by
every step that changes anything. Commands of Redis 7.0 only. Every method raises
:class:`BusUnavailable` when the server cannot serve.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

from redis.exceptions import RedisError

from elesh.bus.server.address import parse
from elesh.bus.server.client import (
    MAX_BLOCK,
    Backoff,
    Client,
    OutageLog,
    ServerClock,
    open_client,
    until_available,
)
from elesh.bus.state.audit import AuditLog
from elesh.bus.state.blobs import BlobStore
from elesh.bus.state.registry import Registry
from elesh.bus.state.runs import BreakerStore, HistoryStore, RunStore
from elesh.bus.streams.consumer_groups import SHED_FROM, WORK, Groups, Reaper, pending_of
from elesh.bus.streams.consumer_groups import last_id as last_id_of
from elesh.bus.streams.dead_letters import DeadLetters
from elesh.bus.streams.fan_out import PlanStore
from elesh.bus.streams.records import (
    Commit,
    CommitOutcome,
    Delivery,
    Pending,
    Record,
    deliveries_of,
    entry_fields,
)
from elesh.observe import get_logger
from elesh.settings import BreakerSettings, BusSettings
from leyline import (
    ContractError,
    DeadLetter,
    IdempotencyKey,
    IdentityMismatch,
    Level,
    Malformed,
    Message,
    Priority,
    TooLarge,
    encode,
    read_envelope,
    stable_hash,
    wrap,
)
from leyline.streams import AUDIT, DEAD, DECISIONS, STREAMS, Stream

from .errors import BusRefuses, BusUnavailable, Overloaded, RunClaimed
from .guard import Guard, unframed
from .scripts import Keys, Scripts, Shared

T = TypeVar("T")

_SOURCE = "elesh"
_DROPPED_TRIES = 5
"""So often a message is sent to a server that closes the connection on it but answers others."""
UNTRUSTED = frozenset({"unsigned", "bad_signature", "not_authorized", "malformed"})
"""Codes of dead letters whose original's own statements are not used."""
_MARKER_SECONDS = 600
_BATCH = 100
# The audit log is never shortened.
_TRIMMED = tuple(stream for stream in STREAMS if stream is not AUDIT)
_REMEMBER_SECONDS = 3600
_log = get_logger(__name__)
_OUTCOME = b"outcome:"
_SILENCE_MS = 3_600_000
"""After which a consumer with nothing pending is forgotten."""


class Bus:
    """One connection to the bus, for one partition; safe to use from many tasks of one loop."""

    stream_length = 100_000
    """Entries that a stream may hold; low priorities find no room before it is full. Streams are
    trimmed as they are read: where one fills, more workers are needed, not a longer stream."""

    def __init__(
        self, client: Client, settings: BusSettings, breaker: BreakerSettings | None = None
    ) -> None:
        self.settings = settings
        self.partition = settings.partition
        self.keys = keys = Keys(settings.partition)
        self._client = client
        self.outage = OutageLog()
        self._scripts = scripts = Scripts(client)
        self.guard = guard = Guard.of(settings.security, settings.partition)
        self.clock = ServerClock(client)
        self._shared = shared = Shared(client, scripts, keys, guard, self.clock)
        self.groups = Groups(shared)
        self.plans = PlanStore(shared, settings.record_ttl_seconds)
        self.reaper = Reaper(shared, self.plans.join_overdue, settings.lease_seconds)
        self.blobs = BlobStore(shared, settings)
        self.breakers = BreakerStore(shared, breaker or BreakerSettings())
        self.audit = AuditLog(shared)
        self.dead_letters = DeadLetters(shared)
        self.registry = Registry(shared)
        self.runs = RunStore(shared, settings.record_ttl_seconds)
        self._remembered: dict[str, float] = {}

    def history(self, epochs: int, nbytes: int) -> HistoryStore:
        """The runs' histories, each within so many epochs and bytes."""
        return HistoryStore(self._shared, epochs, nbytes, self.settings.record_ttl_seconds)

    @classmethod
    def open(cls, url: str, settings: BusSettings, breaker: BreakerSettings | None = None) -> Self:
        """The bus at ``url``, to which nothing is sent yet.

        Raises:
            BadAddress: if the URL names no bus.
        """
        return cls(open_client(url, settings.partition), settings, breaker)

    @classmethod
    async def connect(
        cls, url: str, settings: BusSettings, breaker: BreakerSettings | None = None
    ) -> Self:
        """The bus at ``url``.

        Raises:
            BusUnavailable: if it does not answer; the message names the URL and the cause.
        """
        bus = cls.open(url, settings, breaker)
        try:
            await bus.clock.now()
        except BaseException:
            await bus.close()
            raise
        return bus

    @classmethod
    async def connect_when_available(
        cls,
        url: str,
        settings: BusSettings,
        breaker: BreakerSettings | None = None,
        *,
        stop: asyncio.Event | None = None,
    ) -> Self | None:
        """Connect, waiting as long as it takes; None if ``stop`` is set first.

        Raises:
            BadAddress: at once, if the URL names no bus.
        """
        bus = cls.open(url, settings, breaker)
        if await bus.when_available(stop=stop):
            return bus
        await bus.close()
        return None

    @property
    def server(self) -> tuple[str, int] | None:
        """Address and port of the server, a socket's path with port 0; None before a connection."""
        if path := self._client.connection_pool.connection_kwargs.get("path"):
            return str(path), 0
        locator = self._client.locator
        place = locator.place if locator else None
        return (place.host, place.port) if place else None

    @property
    def asks_password(self) -> bool:
        """Whether the server asks for a password: the URL has one, or it is an embedded server."""
        address = parse(self._client.url)
        return bool(address.password) or address.kind == "embedded"

    async def when_available(self, *, stop: asyncio.Event | None = None) -> bool:
        """Wait until the server answers; False if ``stop`` is set first."""
        return await until_available(self.clock.now, stop=stop, log=self.outage) is not None

    async def persistently(
        self,
        action: Callable[[], Awaitable[T]],
        *,
        stop: asyncio.Event | None = None,
        final: tuple[type[BusUnavailable], ...] = (),
        drops: Callable[[BusUnavailable], Awaitable[bool]] | None = None,
    ) -> T:
        """What ``action`` returns once the bus serves it.

        Args:
            final: what is not waited for.
            drops: whether an error says that the server takes others, but not this one; as
                :meth:`drops` if not given.

        Raises:
            BusUnavailable: if ``stop`` is set before, or if it is ``final``.
            TooLarge: if the server drops this a few times, while it answers everything else: it
                will never take it.
        """
        backoff, dropped = Backoff(self.outage, stop), 0
        while True:
            try:
                answer = await action()
            except final:
                backoff.served()
                raise
            except BusUnavailable as error:
                dropped += await (drops or self.drops)(error)
                if dropped >= _DROPPED_TRIES:
                    backoff.served()
                    raise TooLarge(
                        "message",
                        "one that the server takes",
                        f"refused {_DROPPED_TRIES} times while the server took others: {error}",
                        hint="see its maxmemory, proto-max-bulk-len and client-query-buffer-limit",
                    ) from error
                if not await backoff.pause(error):
                    raise
            else:
                backoff.served()
                return answer

    async def drops(self, error: BusUnavailable) -> bool:
        """Whether the server ended the connection on this command, but answers others."""
        if isinstance(error, BusRefuses):
            return False
        try:
            return await self.ping()
        except BusUnavailable:
            return False

    async def ping(self) -> bool:
        """True if the server answers."""
        return bool(await self._client.ping())

    async def eviction(self) -> str:
        """Why the server may evict keys; empty if it does not, or does not say."""
        try:
            memory: Any = await self._client.info("memory")
        except BusRefuses:
            return ""
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy == "noeviction" or not memory.get("maxmemory"):
            return ""
        return f"maxmemory-policy is {policy}: set noeviction, or messages and decisions are lost"

    async def close(self) -> None:
        """Close the connections; nothing is requeued or acknowledged. A server that does not answer
        delays nothing."""
        try:
            await self._client.aclose()
        except (RedisError, BusUnavailable, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
            _log.info("connections to the bus did not close in order", reason=reason)

    # Producers

    async def publish(
        self,
        stream: Stream,
        message: Message,
        *,
        source: str,
        carrier: Mapping[str, str] | None = None,
        priority: Priority = Priority.NORMAL,
        run_id: str = "",
        epoch: int | None = None,
        correlation_id: str = "",
        event_id: str = "",
        token: str = "",
    ) -> str:
        """Append a message and return its entry id.

        Without ``event_id`` each call is an event of its own. With one, the same event is appended
        once within ten minutes, so that a caller may try again after an answer was lost. With the
        ``token`` of a claim, whether the run is another's is looked at in the same step.

        Raises:
            Overloaded: if so much waits in the stream that a message of this priority is shed.
            RunClaimed: if the run is claimed by another token.
        """
        envelope = wrap(
            message,
            source=source,
            priority=priority,
            event_id=event_id,
            run_id=run_id,
            epoch=epoch,
            correlation_id=correlation_id,
            now=await self.clock.now(),
        )
        framed = self.guard.frame(stream, encode(envelope))
        marker = self.keys.named("event", stream.name, envelope.event_id)
        # The backlog from which this priority is shed; 0: never.
        share = SHED_FROM.get(priority, 0.0) if stream in WORK else 0.0
        limit = math.ceil(share * self.stream_length)
        args: list[str | bytes | int] = [_MARKER_SECONDS, limit, stream.group]
        args += [f"{stream.name}:{priority}", token, *entry_fields(framed, carrier or {})]
        keys = [self.keys.stream(stream), marker, self.keys.named("shed")]
        keys += [self.keys.named("claim", run_id)] if token else []
        reply = await self._scripts.run("publish", keys, args)
        verdict, value = (str(part, "utf-8") for part in reply)
        if verdict == "shed":
            raise Overloaded(self._client.url, stream.name, priority, limit)
        if verdict == "claimed":
            raise RunClaimed(self._client.url, run_id, value)
        return value

    async def shed(self) -> dict[str, int]:
        """How many messages were shed so far, by ``stream:priority``."""
        counts: Any = await self._client.hgetall(self.keys.named("shed"))
        return {
            name.decode(errors="replace"): int(count)
            for name, count in sorted(counts.items())
            if count.isdigit()
        }

    # Results

    async def record(self, key: IdempotencyKey) -> Record | None:
        """The decision stored for a key, None if there is none.

        Raises:
            Unsigned, BadSignature, NotAuthorized: if it is not by a key that may decide.
            IdentityMismatch: if it is the decision of another key.
            Malformed: if it is no record.
        """
        name = self.keys.named("record", str(key))
        stored: Any = await self._client.hgetall(name)
        if b"envelope" not in stored:
            return None
        envelope = self.guard.check(DECISIONS, stored[b"envelope"]).content
        if (found := read_envelope(envelope).correlation_id) != str(key):
            raise IdentityMismatch(f"record of {key}", str(key), found)
        outcomes = (field for field in stored if field.startswith(_OUTCOME))
        try:
            fingerprint = stored[b"fingerprint"].decode()
            decided_at = datetime.fromtimestamp(float(stored[b"decided_at"]), UTC)
        except (KeyError, ValueError, OverflowError, OSError) as error:
            raise Malformed(f"record of {key}", "fingerprint and time", repr(error)) from None
        return Record(
            fingerprint,
            envelope,
            decided_at,
            frozenset(
                field.removeprefix(_OUTCOME).decode()
                for field in outcomes
                if self._is_recorded(name, field, stored[field])
            ),
        )

    def _is_recorded(self, name: str, field: bytes, framed: bytes) -> bool:
        """Whether a signer that may decide recorded this outcome."""
        try:
            return bool(self.guard.check(f"{name}:{field.decode()}", framed).content)
        except (ContractError, UnicodeDecodeError):
            return False

    async def record_outcome(self, key: IdempotencyKey, event_id: str) -> None:
        """Keep that an outcome of a decision was taken in, for as long as the decision's record."""
        name = self.keys.named("record", str(key))
        field = _OUTCOME.decode() + event_id
        await self._client.hset(name, field, self.guard.frame(f"{name}:{field}", b"1"))
        # Its record may have ended at this very moment.
        await self._client.expire(name, self.settings.record_ttl_seconds, nx=True)

    async def latest(self, run_id: str, level: Level, before: int) -> Record | None:
        """The run's latest good decision of a level, if it is of an epoch before ``before``."""
        pointer = self.keys.named("latest", run_id, level)
        found: Any = await self._client.hmget(pointer, ["epoch", "key"])
        epoch, key = found
        try:
            if key is None or int(epoch) >= before:
                return None
            return await self.record(IdempotencyKey.parse(key.decode()))
        except (ValueError, ContractError):  # not what a commit wrote, or no signer that may decide
            return None

    async def commit(
        self,
        group: str,
        consumer: str,
        delivery: Delivery,
        result: Commit,
        served: Sequence[str] = (),
        dead_letter: DeadLetter | None = None,
    ) -> CommitOutcome:
        """Store, publish and acknowledge in one atomic step; what became of the result.

        If the consumer no longer owns the entry, it is LOST and nothing changes. On a CONFLICT the
        entry stays pending: make it a dead letter. ``served`` are keys that are deleted, and
        ``dead_letter`` a dead letter that is published, with the acknowledgement.
        """
        now = await self.clock.now()
        keys = [*map(self.keys.stream, (delivery.stream, DECISIONS, DEAD))]
        latest = self.keys.named("latest", result.run_id, result.key.level)
        keys += [self.keys.named("record", str(result.key)), latest]
        dead = self._dead_letter_fields(dead_letter, result.carrier) if dead_letter else []
        envelope = wrap(
            result.message,
            source=_SOURCE,
            event_id=f"settled-{stable_hash(str(result.key))}",
            run_id=result.run_id,
            epoch=result.epoch,
            correlation_id=str(result.key),
            now=now,
        )
        fields = entry_fields(self.guard.frame(DECISIONS, encode(envelope)), result.carrier)
        epoch = result.key.epoch if result.remember else -1
        args: list[str | bytes | int] = [group, consumer, delivery.entry_id]
        args += [self.settings.record_ttl_seconds, str(result.key), result.fingerprint, epoch]
        args += [len(fields), *fields, *dead]
        verdict = await self._scripts.run("commit", [*keys, *served], args)
        return CommitOutcome(verdict.decode())

    async def remember_settings(self, settings_hash: str, text: str) -> None:
        """Keep the settings (JSON) that decisions name by their hash, as long as their records.

        Written once an hour at most: call it with every decision.
        """
        now = asyncio.get_running_loop().time()
        if now < self._remembered.get(settings_hash, 0.0):
            return
        seconds = self.settings.record_ttl_seconds + _REMEMBER_SECONDS
        await self._client.set(self.keys.named("settings", settings_hash), text, ex=seconds)
        self._remembered[settings_hash] = now + _REMEMBER_SECONDS

    async def settings_of(self, settings_hash: str) -> dict[str, Any] | None:
        """The settings that decided, without what has no part in decisions; None if unknown, or if
        they are not what the hash says."""
        stored: Any = await self._client.get(self.keys.named("settings", settings_hash))
        if not stored or not hashlib.sha256(stored).hexdigest().startswith(settings_hash):
            return None
        return dict(json.loads(stored))

    async def acknowledge(
        self, group: str, consumer: str, delivery: Delivery, served: Sequence[str] = ()
    ) -> bool:
        """End an entry without a result; False if it is no longer the consumer's."""
        keys = [self.keys.stream(delivery.stream), *served]
        args = [group, consumer, delivery.entry_id]
        return bool(await self._scripts.run("acknowledge", keys, args))

    async def dead_letter(
        self,
        group: str,
        consumer: str,
        delivery: Delivery,
        dead_letter: DeadLetter,
        carrier: Mapping[str, str],
        served: Sequence[str] = (),
    ) -> bool:
        """Move an entry to the dead letters; False if it is no longer the consumer's.

        Original bytes too large for a message travel as fields beside it: read entries of the
        stream with ``read_dead_letter``.
        """
        fields = self._dead_letter_fields(dead_letter, carrier)
        keys = [*map(self.keys.stream, (delivery.stream, DEAD)), *served]
        args = [group, consumer, delivery.entry_id, *fields]
        return bool(await self._scripts.run("acknowledge", keys, args))

    def _dead_letter_fields(
        self, dead_letter: DeadLetter, carrier: Mapping[str, str]
    ) -> list[str | bytes]:
        """A dead letter as an entry; original bytes too large for a message stand beside it."""

        run_id, epoch = _run_of(dead_letter)

        def enveloped(dead_letter: DeadLetter) -> bytes:
            envelope = wrap(
                dead_letter,
                source=dead_letter.worker_id,
                priority=Priority.HIGH,
                now=self.clock.latest(),
                run_id=run_id,
                epoch=epoch,
                correlation_id=dead_letter.idempotency_key,
            )
            return self.guard.frame(DEAD, encode(envelope))

        try:
            return entry_fields(enveloped(dead_letter), carrier)
        except TooLarge:
            bare = dead_letter.model_copy(update={"original": {}})
            return entry_fields(enveloped(bare), carrier, dead_letter.original)

    # Readers

    async def read(
        self, stream: Stream, *, start: str = "-", end: str = "+", count: int | None = None
    ) -> list[Delivery]:
        """Entries of a stream from id ``start`` to ``end``, without any group."""
        entries = await self._client.xrange(self.keys.stream(stream), start, end, count)
        return deliveries_of([(stream, entries)], grouped=False)

    async def newest(self, stream: Stream, *, count: int, before: str = "") -> list[Delivery]:
        """The last ``count`` entries of a stream, newest first; of those before an entry's id, if
        one is given."""
        last = f"({before}" if before else "+"
        entries = await self._client.xrevrange(self.keys.stream(stream), last, "-", count)
        return deliveries_of([(stream, entries)], grouped=False)

    async def stands(self, stream: Stream, entry_id: str) -> bool:
        """Whether an entry is (still) there."""
        return bool(await self._client.xrange(self.keys.stream(stream), entry_id, entry_id, 1))

    async def follow(
        self, stream: Stream, *, last_id: str, block_seconds: float
    ) -> tuple[str, list[Delivery]]:
        """Up to 100 entries after ``last_id`` (``"0"`` all, ``"$"`` from now on), and the id to go
        on from; waits up to ``block_seconds`` for the first."""
        key = self.keys.stream(stream)
        if last_id == "$":
            # A real id, so that nothing is missed between this call and the next.
            last_id = await last_id_of(self._client, key)
        block = round(max(0.0, min(block_seconds, MAX_BLOCK)) * 1000) or None
        reply: Any = await self._client.xread({key: last_id}, _BATCH, block)
        entries = deliveries_of(((stream, read) for _, read in reply or ()), grouped=False)
        return (entries[-1].entry_id if entries else last_id), entries

    async def pending(self, group: str, stream: Stream) -> Pending:
        """A group's backlog in a stream; the whole stream, if the group does not exist."""
        return await pending_of(self._client, self.keys.stream(stream), group)

    # Housekeeping

    async def trim(self) -> dict[str, int]:
        """Shorten streams to about ``stream_length``; the number of entries removed, by stream.

        What a group still needs stays, and work streams wait for their group. Consumers that have
        been silent for an hour with nothing pending are forgotten.
        """
        keys = [self.keys.stream(stream) for stream in _TRIMMED]
        capped = [int(stream not in WORK) for stream in _TRIMMED]
        args = [self.stream_length, _SILENCE_MS, *capped]
        removed = await self._scripts.run("tidy", keys, args)
        return {stream.name: count for stream, count in zip(_TRIMMED, removed, strict=True)}


def _run_of(dead_letter: DeadLetter) -> tuple[str, int | None]:
    """Run and epoch of the message in a dead letter, by which its trainer hears of it."""
    # A key stands in it only where the message was admitted: then what was malformed is its data.
    if dead_letter.error_code in UNTRUSTED and not dead_letter.idempotency_key:
        return "", None
    try:
        envelope = read_envelope(unframed(dead_letter.original.get("envelope", b"")))
    except ContractError:
        return "", None
    return envelope.training_run_id, envelope.epoch
