"""What operators do to breakers by hand, the same from the command line and from the console.

Promises: every action is published with who did it and why, and so ends up in the audit log;
a change of state is an event like any other.
"""

from __future__ import annotations

import getpass
import socket
from datetime import UTC, datetime
from typing import Literal

from elesh.bus import Bus
from leyline import BreakerTransition, Level, OperatorAction
from leyline.streams import OPERATIONS, TELEMETRY

__all__ = ["BREAKERS", "operator", "reset_breaker", "trip_breaker"]

BREAKERS = (Level.CHANNEL, Level.HEAD, Level.LAYER)
"""The levels that have a breaker: decisions of several levels ask that of each."""


def operator() -> str:
    """Who sits at this machine: user and host."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


async def trip_breaker(bus: Bus, run: str, level: Level, by: str, reason: str) -> None:
    """Open a breaker by hand; it recovers like any other."""
    change = await bus.breakers.trip(run, level, reason)
    await _publish(bus, "breaker_trip", run, level, by, reason, change)


async def reset_breaker(bus: Bus, run: str, level: Level, by: str, reason: str = "") -> None:
    """Close a breaker by hand and forget its failures."""
    change = await bus.breakers.reset(run, level, reason)
    await _publish(bus, "breaker_reset", run, level, by, reason, change)


async def _publish(
    bus: Bus,
    action: Literal["breaker_trip", "breaker_reset"],
    run: str,
    level: Level,
    by: str,
    reason: str,
    change: BreakerTransition | None,
) -> None:
    outcome = f"{change.before} to {change.after}" if change else "as it was"
    action_event = OperatorAction(
        action=action,
        subject=f"{run}:{level}",
        operator=by,
        at=datetime.now(UTC),
        reason=reason,
        outcome=outcome,
    )
    await bus.publish(OPERATIONS, action_event, source="operator", run_id=run)
    if change is not None:
        await bus.publish(TELEMETRY, change, source="elesh", run_id=run)
