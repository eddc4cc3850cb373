"""The Offline Cache's shared half: a run's measurements by epoch, kept in Redis.

Promises: one hash a run, one field an epoch, written once in one step, so that workers that run
side by side, redeliveries and replays give the same history; the newest epochs stay, within a
number and a size, and all of it is forgotten when the run has been silent for its time to live.
Losing it costs history, never correctness: no decision is made from it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from elesh.bus.scripts import Scripts
from elesh.bus.server.client import Client
from elesh.settings import BusSettings

__all__ = ["HistoryStore", "Kept"]

Kept = Literal["kept", "known", "conflict", "old"]


class HistoryStore:
    """The histories of a partition.

    Args:
        epochs: the most epochs kept a run (``importance_history_epochs``).
        nbytes: the most bytes kept a run (``analysis_cache_size``).
    """

    def __init__(
        self, client: Client, scripts: Scripts, settings: BusSettings, epochs: int, nbytes: int
    ) -> None:
        self._client = client
        self._scripts = scripts
        self._prefix = f"elesh:{{{settings.partition}}}:history"
        self._limits = (epochs, nbytes, settings.record_ttl_seconds)

    async def remember(self, run_id: str, epoch: int, blob: bytes) -> Kept:
        """Keep an epoch's measurements; ``conflict`` if the epoch holds others, which stay."""
        answer = await self._scripts.remember(self._key(run_id), epoch, blob, *self._limits)
        return cast(Kept, answer)

    async def epochs(self, run_id: str) -> list[int]:
        """The epochs that are kept, rising; none for a run that nobody remembers."""
        fields: Any = await self._client.hkeys(self._key(run_id))
        return sorted(map(int, fields))

    async def recall(self, run_id: str, epochs: Sequence[int]) -> dict[int, bytes]:
        """The blobs of these epochs, without those that are gone."""
        if not epochs:
            return {}
        blobs: Any = await self._client.hmget(self._key(run_id), [str(epoch) for epoch in epochs])
        return {e: blob for e, blob in zip(epochs, blobs, strict=True) if blob is not None}

    async def forget(self, run_id: str) -> None:
        """Drop a run's history."""
        await self._client.delete(self._key(run_id))

    def _key(self, run_id: str) -> str:
        return f"{self._prefix}:{run_id}"
