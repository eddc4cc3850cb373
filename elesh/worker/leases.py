"""What a worker holds: claimed, kept by renewed leases, requeued when it ends.

Promises: a lease is renewed four times in its length, through a drain and however long the child
computes, as long as the entry is still this worker's; a lost lease is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elesh.bus import Bus, Delivery, repeatedly
from leyline.streams import WORKERS, Stream

__all__ = ["Leases"]


class Leases:
    """The entries that one worker holds.

    Args:
        on_lost: called with an entry that is not this worker's any more: another one has it, or it
            was ended while the renewal was under way.
    """

    def __init__(
        self,
        bus: Bus,
        worker_id: str,
        streams: Sequence[Stream],
        on_lost: Callable[[Delivery], None],
    ) -> None:
        self._bus = bus
        self._worker_id = worker_id
        self._streams = streams
        self._on_lost = on_lost
        self._held: list[Delivery] = []

    async def claim(
        self, streams: Sequence[Stream], count: int, block_seconds: float
    ) -> list[Delivery]:
        """Up to ``count`` entries, whose leases are kept from now on."""
        claimed = await self._bus.claim(
            WORKERS, self._worker_id, streams, count=count, block_seconds=block_seconds
        )
        self._held += claimed
        return claimed

    def drop(self, delivery: Delivery) -> None:
        """Forget an entry that was served, lost or requeued."""
        self._held = [held for held in self._held if held is not delivery]

    async def release(self, delivery: Delivery, detail: str, delay_seconds: float = 0.0) -> bool:
        """Give an entry back that was not begun; its delivery does not count."""
        self.drop(delivery)
        return await self._bus.groups.requeue(
            WORKERS,
            self._worker_id,
            delivery,
            cause="handover",
            detail=detail,
            delay_seconds=delay_seconds,
        )

    async def retry(self, delivery: Delivery, detail: str, delay_seconds: float) -> bool:
        """Have an entry served again after a while: this worker failed with it."""
        return await self._bus.groups.requeue(
            WORKERS,
            self._worker_id,
            delivery,
            cause="exception",
            detail=detail,
            delay_seconds=delay_seconds,
        )

    async def leave(self) -> int:
        """Give everything back and leave the group; how many entries it was."""
        self._held = []
        given = await self._bus.groups.requeue_all(WORKERS, self._worker_id, self._streams)
        await self._bus.groups.leave(WORKERS, self._worker_id, self._streams)
        return given

    async def keep(self) -> None:
        """Renew what is held until cancelled."""
        seconds = self._bus.settings.lease_seconds / 4
        # After an outage owners have a grace of 3/8 of a lease to renew in.
        await repeatedly(
            "renewing leases", self._renew, self._bus.outage, after=seconds, longest=seconds / 2
        )

    async def _renew(self) -> float:
        held = list(self._held)
        for lost in await self._bus.renew(WORKERS, self._worker_id, held):
            if lost in self._held:
                self._on_lost(lost)
        return self._bus.settings.lease_seconds / 4
