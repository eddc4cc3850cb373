"""The Lua scripts of ``lua/`` as typed functions, each one atomic step on the server, and the names
of the keys that they touch: one prefix and one hash tag a partition, so that Redis Cluster holds a
partition on one node and scripts may touch several of its keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from redis.exceptions import NoScriptError

from elesh.bus.server.client import Client
from leyline.streams import Stream

__all__ = ["Args", "Entry", "Keys", "Scripts"]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one partition."""

    partition: str

    def stream(self, stream: Stream) -> str:
        """The key of a stream."""
        return stream.key(self.partition)

    def named(self, *parts: str) -> str:
        """Any other key."""
        return f"elesh:{{{self.partition}}}:" + ":".join(parts)


Args = Sequence[str | bytes | int]
"""What a script gets besides its keys, in the order that its first lines say."""
Entry = tuple[str, str]
"""A stream's key and an entry's id."""


class Script:
    """A script as one client runs it: by its digest, or by its text where the server has forgotten
    it, so that ``SCRIPT FLUSH`` cannot make a call fail."""

    def __init__(self, client: Client, text: str) -> None:
        self._client, self.script = client, text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, keys: Sequence[str], args: Sequence[str | bytes | int] = ()) -> Any:
        """Run it."""
        try:
            return await self._client.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await self._client.eval(self.script, len(keys), *keys, *args)

    async def reading(self, keys: Sequence[str], args: Sequence[str | bytes | int] = ()) -> Any:
        """Run one that changes nothing, for which the right to read its keys is enough."""
        try:
            return await self._client.evalsha_ro(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await self._client.eval_ro(self.script, len(keys), *keys, *args)


class Scripts:
    """The scripts of one client."""

    def __init__(self, client: Client) -> None:
        folder = files(__package__) / "lua"
        common = (folder / "common.lua").read_text()
        joining = common + (folder / "joining.lua").read_text()

        def load(name: str, before: str = "") -> Script:
            return Script(client, before + (folder / f"{name}.lua").read_text())

        self._publish = load("publish", common)
        self._claim = load("claim")
        self._renew = load("renew", common)
        self._requeue = load("requeue", common)
        self._reap = load("reap", common)
        self._commit = load("commit", common)
        self._acknowledge = load("acknowledge", common)
        self._plan = load("plan", common)
        self._store = load("store", joining)
        self._overdue = load("overdue", joining)
        self._redrive = load("redrive", common)
        self._drop = load("drop", common)
        self._leave = load("leave")
        self._tidy = load("tidy")
        self._touch = load("touch")
        self._breaker = load("breaker")
        self._claim_run = load("claim_run")
        self._audit = load("audit", common)
        self._remember = load("remember")
        self._heartbeat = load("heartbeat")
        self._backlog_statistics = load("backlog_statistics")

    async def publish(self, keys: Sequence[str], args: Args) -> tuple[str, str]:
        """Append once for each marker: what became of it, and the entry's id; see
        ``lua/publish.lua``."""
        verdict, value = await self._publish(keys, args)
        return verdict.decode(), value.decode()

    async def claim(
        self, streams: Sequence[str], group: str, consumer: str, count: int
    ) -> list[tuple[int, Any]] | None:
        """New entries without waiting: the position of their stream (from 0) and the entries; None
        if a group is missing."""
        found: list[Any] | None = await self._claim(streams, [group, consumer, count])
        if found is None:
            return None
        return [(number - 1, entries) for number, entries in found]

    async def renew(self, group: str, consumer: str, entries: Sequence[Entry]) -> list[int]:
        """Renew the leases that are still the consumer's; the positions of the others."""
        args = [group, consumer, *(entry for _, entry in entries)]
        lost: list[int] = await self._renew([stream for stream, _ in entries], args)
        return [position - 1 for position in lost]

    async def requeue(self, entry: Entry, again: str, delayed: str, args: Args) -> bool:
        """Give an entry back; False if it is not owned. See ``lua/requeue.lua``."""
        return bool(await self._requeue([entry[0], again, delayed], args))

    async def reap(self, keys: Sequence[str], args: Args) -> list[Any]:
        """One pass of the reaper; see ``lua/reap.lua``."""
        reply: list[Any] = await self._reap(keys, args)
        return reply

    async def commit(self, keys: Sequence[str], args: Args) -> str:
        """Commit an entry's result; the verdict. See ``lua/commit.lua``."""
        verdict: bytes = await self._commit(keys, args)
        return verdict.decode()

    async def acknowledge(self, keys: Sequence[str], args: Args) -> bool:
        """Acknowledge an entry, append and delete; False if it is not owned."""
        return bool(await self._acknowledge(keys, args))

    async def plan(self, keys: Sequence[str], args: Args) -> str:
        """Make a checkpoint into parts; see ``lua/plan.lua``."""
        verdict: bytes = await self._plan(keys, args)
        return verdict.decode()

    async def store(self, keys: Sequence[str], args: Args) -> str:
        """Store a part's result; see ``lua/store.lua``."""
        verdict: bytes = await self._store(keys, args)
        return verdict.decode()

    async def overdue(self, keys: Sequence[str], plan: str) -> bool:
        """Queue the join of a plan; False if it was queued before."""
        return bool(await self._overdue(keys, [plan]))

    async def redrive(
        self, keys: Sequence[str], dead_letter: str, fields: Args, audit: Args
    ) -> tuple[str, bool] | None:
        """Publish a dead letter's original once: its entry, and whether it is new; or None."""
        reply = await self._redrive(keys, [dead_letter, len(fields), *fields, *audit])
        return (reply[0].decode(), bool(reply[1])) if reply else None

    async def drop(self, keys: Sequence[str], dead_letter: str, audit: Args) -> bool:
        """Delete a dead letter and append the audit event; False if there is none."""
        return bool(await self._drop(keys, [dead_letter, *audit]))

    async def leave(self, stream: str, group: str, consumer: str) -> bool:
        """Forget a consumer that has nothing pending."""
        return bool(await self._leave([stream], [group, consumer]))

    async def tidy(
        self, streams: Sequence[str], length: int, silence: int, capped: Sequence[bool]
    ) -> list[int]:
        """Shorten streams and forget silent consumers; the number of entries removed of each."""
        removed: list[int] = await self._tidy(streams, [length, silence, *map(int, capped)])
        return removed

    async def touch(self, keys: Sequence[str], seconds: int, chunk_seconds: int) -> bool:
        """Lengthen a blob's life; False if a part is missing."""
        return bool(await self._touch(keys, [seconds, chunk_seconds]))

    async def breaker(self, keys: Sequence[str], args: Args) -> bool:
        """Replace a circuit breaker's state; False if another was faster. See
        ``lua/breaker.lua``."""
        return bool(await self._breaker(keys, args))

    async def audit(
        self,
        keys: tuple[str, str],
        expected: str,
        last: tuple[int, str],
        fields: Mapping[str, str | bytes],
        entries: Sequence[Args],
    ) -> bool:
        """Append entries (their fields) to the chain whose head has the ``expected`` digest, and
        set fields of the head; False if the head has moved on."""
        args: list[str | bytes | int] = [expected, *last, len(fields)]
        args += [part for pair in fields.items() for part in pair]
        for entry in entries:
            args += [len(entry), *entry]
        return bool(await self._audit(list(keys), args))

    async def heartbeat(
        self, worker: str, index: str, name: str, milliseconds: int, token: str, fields: Args
    ) -> bool:
        """Write a worker's hash with its time to live; False if another token has the name. See
        ``lua/heartbeat.lua``."""
        return bool(await self._heartbeat([worker, index], [name, milliseconds, token, *fields]))

    async def backlog_statistics(
        self, streams: Sequence[str], groups: Sequence[str]
    ) -> list[list[int]]:
        """Five figures a stream; see ``lua/backlog_statistics.lua``."""
        reply: list[list[int]] = await self._backlog_statistics.reading(streams, groups)
        return reply

    async def remember(
        self, key: str, epoch: int, blob: bytes, epochs: int, nbytes: int, seconds: int
    ) -> str:
        """Keep one epoch of a run's history; see ``lua/remember.lua``."""
        answer: bytes = await self._remember([key], [epoch, blob, epochs, nbytes, seconds])
        return answer.decode()

    async def claim_run(
        self, claim: str, token: str, who: str, milliseconds: int
    ) -> list[Any] | None:
        """Claim a run for a token; None, or its holder and the milliseconds that it has left."""
        held: list[Any] | None = await self._claim_run([claim], [token, who, milliseconds])
        return held
