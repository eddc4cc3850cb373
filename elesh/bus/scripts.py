"""The Lua scripts of ``lua/`` as typed functions; each is one atomic step on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from .client import Client

__all__ = ["Entry", "Fields", "Scripts"]

Fields = Sequence[str | bytes]
"""A stream entry's names and values in turn."""
Entry = tuple[str, str]
"""A stream's key and an entry's id."""


class Scripts:
    """The scripts as one client runs them (by digest; loaded again where the server lost them)."""

    def __init__(self, client: Client) -> None:
        folder = files(__package__) / "lua"
        common = (folder / "common.lua").read_text()

        def load(name: str, before: str = "") -> Any:
            return client.register_script(before + (folder / f"{name}.lua").read_text())

        self._publish = load("publish", common)
        self._renew = load("renew", common)
        self._release = load("release", common)
        self._settle = load("settle", common)
        self._acknowledge = load("acknowledge", common)
        self._redrive = load("redrive", common)
        self._drop = load("drop", common)
        self._leave = load("leave")
        self._trim = load("trim")
        self._touch = load("touch")
        self._breaker = load("breaker")
        self._audit = load("audit", common)
        self._remember = load("remember")
        self._beat = load("beat")
        self._census = load("census")

    async def publish(self, stream: str, marker: str, seconds: int, fields: Fields) -> str:
        """Append once for each marker; the entry's id, new or known."""
        entry: bytes = await self._publish([stream, marker], [seconds, *fields])
        return entry.decode()

    async def renew(self, group: str, consumer: str, entries: Sequence[Entry]) -> list[int]:
        """Renew the leases that are still the consumer's; the positions of the others."""
        args = [group, consumer, *(entry for _, entry in entries)]
        lost: list[int] = await self._renew([stream for stream, _ in entries], args)
        return [position - 1 for position in lost]

    async def release(
        self, group: str, consumer: str, entries: Sequence[tuple[Entry, int]], lease: int
    ) -> None:
        """Give entries back, with the number of deliveries each shall have counted."""
        args = [part for (_, entry), deliveries in entries for part in (entry, deliveries)]
        await self._release([stream for (stream, _), _ in entries], [group, consumer, lease, *args])

    async def settle(
        self,
        group: str,
        consumer: str,
        entry: Entry,
        decisions: str,
        seconds: int,
        results: Sequence[tuple[str, str, Fields]],
    ) -> list[str]:
        """Settle results (record's key, fingerprint, fields); a verdict for each."""
        args: list[str | bytes | int] = [group, consumer, entry[1], seconds]
        for _, fingerprint, fields in results:
            args += [fingerprint, len(fields), *fields]
        keys = [entry[0], decisions, *(record for record, _, _ in results)]
        return [verdict.decode() for verdict in await self._settle(keys, args)]

    async def acknowledge(
        self, group: str, consumer: str, entry: Entry, stream: str = "", fields: Fields = ()
    ) -> bool:
        """Acknowledge an entry and append to ``stream`` if named; False if it is not owned."""
        keys = [entry[0], stream] if stream else [entry[0]]
        return bool(await self._acknowledge(keys, [group, consumer, entry[1], *fields]))

    async def redrive(
        self, keys: Sequence[str], letter: str, fields: Fields, audit: Fields
    ) -> tuple[str, bool] | None:
        """Publish a letter's original once: its entry and whether it is new; None: no letter."""
        reply = await self._redrive(keys, [letter, len(fields), *fields, *audit])
        return (reply[0].decode(), bool(reply[1])) if reply else None

    async def drop(self, keys: Sequence[str], letter: str, audit: Fields) -> bool:
        """Delete a letter and append the audit event; False if there is no such letter."""
        return bool(await self._drop(keys, [letter, *audit]))

    async def leave(self, stream: str, group: str, consumer: str) -> bool:
        """Forget a consumer that has nothing pending."""
        return bool(await self._leave([stream], [group, consumer]))

    async def trim(self, stream: str, length: int, *, cap: bool) -> int:
        """Shorten a stream; the number of entries removed."""
        removed: int = await self._trim([stream], [length, int(cap)])
        return removed

    async def touch(self, keys: Sequence[str], seconds: int, chunk_seconds: int) -> bool:
        """Lengthen a blob's life; False if a part is missing."""
        return bool(await self._touch(keys, [seconds, chunk_seconds]))

    async def breaker(self, keys: Sequence[str], args: Sequence[str | int]) -> list[Any]:
        """Run one operation of a circuit breaker; see ``lua/breaker.lua``."""
        reply: list[Any] = await self._breaker(keys, args)
        return reply

    async def audit(
        self,
        keys: tuple[str, str],
        expected: str,
        last: tuple[int, str],
        cursors: Mapping[str, str],
        entries: Sequence[Fields],
    ) -> bool:
        """Append entries (their fields) to the chain whose head has the ``expected`` digest, and
        move cursors; False if the head has moved on."""
        args: list[str | bytes | int] = [expected, *last, len(cursors)]
        args += [part for pair in cursors.items() for part in pair]
        for fields in entries:
            args += [len(fields), *fields]
        return bool(await self._audit(list(keys), args))

    async def beat(
        self, worker: str, index: str, name: str, milliseconds: int, fields: Fields
    ) -> None:
        """Write a worker's hash with its time to live; see ``lua/beat.lua``."""
        await self._beat([worker, index], [name, milliseconds, *fields])

    async def census(self, streams: Sequence[str], groups: Sequence[str]) -> list[list[int]]:
        """Five figures a stream; see ``lua/census.lua``."""
        reply: list[list[int]] = await self._census(list(streams), list(groups))
        return reply

    async def remember(
        self, key: str, epoch: int, blob: bytes, epochs: int, nbytes: int, seconds: int
    ) -> str:
        """Keep one epoch of a run's history; see ``lua/remember.lua``."""
        answer: bytes = await self._remember([key], [epoch, blob, epochs, nbytes, seconds])
        return answer.decode()
