"""What operators ask of a stream: how much is pending, and where it ends."""

from __future__ import annotations

from typing import Any

from redis.exceptions import ResponseError

from elesh.bus.server.client import Client

from .records import Pending

__all__ = ["last_id", "pending_of"]


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
