"""Circuit breakers, one a run and level, shared by the whole fleet.

Promises: every change is one atomic step, by the server's clock, made from the state that is there:
where another caller was faster it is made again. The n-th consecutive failure opens; after the
recovery time exactly one caller gets a probe, whose outcome closes or opens again; a prober that
died is replaced when its lease is over. A failure with a token counts once, however often its
message is delivered. The state is signed like the decisions that depend on it: one that is not
signed by a decider counts as open, until an operator resets it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import msgpack

from elesh.bus.errors import BusUnavailable
from elesh.bus.guard import Guard
from elesh.bus.scripts import Scripts
from elesh.bus.server.client import Client, ServerClock
from elesh.settings import BreakerSettings
from leyline import BreakerTransition, ContractError, Level
from leyline.streams import DECISIONS, OPERATIONS

__all__ = ["BreakerStore", "BreakerView", "State"]

State = Literal["closed", "open", "half_open"]
_PROBE_MS = 60_000
_KEEP_MS = 7 * 86_400_000
_MAX_REASON = 1024
_COUNTED = 64
"""Failures whose tokens are remembered."""


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


@dataclass(frozen=True)
class Circuit:
    """A breaker's state; times in milliseconds since 1970 by the server's clock."""

    state: State = "closed"
    failures: int = 0
    reason: str = ""
    opened_at: int = 0
    probe_until: int = 0
    counted: tuple[str, ...] = ()
    """Digests of the tokens of the last failures."""
    by_hand: str = ""
    """What an operator said who opened it; it stays until the breaker closes."""

    def opened(self, now: int) -> Circuit:
        """It as it opens."""
        return replace(self, state="open", opened_at=now, probe_until=0)

    def closed(self) -> Circuit:
        """It as it closes; which failures were counted is not forgotten."""
        return Circuit(counted=self.counted)

    def probed(self, now: int, recovery: int) -> Circuit:
        """It as it gives out a probe, if it may."""
        rested = self.state == "open" and now >= self.opened_at + recovery
        deserted = self.state == "half_open" and now >= self.probe_until
        if rested or deserted:
            return replace(self, state="half_open", probe_until=now + _PROBE_MS)
        return self

    def failed(self, now: int, limit: int, reason: str, token: str) -> Circuit:
        """It after a failure; a known token does not count again."""
        name = hashlib.sha256(token.encode()).hexdigest()[:16] if token else ""
        known = bool(name) and name in self.counted
        counted = (*self.counted, name)[-_COUNTED:] if name and not known else self.counted
        failures = self.failures + (not known)
        if self.by_hand:
            reason = f"{self.by_hand}; a failure since: {reason}"[:_MAX_REASON]
        failed = replace(self, failures=failures, reason=reason, counted=counted)
        # A probe that fails has failed, however often its message was delivered.
        if self.state == "half_open" or (self.state == "closed" and failures >= limit):
            return failed.opened(now)
        return failed

    def succeeded(self) -> Circuit:
        """It after a success; work that was admitted before it opened says nothing of recovery."""
        return self if self.state == "open" else self.closed()

    def encode(self) -> bytes:
        """Its bytes; none for one that has nothing to remember."""
        values = list(vars(self).values())
        if not self.by_hand:
            del values[-1]  # as workers of before know it
        data: bytes = msgpack.packb(values) if self != Circuit() else b""
        return data

    @classmethod
    def decode(cls, data: bytes) -> Circuit:
        """Of its bytes.

        Raises:
            ValueError, TypeError: if they are none.
        """
        state, failures, reason, opened_at, probe_until, counted, *rest = msgpack.unpackb(data)
        by_hand = str(rest[0]) if rest else ""
        return cls(state, failures, reason, opened_at, probe_until, tuple(counted), by_hand)


Step = Callable[[Circuit, int], Circuit]


class BreakerStore:
    """The breakers of a partition."""

    def __init__(
        self,
        client: Client,
        scripts: Scripts,
        guard: Guard,
        clock: ServerClock,
        partition: str,
        settings: BreakerSettings,
    ) -> None:
        self._client = client
        self._scripts = scripts
        self._guard = guard
        self._clock = clock
        self._prefix = f"elesh:{{{partition}}}:breaker"
        self._index = f"elesh:{{{partition}}}:breakers"
        self._failures = settings.failures
        self._recovery = max(1, round(settings.recovery_seconds * 1000))
        self._keep = _KEEP_MS + 2 * self._recovery

    async def view(self, run_id: str, level: Level) -> BreakerView:
        """The breaker as it stands; nothing is admitted."""
        _, circuit = await self._read(run_id, level)
        return _view(run_id, level, circuit)

    async def admit(self, run_id: str, level: Level) -> BreakerView:
        """Ask to go ahead; ``admitted`` is the answer, ``probe`` if it is the one trial.

        A worker that is admitted reports :meth:`success` or :meth:`failure`.
        """
        before, after, _ = await self._change(
            run_id, level, lambda now_is, now: now_is.probed(now, self._recovery)
        )
        view = _view(run_id, level, after)
        probe = before != after
        return replace(view, admitted=view.admitted or probe, probe=probe)

    async def failure(
        self, run_id: str, level: Level, reason: str, *, token: str = ""
    ) -> BreakerTransition | None:
        """Count a failure, once for each token; the transition, if the state changed."""
        reason = reason[:_MAX_REASON]
        return await self._transition(
            run_id,
            level,
            lambda now_is, now: now_is.failed(now, self._failures, reason, token),
            reason,
        )

    async def success(self, run_id: str, level: Level) -> BreakerTransition | None:
        """Forget the failures so far and close after a probe; an open breaker stays open."""
        return await self._transition(run_id, level, lambda now_is, _: now_is.succeeded())

    async def reset(self, run_id: str, level: Level, why: str = "") -> BreakerTransition | None:
        """Close by hand."""
        reason = f"reset by an operator{': ' if why else ''}{why}"[:_MAX_REASON]
        return await self._transition(run_id, level, lambda now_is, _: now_is.closed(), reason)

    async def trip(self, run_id: str, level: Level, reason: str) -> BreakerTransition | None:
        """Open by hand; it recovers like any other."""
        reason = reason[:_MAX_REASON]
        return await self._transition(
            run_id,
            level,
            lambda now_is, now: replace(now_is, reason=reason, by_hand=reason).opened(now),
            reason,
        )

    async def show(self) -> list[BreakerView]:
        """Every breaker that is not closed or has failures, by run and level."""
        members: Any = await self._client.smembers(self._index)
        names = sorted(name.decode(errors="replace") for name in members)
        views = []
        for run_id, _, level in (name.rpartition(":") for name in names):
            if level not in list(Level):
                continue  # written without the right to
            stored, circuit = await self._read(run_id, Level(level))
            view = _view(run_id, Level(level), circuit)
            if view.state != "closed" or view.failures:
                views.append(view)
            elif not stored:
                # It expired: its name is forgotten, too, by who may.
                with contextlib.suppress(BusUnavailable):
                    await self._write(run_id, Level(level), b"", Circuit())
        return views

    async def _transition(
        self, run_id: str, level: Level, step: Step, reason: str = ""
    ) -> BreakerTransition | None:
        before, after, now = await self._change(run_id, level, step)
        if before.state == after.state:
            return None
        return BreakerTransition(
            run_id=run_id,
            level=level,
            before=before.state,
            after=after.state,
            failures=after.failures,
            reason=reason or after.reason,
            at=_time(now),
        )

    async def _change(self, run_id: str, level: Level, step: Step) -> tuple[Circuit, Circuit, int]:
        """The circuit before and after a step, and the time; nothing is written where nothing
        changes."""
        while True:
            stored, before = await self._read(run_id, level)
            now = round((await self._clock.now()).timestamp() * 1000)
            after = step(before, now)
            if after == before or await self._write(run_id, level, stored, after):
                return before, after, now

    async def _read(self, run_id: str, level: Level) -> tuple[bytes, Circuit]:
        """The breaker's stored bytes, and what they say."""
        key = self._key(run_id, level)
        found: Any = await self._client.hmget(key, ["signed"])
        stored: bytes = found[0] or b""
        if not stored:
            return stored, Circuit()
        try:
            data = self._guard.state(key, stored, may=(DECISIONS, OPERATIONS))
            return stored, Circuit.decode(data)
        except (ContractError, ValueError, TypeError) as error:
            return stored, Circuit(state="open", reason=f"its state is not to be believed: {error}")

    async def _write(self, run_id: str, level: Level, stored: bytes, circuit: Circuit) -> bool:
        key, data = self._key(run_id, level), circuit.encode()
        signed = self._guard.frame_state(key, data) if data else b""
        listed = circuit.state != "closed" or circuit.failures > 0
        name = f"{run_id}:{level}"
        return await self._scripts.breaker(
            [key, self._index], [stored, signed, name, int(listed), self._keep]
        )

    def _key(self, run_id: str, level: Level) -> str:
        return f"{self._prefix}:{run_id}:{level}"


def _view(run_id: str, level: Level, circuit: Circuit) -> BreakerView:
    return BreakerView(
        run_id,
        level,
        circuit.state,
        circuit.failures,
        circuit.reason,
        _time(circuit.opened_at) if circuit.opened_at else None,
        admitted=circuit.state == "closed",
    )


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
