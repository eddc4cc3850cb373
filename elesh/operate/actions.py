"""Manual actions on breakers, shared by command line and console.

Promises: every action is published with who did it and why, and so ends up in the audit log; one
that cannot be written down is refused before anything is changed. A change of state is an event
like any other.
"""

from __future__ import annotations

import getpass
import os
import socket
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from elesh.bus import Bus, operator_action
from leyline import BreakerTransition, Level, OperatorAction
from leyline.base import Identifier
from leyline.network.bundle import first_error
from leyline.streams import OPERATIONS, TELEMETRY

BREAKERS = (Level.CHANNEL, Level.HEAD, Level.LAYER)
"""The levels that have a breaker: decisions of several levels ask that of each."""
_RUN_ID: TypeAdapter[str] = TypeAdapter(Identifier)


def operator() -> str:
    """The operator's name: user and host. In a container the user may have no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


async def trip_breaker(bus: Bus, run: str, level: Level, by: str, reason: str) -> None:
    """Open a breaker by hand; it recovers like any other.

    Raises:
        InvalidField: if ``run`` is no run's id, or who or why cannot be written down.
    """
    action = await _action(bus, "breaker_trip", run, level, by, reason)
    await _publish(bus, action, run, await bus.breakers.trip(run, level, reason))


async def reset_breaker(bus: Bus, run: str, level: Level, by: str, reason: str = "") -> None:
    """Close a breaker by hand and forget its failures.

    Raises:
        InvalidField: as :func:`trip_breaker`.
    """
    action = await _action(bus, "breaker_reset", run, level, by, reason)
    await _publish(bus, action, run, await bus.breakers.reset(run, level, reason))


async def _action(
    bus: Bus,
    action: Literal["breaker_trip", "breaker_reset"],
    run: str,
    level: Level,
    by: str,
    reason: str,
) -> OperatorAction:
    try:
        _RUN_ID.validate_python(run)
    except ValidationError as error:
        raise first_error(error, "run") from None
    return operator_action(action, f"{run}:{level}", by, reason, await bus.clock.now())


async def _publish(
    bus: Bus, action: OperatorAction, run: str, change: BreakerTransition | None
) -> None:
    outcome = f"{change.before} to {change.after}" if change else "as it was"
    action = action.model_copy(update={"outcome": outcome})
    await bus.publish(OPERATIONS, action, source="operator", run_id=run)
    if change is not None:
        await bus.publish(TELEMETRY, change, source="elesh", run_id=run)
