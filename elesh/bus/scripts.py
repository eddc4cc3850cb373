"""The Lua scripts of ``lua/``, each one atomic step on the server, and the names of their keys. A
partition has one prefix and one hash tag, so that Redis Cluster keeps it on one node and scripts
may touch several keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal, get_args

from redis.exceptions import NoScriptError

from elesh.bus.guard import Guard
from elesh.bus.server.client import Client, ServerClock
from leyline.streams import Stream


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


Name = Literal[
    "acknowledge", "audit", "backlog_statistics", "breaker", "claim", "claim_run", "commit", "drop",
    "heartbeat", "leave", "overdue", "plan", "publish", "reap", "redrive", "remember", "renew",
    "requeue", "store", "tidy", "touch",
]  # fmt: skip
_JOINING = frozenset({"overdue", "store"})


class Scripts:
    """The scripts as one client runs them, by the names of their files: by digest, or by text where
    the server has forgotten it, so that ``SCRIPT FLUSH`` cannot make a call fail."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._texts: dict[Name, tuple[str, str]] = {}
        folder = files(__package__) / "lua"
        common = (folder / "common.lua").read_text()
        joining = common + (folder / "joining.lua").read_text()
        for name in get_args(Name):
            text = (joining if name in _JOINING else common) + (folder / f"{name}.lua").read_text()
            digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            self._texts[name] = text, digest

    async def run(self, name: Name, keys: Sequence[str], args: Args = ()) -> Any:
        """What ``lua/<name>.lua`` replies; its first lines say what it wants, does and says."""
        text, digest = self._texts[name]
        try:
            return await self._client.evalsha(digest, len(keys), *keys, *args)
        except NoScriptError:
            return await self._client.eval(text, len(keys), *keys, *args)

    async def read(self, name: Name, keys: Sequence[str], args: Args = ()) -> Any:
        """As :meth:`run`, of one that changes nothing: the right to read its keys is enough."""
        text, digest = self._texts[name]
        try:
            return await self._client.evalsha_ro(digest, len(keys), *keys, *args)
        except NoScriptError:
            return await self._client.eval_ro(text, len(keys), *keys, *args)


@dataclass(frozen=True)
class Shared:
    """What the stores of one connection share."""

    client: Client
    scripts: Scripts
    keys: Keys
    guard: Guard
    clock: ServerClock


class Store:
    """What a partition keeps of one subject."""

    def __init__(self, shared: Shared) -> None:
        self._client, self._scripts, self._keys = shared.client, shared.scripts, shared.keys
        self._guard, self._clock = shared.guard, shared.clock
