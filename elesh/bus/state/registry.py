"""The worker registry: every worker writes its status, all clients may read it.

Promises: one hash a worker, ``elesh:{partition}:worker:<id>``, written in one step and gone when
the worker has not been heard of for its time to live; ages are by the server's clock. Nothing is
decided from it: it is there to be looked at (``elesh status``, the console, metrics).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from elesh.bus.scripts import Args, Shared, Store
from leyline.streams import STREAMS, Stream

Doing = Literal["starting", "idle", "busy", "draining"]
ChildState = Literal["starting", "idle", "busy", "wedged", "dead"]


class WorkerState(BaseModel):
    """A worker as it last described itself; times are seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer worker may say more

    worker_id: str
    host: str = ""
    pid: int = 0
    version: str = ""
    started_at: float = 0.0
    heard_at: float = 0.0
    """When the server heard of it last, by the server's clock."""
    doing: Doing = "starting"
    child: ChildState = "starting"
    """The compute child: ``wedged`` if it neither answers nor computes."""
    ready: bool = False
    why: str = ""
    """Why it is not ready; empty where it is."""
    key: str = ""
    """What it works on."""
    since: float = 0.0
    """When it began that."""
    health_url: str = ""
    """Where its health and metrics are served; empty: nowhere."""
    completed: int = 0
    """Analyses that ended in a decision, since it started."""
    failed: int = 0
    """Analyses that ended in the dead letters."""
    fallbacks: int = 0
    dead_letters: int = 0
    duration_p95: float = 0.0
    """95th percentile of the last analyses' seconds."""
    peak_memory_bytes: int = 0
    """Highest resident size of its compute child."""


@dataclass(frozen=True)
class Backlog:
    """What a stream holds, and what its group has still to do."""

    length: int
    waiting: int | None
    """Never delivered to the group (its lag); None where the server cannot tell."""
    pending: int
    """Delivered and not yet acknowledged."""
    oldest_seconds: float | None
    """Age of the oldest entry that is not done; None if all are."""
    lease_seconds: float | None
    """The longest time since the lease of a pending entry was renewed."""


class Registry(Store):
    """The worker registry of a partition."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._index = self._keys.named("workers")
        self._token = secrets.token_hex(8)
        """Tells this process from another one whose worker has the same name."""

    async def heartbeat(self, state: WorkerState, *, seconds: float) -> WorkerState | None:
        """Write a worker's state; it is forgotten ``seconds`` after the last time.

        Returns None, or the other worker that has this name: then nothing is written.
        """
        values = state.model_dump(exclude={"heard_at"})
        fields = [str(part) for pair in values.items() for part in pair]
        name, milliseconds = state.worker_id, round(seconds * 1000)
        keys = [self._keys.named("worker", name), self._index]
        args: Args = [name, milliseconds, self._token, *fields]
        if await self._scripts.run("heartbeat", keys, args):
            return None
        return _read(await self._hash(name)) or state

    async def take_over(self, state: WorkerState, *, seconds: float) -> None:
        """Write a worker's state over that of one which is gone."""
        await self._client.delete(self._keys.named("worker", state.worker_id))
        await self.heartbeat(state, seconds=seconds)

    async def forget(self, worker_id: str) -> None:
        """Forget a worker that ended in order, unless another one has taken over its name."""
        (token,) = await self._client.hmget(self._keys.named("worker", worker_id), ["token"])
        if token in (None, self._token.encode()):
            await self._client.zrem(self._index, worker_id)
            await self._client.delete(self._keys.named("worker", worker_id))

    async def workers(self) -> list[WorkerState]:
        """The workers that are alive, by name."""
        names: Any = await self._client.zrange(self._index, 0, -1)
        stored = [await self._hash(name.decode(errors="replace")) for name in sorted(names)]
        return [state for values in stored if (state := _read(values)) is not None]

    async def backlog(self, streams: Sequence[Stream] = STREAMS) -> dict[str, Backlog]:
        """The figures of each stream, by its short name; one command whatever their number."""
        keys = [self._keys.stream(stream) for stream in streams]
        groups = [stream.group for stream in streams]
        found = await self._scripts.read("backlog_statistics", keys, groups)
        return {
            stream.name: Backlog(
                length, None if lag < 0 else lag, pending, _seconds(oldest), _seconds(lease)
            )
            for stream, (length, lag, pending, oldest, lease) in zip(streams, found, strict=True)
        }

    async def _hash(self, worker_id: str) -> dict[bytes, bytes]:
        stored: Any = await self._client.hgetall(self._keys.named("worker", worker_id))
        return dict(stored)


def _read(values: dict[bytes, bytes]) -> WorkerState | None:
    """The state in a hash; None for one that has just expired or cannot be read."""
    try:
        return WorkerState(**{name.decode(): value.decode() for name, value in values.items()})  # type: ignore[arg-type]
    except (ValidationError, UnicodeDecodeError, TypeError):
        return None


def _seconds(milliseconds: int) -> float | None:
    return None if milliseconds < 0 else milliseconds / 1000
