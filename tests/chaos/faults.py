"""What the driver does to the fleet: a seeded schedule, and the log of what was done when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Fault", "Kind", "schedule"]


class Kind(StrEnum):
    """Kinds of faults."""

    KILL_WORKER = "kill worker"
    KILL_CHILD = "kill child"
    KILL_PRODUCER = "kill producer"
    DRAIN_WORKER = "drain worker"
    FREEZE_WORKER = "freeze worker"
    RESTART_SERVER = "restart server"
    FREEZE_SERVER = "freeze server"
    CUT = "cut connections"
    STALL = "stall connections"
    POISON = "poison message"
    REFUSE = "server refuses"
    UNBLOCK = "unblock readers"
    FAILOVER = "failover"
    RESTART_OWNER = "restart owner of the embedded server"


_WEIGHTS = {
    Kind.KILL_WORKER: 6, Kind.KILL_CHILD: 5, Kind.KILL_PRODUCER: 3, Kind.DRAIN_WORKER: 2,
    Kind.FREEZE_WORKER: 3, Kind.RESTART_SERVER: 2, Kind.FREEZE_SERVER: 1, Kind.CUT: 3,
    Kind.STALL: 1, Kind.POISON: 4, Kind.REFUSE: 4, Kind.UNBLOCK: 2,
    Kind.FAILOVER: 2, Kind.RESTART_OWNER: 3,
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One fault: what, to whom, from when to when (seconds since the epoch)."""

    kind: Kind
    target: str
    begun: float
    ended: float


def schedule(seed: int, mean_pause: float) -> Iterator[tuple[float, Kind, random.Random]]:
    """Endless: how long to wait, what to do then, and the chance to draw details from.

    It begins with the two that matter most and goes on with every kind once, in a random order.
    """
    chance = random.Random(seed)
    first = chance.sample(list(Kind), len(Kind))
    first += [Kind.RESTART_SERVER, Kind.KILL_WORKER]  # taken from the end: these begin
    while True:
        kind = first.pop() if first else chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        yield chance.expovariate(1 / mean_pause), kind, chance
