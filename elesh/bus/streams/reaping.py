"""Reaping: one worker of the fleet keeps time for all of them.

Promises: at most one reaper at a time; one that dies is replaced when its own lease runs out, an
eighth of an entry's lease later. A pass moves delayed entries that are due, requeues
entries whose owner's lease ran out, and queues the join of plans past their deadline. The next pass
comes no later than the first lease runs out. After a silence of the server, in which no lease could
be renewed, owners first have the time of one and a half renewals, so that no living owner loses its
lease. The death of a reaper alone is no silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elesh.bus.scripts import Args, Keys, Scripts
from leyline.streams import REDELIVERIES, Stream

from .fan_out import PlanStore

__all__ = ["Reap", "Reaper", "Taken"]

_SCAN = 1000
"""Pending entries of a stream that one pass looks at."""
_BATCH = 100
"""Entries that one pass moves."""


@dataclass(frozen=True)
class Taken:
    """An entry that was taken from its owner."""

    stream: str
    entry_id: str
    owner: str


@dataclass(frozen=True)
class Reap:
    """What one pass did; ``held`` is False if another worker is the reaper."""

    held: bool
    wait_seconds: float
    """How long to wait before the next call."""
    resumed: int = 0
    """Delayed entries that went on."""
    taken: tuple[Taken, ...] = ()
    overdue: tuple[str, ...] = ()
    """Keys of plans whose join was queued by their deadline."""


class Reaper:
    """The reaper's office, as one connection sees it."""

    def __init__(
        self, scripts: Scripts, keys: Keys, plans: PlanStore, lease_seconds: float
    ) -> None:
        self._scripts = scripts
        self._keys = keys
        self._plans = plans
        self._lease = lease_seconds
        self.interval = lease_seconds / 12
        """Seconds between two passes, if nothing that the last one saw is due before."""

    async def reap(self, group: str, worker: str, streams: Sequence[Stream]) -> Reap:
        """Make one pass over ``streams``, if ``worker`` is or can become the reaper."""
        lease = self._lease * 1000
        keys = [self._keys.named(name) for name in ("reaper", "delayed", "deadlines", "heartbeat")]
        keys += [self._keys.stream(stream) for stream in (REDELIVERIES, *streams)]
        times = [max(1, round(lease * share)) for share in (0.125, 0.375, 1.0, 0.3)]
        names = [stream.name for stream in streams]
        args: Args = [worker, *times, group, _SCAN, _BATCH, *names]
        held, *reply = await self._scripts.run("reap", keys, args)
        if not held:
            return Reap(False, max(reply[0] / 1000, self.interval))
        resumed, taken, overdue, soonest = reply
        late = [key.decode() for key in overdue]
        joined = tuple([key for key in late if await self._plans.join_overdue(key)])
        return Reap(
            True,
            min(self.interval, (soonest + 1) / 1000),
            resumed,
            tuple(Taken(*(part.decode() for part in entry)) for entry in taken),
            joined,
        )
