"""The bus: publish, claim, renew, settle, dead-letter, read, trim, on Redis Streams.

Promises: at-least-once delivery, exactly-once effect. An entry is served by whoever owns it in its
consumer group; ownership is a lease that is renewed, taken over when it ran out, and checked by
every step that changes anything. Commands of Redis 7.0 only. Every method raises
:class:`BusUnavailable` when the server cannot serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Self

from redis.exceptions import ResponseError

from elesh.settings import BreakerSettings, BusSettings
from leyline import (
    DeadLetter,
    IdempotencyKey,
    Message,
    Priority,
    TooLarge,
    encode,
    stable_hash,
    wrap,
)
from leyline.streams import AUDIT, CHECKPOINTS, DEAD, DECISIONS, OUTCOMES, REQUESTS, STREAMS, Stream

from .audit import AuditLog
from .blobs import BlobStore
from .breakers import BreakerStore
from .client import MAX_BLOCK, Client, open_client, until_available
from .history import HistoryStore
from .letters import DeadLetters
from .records import Delivery, Pending, Record, Settlement, Settling, deliveries_of, entry_fields
from .registry import Registry
from .scripts import Scripts
from .upkeep import forget_idle_consumers, pending_of
from .upkeep import last_id as last_id_of

__all__ = ["Bus"]

_SOURCE = "elesh"
_MARKER_SECONDS = 600
_BATCH = 100
# Work for groups that may not exist yet, and the audit log: never dropped unread.
_KEPT = frozenset({CHECKPOINTS, REQUESTS, OUTCOMES, AUDIT})


class Bus:
    """One connection to the bus, for one partition; safe to use from many tasks of one loop."""

    def __init__(
        self, client: Client, settings: BusSettings, breaker: BreakerSettings | None = None
    ) -> None:
        self.settings = settings
        self.partition = settings.partition
        self._client = client
        self._scripts = Scripts(client)
        self.blobs = BlobStore(client, self._scripts, settings)
        self.breakers = BreakerStore(
            client, self._scripts, settings.partition, breaker or BreakerSettings()
        )
        self.audit = AuditLog(client, self._scripts, settings.partition)
        self.letters = DeadLetters(client, self._scripts, settings.partition)
        self.registry = Registry(client, self._scripts, settings.partition)
        self._lease_ms = max(1, round(settings.lease_seconds * 1000))
        self._cursors: dict[tuple[str, str], str] = {}
        self._first = 0

    def history(self, epochs: int, nbytes: int) -> HistoryStore:
        """The runs' histories, each within so many epochs and bytes."""
        return HistoryStore(self._client, self._scripts, self.settings, epochs, nbytes)

    @classmethod
    async def connect(
        cls, url: str, settings: BusSettings, breaker: BreakerSettings | None = None
    ) -> Self:
        """The bus at ``url``.

        Raises:
            BusUnavailable: if it does not answer; the message names the URL and the cause.
        """
        client = open_client(url)
        try:
            await client.ping()
        except BaseException:
            await client.aclose()
            raise
        return cls(client, settings, breaker)

    @classmethod
    async def connect_when_available(
        cls,
        url: str,
        settings: BusSettings,
        breaker: BreakerSettings | None = None,
        *,
        stop: asyncio.Event | None = None,
    ) -> Self | None:
        """Connect, waiting as long as it takes; None if ``stop`` is set first."""
        return await until_available(lambda: cls.connect(url, settings, breaker), stop=stop)

    async def when_available(self, *, stop: asyncio.Event | None = None) -> bool:
        """Wait until the server answers again; False if ``stop`` is set first."""
        return await until_available(self.ping, stop=stop) is not None

    async def ping(self) -> bool:
        """True if the server answers."""
        return bool(await self._client.ping())

    async def close(self) -> None:
        """Close the connections; nothing is given back or acknowledged."""
        await self._client.aclose()

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
    ) -> str:
        """Append a message and return its entry id.

        Without ``event_id`` each call is an event of its own. With one, the same event is appended
        once within ten minutes, so that a caller may try again after an answer was lost.
        """
        envelope = wrap(
            message,
            source=source,
            priority=priority,
            event_id=event_id,
            run_id=run_id,
            epoch=epoch,
            correlation_id=correlation_id,
        )
        return await self._scripts.publish(
            self._key(stream),
            self._named("event", stream.name, envelope.event_id),
            _MARKER_SECONDS,
            entry_fields(encode(envelope), carrier or {}),
        )

    # Consumers

    async def claim(
        self,
        group: str,
        consumer: str,
        streams: Sequence[Stream],
        *,
        count: int,
        block_seconds: float,
    ) -> list[Delivery]:
        """Up to ``count`` entries that the group has not seen; waits for the first if need be.

        A group that does not exist (yet, or any more) begins at the oldest entry. At most
        ``MAX_BLOCK`` seconds are waited, whatever is asked for.
        """
        try:
            return await self._claim(group, consumer, streams, count, block_seconds)
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
        await self._create_group(group, streams)
        return await self._claim(group, consumer, streams, count, block_seconds)

    async def _claim(
        self, group: str, consumer: str, streams: Sequence[Stream], count: int, seconds: float
    ) -> list[Delivery]:
        # XREADGROUP's COUNT holds for each stream, so they are asked one by one, in turn.
        self._first = (self._first + 1) % len(streams)
        claimed: list[Delivery] = []
        for stream in (*streams[self._first :], *streams[: self._first]):
            if count > len(claimed):
                claimed += await self._read_group(group, consumer, [stream], count - len(claimed))
        if claimed or seconds <= 0:
            return claimed
        block = max(1, round(min(seconds, MAX_BLOCK) * 1000))
        claimed = await self._read_group(group, consumer, streams, 1, block)
        await self._release(group, consumer, claimed[count:])
        return claimed[:count]

    async def _read_group(
        self,
        group: str,
        consumer: str,
        streams: Sequence[Stream],
        count: int,
        block: int | None = None,
    ) -> list[Delivery]:
        reply = await self._client.xreadgroup(
            group, consumer, {self._key(stream): ">" for stream in streams}, count, block
        )
        return self._deliveries(streams, reply, deliveries=1)

    async def _create_group(self, group: str, streams: Sequence[Stream]) -> None:
        for stream in streams:
            try:
                await self._client.xgroup_create(self._key(stream), group, "0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def reclaim(
        self, group: str, consumer: str, streams: Sequence[Stream], *, count: int
    ) -> list[Delivery]:
        """Up to ``count`` pending entries whose lease ran out, whoever owned them.

        That includes the consumer's own: one that is still at work on such an entry simply goes on.
        """
        claimed: list[Delivery] = []
        for stream in streams:
            if count > len(claimed):
                claimed += await self._reclaim(group, consumer, stream, count - len(claimed))
        return claimed

    async def _reclaim(
        self, group: str, consumer: str, stream: Stream, count: int
    ) -> list[Delivery]:
        key, place = self._key(stream), (group, stream.name)
        start = self._cursors.pop(place, "-")
        try:
            expired: Any = await self._client.xpending_range(
                key, group, start, "+", count, idle=self._lease_ms
            )
        except ResponseError as error:
            if str(error).startswith("NOGROUP"):
                return []
            raise
        if not expired:
            return []
        deliveries = {e["message_id"].decode(): e["times_delivered"] + 1 for e in expired}
        if len(expired) == count:
            # The next call goes on from here, so that entries deep down have their turn.
            self._cursors[place] = f"({list(deliveries)[-1]}"
        entries: Any = await self._client.xclaim(
            key, group, consumer, self._lease_ms, list(deliveries)
        )
        return [
            Delivery(stream, entry.decode(), fields, deliveries[entry.decode()])
            for entry, fields in entries
            if fields is not None
        ]

    async def renew(
        self, group: str, consumer: str, deliveries: Sequence[Delivery]
    ) -> list[Delivery]:
        """Start the leases anew; the deliveries that are no longer the consumer's."""
        entries = [self._entry(delivery) for delivery in deliveries]
        lost = await self._scripts.renew(group, consumer, entries) if entries else []
        return [deliveries[position] for position in lost]

    async def _release(self, group: str, consumer: str, deliveries: Sequence[Delivery]) -> None:
        entries = [(self._entry(delivery), delivery.deliveries - 1) for delivery in deliveries]
        if entries:
            await self._scripts.release(group, consumer, entries, self._lease_ms)

    async def leave(self, group: str, consumer: str, streams: Sequence[Stream]) -> None:
        """Have the group forget a consumer that ends; one with pending entries stays known."""
        for stream in streams:
            await self._scripts.leave(self._key(stream), group, consumer)

    # Results

    async def record(self, key: IdempotencyKey) -> Record | None:
        """The decision stored for a key, None if there is none."""
        stored: Any = await self._client.hgetall(self._named("record", str(key)))
        if not stored:
            return None
        return Record(
            stored[b"fingerprint"].decode(),
            stored[b"envelope"],
            datetime.fromtimestamp(float(stored[b"decided_at"]), UTC),
        )

    async def settle(
        self, group: str, consumer: str, delivery: Delivery, results: Sequence[Settling]
    ) -> list[Settlement]:
        """Store, publish and acknowledge in one atomic step; what became of each result.

        If the consumer no longer owns the entry, all are LOST and nothing changes. If one is in
        CONFLICT, the entry stays pending: make it a dead letter.
        """
        if not results:
            raise ValueError("settle needs a result; acknowledge an entry that has none")
        prepared = []
        for result in results:
            envelope = wrap(
                result.message,
                source=_SOURCE,
                event_id=f"settled-{stable_hash(str(result.key))}",
                run_id=result.run_id,
                epoch=result.epoch,
                correlation_id=str(result.key),
            )
            fields = entry_fields(encode(envelope), result.carrier)
            prepared.append((self._named("record", str(result.key)), result.fingerprint, fields))
        verdicts = await self._scripts.settle(
            group,
            consumer,
            self._entry(delivery),
            self._key(DECISIONS),
            self.settings.record_ttl_seconds,
            prepared,
        )
        return [Settlement(verdict) for verdict in verdicts]

    async def acknowledge(self, group: str, consumer: str, delivery: Delivery) -> bool:
        """End an entry without a result; False if it is no longer the consumer's."""
        return await self._scripts.acknowledge(group, consumer, self._entry(delivery))

    async def dead_letter(
        self,
        group: str,
        consumer: str,
        delivery: Delivery,
        letter: DeadLetter,
        carrier: Mapping[str, str],
    ) -> bool:
        """Move an entry to the dead letters; False if it is no longer the consumer's.

        Original bytes too large for a message travel as fields beside it: read entries of the
        stream with ``read_letter``.
        """
        try:
            fields = entry_fields(encode(_enveloped(letter)), carrier)
        except TooLarge:
            bare = letter.model_copy(update={"original": {}})
            fields = entry_fields(encode(_enveloped(bare)), carrier, letter.original)
        entry = self._entry(delivery)
        return await self._scripts.acknowledge(group, consumer, entry, self._key(DEAD), fields)

    # Readers

    async def read(
        self, stream: Stream, *, start: str = "-", end: str = "+", count: int | None = None
    ) -> list[Delivery]:
        """Entries of a stream from id ``start`` to ``end``, without any group."""
        entries = await self._client.xrange(self._key(stream), start, end, count)
        return self._deliveries([stream], [(self._key(stream).encode(), entries)], deliveries=0)

    async def newest(self, stream: Stream, *, count: int) -> list[Delivery]:
        """The last ``count`` entries of a stream, newest first."""
        entries = await self._client.xrevrange(self._key(stream), "+", "-", count)
        return self._deliveries([stream], [(self._key(stream).encode(), entries)], deliveries=0)

    async def follow(
        self, stream: Stream, *, last_id: str, block_seconds: float
    ) -> tuple[str, list[Delivery]]:
        """Up to 100 entries after ``last_id`` (``"0"`` all, ``"$"`` from now on), and the id to go
        on from; waits up to ``block_seconds`` for the first."""
        key = self._key(stream)
        if last_id == "$":
            # A real id, so that nothing is missed between this call and the next.
            last_id = await last_id_of(self._client, key)
        block = round(max(0.0, min(block_seconds, MAX_BLOCK)) * 1000) or None
        reply = await self._client.xread({key: last_id}, _BATCH, block)
        entries = self._deliveries([stream], reply, deliveries=0)
        return (entries[-1].entry_id if entries else last_id), entries

    async def pending(self, group: str, stream: Stream) -> Pending:
        """What a group has to do in a stream; all of it, if the group does not exist."""
        return await pending_of(self._client, self._key(stream), group)

    # Housekeeping

    async def trim(self) -> dict[str, int]:
        """Shorten streams to about ``stream_length``; the number of entries removed, by stream.

        What a group still needs stays, and work streams wait for their group. Consumers that have
        been silent for an hour with nothing pending are forgotten.
        """
        removed = {}
        for stream in STREAMS:
            key = self._key(stream)
            removed[stream.name] = await self._scripts.trim(
                key, self.settings.stream_length, cap=stream not in _KEPT
            )
            await forget_idle_consumers(self._client, self._scripts, key)
        return removed

    # Keys and replies

    def _key(self, stream: Stream) -> str:
        return stream.key(self.partition)

    def _named(self, *parts: str) -> str:
        return f"elesh:{{{self.partition}}}:" + ":".join(parts)

    def _entry(self, delivery: Delivery) -> tuple[str, str]:
        return self._key(delivery.stream), delivery.entry_id

    def _deliveries(
        self, streams: Sequence[Stream], reply: Any, *, deliveries: int
    ) -> list[Delivery]:
        by_key = {self._key(stream).encode(): stream for stream in streams}
        return deliveries_of(reply, by_key, deliveries)


def _enveloped(letter: DeadLetter) -> Message:
    return wrap(letter, source=letter.worker_id, priority=Priority.HIGH)
