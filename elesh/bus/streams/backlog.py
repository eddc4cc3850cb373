"""How much is pending in a stream, where it ends, and what is shed while too much waits: low
priorities first, emergencies never."""

from __future__ import annotations

import math
from typing import Any

from redis.exceptions import ResponseError

from elesh.bus.server.client import Client
from leyline import Priority
from leyline.streams import STREAMS, Stream

from .records import Pending

__all__ = ["SHED_FROM", "WORK", "last_id", "pending_of", "shed_from"]


def _is_absent(error: ResponseError) -> bool:
    """Whether stream or group do not exist (yet, or any more)."""
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
    """What a group has to do in a stream; all of it, if the group does not exist."""
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


def shed_from(stream: Stream, priority: Priority, length: int) -> int:
    """The backlog from which a priority is shed of a stream that may hold ``length`` entries; 0
    for what is never shed."""
    share = SHED_FROM.get(priority, 0.0) if stream in WORK else 0.0
    return math.ceil(share * length)
