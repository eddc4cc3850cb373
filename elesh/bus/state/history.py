"""The Offline Cache's shared half: a run's measurements by epoch, kept in Redis.

Promises: one hash a run, one field an epoch, written once in one step, so that workers that run
side by side, redeliveries and replays give the same history; the newest epochs stay, within a
number and a size, and all of it is forgotten when the run has been silent for its time to live.
Losing it costs history, never correctness: no decision is made from it alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, cast

from elesh.bus.guard import Guard
from elesh.bus.scripts import Scripts
from elesh.bus.server.client import Client
from elesh.settings import BusSettings
from leyline import ContractError

__all__ = ["HistoryStore", "Kept"]

_log = logging.getLogger(__name__)

Kept = Literal["kept", "known", "conflict", "old"]


class HistoryStore:
    """The histories of a partition.

    Args:
        epochs: the most epochs kept a run (``importance_history_epochs``).
        nbytes: the most bytes kept a run (``analysis_cache_size``).
    """

    def __init__(
        self,
        client: Client,
        scripts: Scripts,
        guard: Guard,
        settings: BusSettings,
        epochs: int,
        nbytes: int,
    ) -> None:
        self._client = client
        self._guard = guard
        self._scripts = scripts
        self._prefix = f"elesh:{{{settings.partition}}}:history"
        self._limits = (epochs, nbytes, settings.record_ttl_seconds)

    async def remember(self, run_id: str, epoch: int, blob: bytes) -> Kept:
        """Keep an epoch's measurements; ``conflict`` if the epoch holds others, which stay."""
        signed = self._guard.frame_state(self._place(run_id, epoch), blob)
        answer = await self._scripts.remember(self._key(run_id), epoch, signed, *self._limits)
        # Another worker's signature of the same measurements is no other measurement.
        if answer == "conflict" and (await self.recall(run_id, [epoch])).get(epoch) == blob:
            return "known"
        return cast(Kept, answer)

    async def epochs(self, run_id: str) -> list[int]:
        """The epochs that are kept, rising; none for an unknown run."""
        fields: Any = await self._client.hkeys(self._key(run_id))
        return sorted(int(field) for field in fields if field.isdigit())

    async def recall(self, run_id: str, epochs: Sequence[int]) -> dict[int, bytes]:
        """The blobs of these epochs, without those that are gone or not signed by a key
        that may decide."""
        if not epochs:
            return {}
        blobs: Any = await self._client.hmget(self._key(run_id), [str(epoch) for epoch in epochs])
        found = {}
        for epoch, signed in zip(epochs, blobs, strict=True):
            if signed is not None:
                try:
                    found[epoch] = self._guard.state(self._place(run_id, epoch), signed)
                except ContractError as error:
                    _log.warning("measurements passed over: %s, epoch %d: %s", run_id, epoch, error)
        return found

    async def forget(self, run_id: str) -> None:
        """Drop a run's history."""
        await self._client.delete(self._key(run_id))

    def _place(self, run_id: str, epoch: int) -> str:
        return f"{self._key(run_id)}#{epoch}"

    def _key(self, run_id: str) -> str:
        return f"{self._prefix}:{run_id}"
