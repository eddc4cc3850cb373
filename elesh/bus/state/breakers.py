"""Circuit breakers, one a run and level, shared by the whole fleet.

Promises: every operation is one atomic step by the server's clock. The n-th consecutive failure
opens; after the recovery time exactly one caller gets a probe, whose outcome closes or opens again;
a prober that died is replaced when its lease is over. A failure with a token counts once, however
often its message is delivered.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

from elesh.bus.errors import BusUnavailable
from elesh.bus.scripts import Scripts
from elesh.bus.server.client import Client
from elesh.settings import BreakerSettings
from leyline import BreakerTransition, Level

__all__ = ["BreakerStore", "BreakerView", "State"]

State = Literal["closed", "open", "half_open"]
_PROBE_MS = 60_000
_KEEP_MS = 7 * 86_400_000
_MAX_REASON = 1024


@dataclass(frozen=True)
class BreakerView:
    """A breaker as one operation saw or left it."""

    run_id: str
    level: Level
    state: State
    failures: int
    reason: str
    """Why it opened, or the last failure."""
    opened_at: datetime | None
    admitted: bool
    """Whether the caller may go ahead (from ``view``: whether it is closed)."""
    probe: bool = False
    """Whether the caller has the one probe of a half-open breaker."""


class BreakerStore:
    """The breakers of a partition."""

    def __init__(
        self, client: Client, scripts: Scripts, partition: str, settings: BreakerSettings
    ) -> None:
        self._client = client
        self._scripts = scripts
        self._prefix = f"elesh:{{{partition}}}:breaker"
        self._index = f"elesh:{{{partition}}}:breakers"
        recovery = max(1, round(settings.recovery_seconds * 1000))
        self._limits = (settings.failures, recovery, _PROBE_MS, _KEEP_MS + 2 * recovery)

    async def view(self, run_id: str, level: Level) -> BreakerView:
        """The breaker as it stands; nothing is admitted."""
        return (await self._run("view", run_id, level))[0]

    async def admit(self, run_id: str, level: Level) -> BreakerView:
        """Ask to go ahead; ``admitted`` is the answer, ``probe`` if it is the one trial.

        Whoever is admitted reports :meth:`success` or :meth:`failure`.
        """
        return (await self._run("admit", run_id, level))[0]

    async def failure(
        self, run_id: str, level: Level, reason: str, *, token: str = ""
    ) -> BreakerTransition | None:
        """Count a failure, once for each token; the transition, if the state changed."""
        return (await self._run("failure", run_id, level, reason, token))[1]

    async def success(self, run_id: str, level: Level) -> BreakerTransition | None:
        """Forget the failures so far and close after a probe; an open breaker stays open."""
        return (await self._run("success", run_id, level))[1]

    async def reset(self, run_id: str, level: Level) -> BreakerTransition | None:
        """Close by hand."""
        return (await self._run("reset", run_id, level, "reset by an operator"))[1]

    async def trip(self, run_id: str, level: Level, reason: str) -> BreakerTransition | None:
        """Open by hand; it recovers like any other."""
        return (await self._run("trip", run_id, level, reason))[1]

    async def show(self) -> list[BreakerView]:
        """Every breaker that is not closed or has failures, by run and level."""
        members: Any = await self._client.smembers(self._index)
        names = sorted(name.decode() for name in members)
        views = []
        for run_id, _, level in (name.rpartition(":") for name in names):
            view = (await self._run("look", run_id, Level(level)))[0]
            if view.state != "closed" or view.failures:
                views.append(view)
            else:
                # It expired: its name is forgotten, too, by who may.
                with contextlib.suppress(BusUnavailable):
                    await self.view(run_id, Level(level))
        return views

    async def _run(
        self, operation: str, run_id: str, level: Level, reason: str = "", token: str = ""
    ) -> tuple[BreakerView, BreakerTransition | None]:
        name = f"{run_id}:{level}"
        keys = [f"{self._prefix}:{name}", self._index]
        if token:
            keys.append(f"{self._prefix}-failure:{name}:{token}")
        args: list[str | int] = [operation, name, reason[:_MAX_REASON], *self._limits]
        run = self._scripts.look if operation == "look" else self._scripts.breaker
        reply = await run(keys, args)
        before, after = (cast(State, state.decode()) for state in reply[:2])
        failures, kept_reason, opened = reply[2], reply[3].decode(), reply[4]
        view = BreakerView(
            run_id,
            level,
            after,
            failures,
            kept_reason,
            _time(opened) if opened else None,
            admitted=bool(reply[6]),
            probe=bool(reply[7]),
        )
        if before == after:
            return view, None
        return view, BreakerTransition(
            run_id=run_id,
            level=level,
            before=before,
            after=after,
            failures=failures,
            reason=reason[:_MAX_REASON] or kept_reason,
            at=_time(reply[5]),
        )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
