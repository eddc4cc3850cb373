"""What operators and the janitor ask of a stream: how much is pending, and to shorten it."""

from __future__ import annotations

from typing import Any

from redis.exceptions import ResponseError

from .client import Client
from .records import Pending
from .scripts import Scripts

__all__ = ["forget_idle_consumers", "last_id", "pending_of"]

_IDLE_MS = 3_600_000


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


async def forget_idle_consumers(client: Client, scripts: Scripts, key: str) -> None:
    """Forget the consumers of a stream that have been silent for an hour with nothing pending."""
    try:
        groups: Any = await client.xinfo_groups(key)
        for group in groups:
            consumers: Any = await client.xinfo_consumers(key, group["name"])
            for consumer in consumers:
                if consumer["idle"] > _IDLE_MS and not consumer["pending"]:
                    names = group["name"].decode(), consumer["name"].decode()
                    await scripts.leave(key, *names)
    except ResponseError as error:
        if not _is_absent(error):
            raise
