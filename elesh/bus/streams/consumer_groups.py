"""Consumer groups: claiming entries, renewing leases, requeueing, counting and shedding the
backlog. One worker of the fleet reaps for all.

Promises: an entry belongs to the consumer that claimed it until its lease runs out; releasing and
taking over are one atomic step each, and the entry keeps its history. Low priorities are shed
first, emergencies never.

At most one reaper at a time; one that dies is replaced when its own lease runs out, an eighth of an
entry's lease later. A pass moves delayed entries that are due, requeues entries whose owner's lease
ran out, and queues the join of plans past their deadline. The next pass comes no later than the
first lease runs out. After a silence of the server, in which no lease could be renewed, owners
first have the time of one and a half renewals, so that no living owner loses its lease. The death
of a reaper alone is no silence.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from redis.exceptions import ResponseError

from elesh.bus.errors import BusRefuses
from elesh.bus.scripts import Args, Shared, Store
from elesh.bus.server.client import MAX_BLOCK, Client
from leyline import Priority
from leyline.streams import REDELIVERIES, STREAMS, Stream

from .records import Delivery, Pending, deliveries_of


def _is_absent(error: ResponseError) -> bool:
    """Whether the stream or the group does not exist."""
    return "no such key" in str(error) or str(error).startswith("NOGROUP")


async def last_id(client: Client, key: str) -> str:
    """The id of the newest entry that a stream ever had, ``0-0`` for a stream to come."""
    try:
        stream: Any = await client.xinfo_stream(key)
    except ResponseError as error:
        if _is_absent(error):
            return "0-0"
        raise
    newest: bytes = stream["last-generated-id"]
    return newest.decode()


async def pending_of(client: Client, key: str, group: str) -> Pending:
    """A group's backlog in a stream; the whole stream, if the group does not exist."""
    try:
        groups: Any = await client.xinfo_groups(key)
        known = next((found for found in groups if found["name"] == group.encode()), None)
        if known is None:
            return Pending(0, None, {}, int(await client.xlen(key)))
        summary: Any = await client.xpending(key, group)
    except ResponseError as error:
        if _is_absent(error):
            return Pending(0, None, {}, 0)
        raise
    oldest = summary["min"]
    consumers = {owner["name"].decode(): owner["pending"] for owner in summary["consumers"]}
    return Pending(
        summary["pending"], oldest.decode() if oldest else None, consumers, known.get("lag")
    )


WORK = frozenset(stream for stream in STREAMS if stream.group)
"""Streams that a group works on; the others are trimmed instead."""
SHED_FROM = {
    Priority.LOW: 0.5,
    Priority.NORMAL: 0.75,
    Priority.HIGH: 0.85,
    Priority.CRITICAL: 0.95,
}
"""Share of ``stream_length`` that may wait before messages of a priority are shed."""


Cause = Literal["", "exception", "handover"]
"""Why an entry is requeued; empty for one that was claimed by accident and leaves no trace."""
_BATCH = 100


class Groups(Store):
    """What consumers of a partition do with stream entries."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._idle: set[str] = set()

    async def claim(
        self,
        group: str,
        consumer: str,
        streams: Sequence[Stream],
        *,
        count: int,
        block_seconds: float,
    ) -> list[Delivery]:
        """Up to ``count`` entries that the group has not seen, those of earlier streams first.

        Waits for the first if need be, at most ``MAX_BLOCK`` seconds whatever is asked for. A group
        that does not exist (yet, or any more) begins at the oldest entry.
        """
        by_key = {self._keys.stream(stream): stream for stream in streams}
        for _ in range(2):
            # A consumer that has just waited without result need not look before waiting again.
            if consumer not in self._idle or block_seconds <= 0:
                reply = await self._scripts.run("claim", [*by_key], [group, consumer, count])
                if reply is None:
                    await self._create(group, streams)
                    continue
                # Lua counts from one.
                claimed = deliveries_of([(streams[n - 1], entries) for n, entries in reply])
                if claimed or block_seconds <= 0:
                    return claimed
            block = max(1, round(min(block_seconds, MAX_BLOCK) * 1000))
            ids: Any = dict.fromkeys(by_key, ">")
            try:
                found: Any = await self._client.xreadgroup(group, consumer, ids, 1, block)
            except ResponseError:  # NOGROUP: any other is an outage
                await self._create(group, streams)
                continue
            claimed = deliveries_of((by_key[key.decode()], read) for key, read in found or ())
            if claimed:
                self._idle.discard(consumer)
            else:
                self._idle.add(consumer)
            # A waiting read has its count for each stream: what came at once on two is requeued.
            for surplus in claimed[count:]:
                await self.requeue(group, consumer, surplus)
            return claimed[:count]
        hint = "they are deleted, or the server evicts keys: maxmemory-policy noeviction"
        reason = f"NOGROUP streams lose their group {group} as soon as it is made"
        raise BusRefuses(self._client.url, "NOGROUP", reason, hint=hint)

    async def _create(self, group: str, streams: Sequence[Stream]) -> None:
        for stream in streams:
            try:
                await self._client.xgroup_create(
                    self._keys.stream(stream), group, "0", mkstream=True
                )
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def renew(
        self, group: str, consumer: str, deliveries: Sequence[Delivery]
    ) -> list[Delivery]:
        """Start the leases anew; the deliveries that are no longer the consumer's."""
        if not deliveries:
            return []
        keys = [self._keys.stream(delivery.stream) for delivery in deliveries]
        args = [group, consumer, *(delivery.entry_id for delivery in deliveries)]
        lost: list[int] = await self._scripts.run("renew", keys, args)
        return [deliveries[number - 1] for number in lost]

    async def requeue(
        self,
        group: str,
        consumer: str,
        delivery: Delivery,
        *,
        cause: Cause = "",
        detail: str = "",
        delay_seconds: float = 0.0,
    ) -> bool:
        """Send an entry round again; False if it is no longer the consumer's.

        It becomes an entry of the redeliveries with its history: for any worker, at once or,
        through the delayed set, after ``delay_seconds``.
        """
        args: list[str | int] = [group, consumer, delivery.entry_id, delivery.stream.name]
        args += [cause, consumer, detail[:512], round(delay_seconds * 1000)]
        keys = [self._keys.stream(each) for each in (delivery.stream, REDELIVERIES)]
        keys.append(self._keys.named("delayed"))
        return bool(await self._scripts.run("requeue", keys, args))

    async def requeue_all(self, group: str, consumer: str, streams: Sequence[Stream]) -> int:
        """Release whatever is pending with a consumer that ends; how many entries it was.

        That finds also what the server handed out while the consumer stopped listening.
        """
        given = 0
        for stream in streams:
            try:
                pending: Any = await self._client.xpending_range(
                    self._keys.stream(stream), group, "-", "+", _BATCH, consumer
                )
            except ResponseError as error:
                if "NOGROUP" in str(error):
                    continue
                raise
            for entry in pending:
                left = Delivery(stream, entry["message_id"].decode(), {}, 0)
                given += await self.requeue(group, consumer, left, cause="handover")
        return given

    async def leave(self, group: str, consumer: str, streams: Sequence[Stream]) -> None:
        """Have the group forget a consumer that ends; one with pending entries stays known."""
        for stream in streams:
            await self._scripts.run("leave", [self._keys.stream(stream)], [group, consumer])


_SCAN = 1000
"""Pending entries of a stream that one pass looks at."""
_MOVED = 100
"""Entries that one pass moves."""


@dataclass(frozen=True)
class Taken:
    """An entry that was taken from its owner."""

    stream: str
    entry_id: str
    owner: str


@dataclass(frozen=True)
class Reap:
    """What one pass did; ``held`` is False if another worker is the reaper."""

    held: bool
    wait_seconds: float
    """How long to wait before the next call."""
    resumed: int = 0
    """Delayed entries that went on."""
    taken: tuple[Taken, ...] = ()
    overdue: tuple[str, ...] = ()
    """Keys of plans whose join was queued by their deadline."""


class Reaper(Store):
    """Takes entries over from dead workers, while this worker holds the reaper's lease.

    Args:
        join_overdue: queues the join of a plan past its deadline; False if it was queued before.
    """

    def __init__(
        self,
        shared: Shared,
        join_overdue: Callable[[str], Awaitable[bool]],
        lease_seconds: float,
    ) -> None:
        super().__init__(shared)
        self._join_overdue = join_overdue
        self._lease = lease_seconds
        self.interval = lease_seconds / 12
        """Seconds between two passes, if nothing that the last one saw is due before."""

    async def reap(self, group: str, worker: str, streams: Sequence[Stream]) -> Reap:
        """Make one pass over ``streams``, if ``worker`` is or can become the reaper."""
        lease = self._lease * 1000
        keys = [self._keys.named(name) for name in ("reaper", "delayed", "deadlines", "heartbeat")]
        keys += [self._keys.stream(stream) for stream in (REDELIVERIES, *streams)]
        times = [max(1, round(lease * share)) for share in (0.125, 0.375, 1.0, 0.3)]
        names = [stream.name for stream in streams]
        args: Args = [worker, *times, group, _SCAN, _MOVED, *names]
        held, *reply = await self._scripts.run("reap", keys, args)
        if not held:
            return Reap(False, max(reply[0] / 1000, self.interval))
        resumed, taken, overdue, soonest = reply
        late = [key.decode() for key in overdue]
        joined = tuple([key for key in late if await self._join_overdue(key)])
        return Reap(
            True,
            min(self.interval, (soonest + 1) / 1000),
            resumed,
            tuple(Taken(*(part.decode() for part in entry)) for entry in taken),
            joined,
        )
