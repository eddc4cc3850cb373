"""State of a training run on the bus: its claim, rolled-back cuts, errors of predictions, and
measurements of earlier checkpoints.

Promises: a claim is taken, renewed and given up in one atomic step by the server's clock, and that
of a holder that is gone ends with its lease; a cut that was taken back is kept as long as decisions
are. Both are signed like the decisions that are made from them.

The history of measurements (the Offline Cache's shared half) is one hash a run, one field an epoch,
written once in one step, so that workers that run side by side, redeliveries and replays give the
same history; the newest epochs stay, within a number and a size, and all of it is forgotten when
the run has been silent for its time to live. Losing it costs history, never correctness: no
decision is made from it alone.

Circuit breakers, one a run and level, shared by the whole fleet.

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
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, cast

import msgpack

from elesh.bus.errors import BusUnavailable
from elesh.bus.scripts import Args, Shared, Store
from elesh.settings import BreakerSettings
from leyline import (
    BreakerTransition,
    ContractError,
    Level,
    RolledBackCut,
    WouldBeCut,
    decode,
    encode,
)
from leyline.streams import DECISIONS, OPERATIONS

_log = logging.getLogger(__name__)

Kept = Literal["kept", "known", "conflict", "old"]


class HistoryStore(Store):
    """The histories of a partition.

    Args:
        epochs: the most epochs kept a run (``importance_history_epochs``).
        nbytes: the most bytes kept a run (``analysis_cache_size``).
        keep: seconds that a run's history outlives its last epoch.
    """

    def __init__(self, shared: Shared, epochs: int, nbytes: int, keep: int) -> None:
        super().__init__(shared)
        self._limits = (epochs, nbytes, keep)

    async def remember(self, run_id: str, epoch: int, blob: bytes) -> Kept:
        """Keep an epoch's measurements; ``conflict`` if the epoch holds others, which stay."""
        key = self._keys.named("history", run_id)
        signed = self._guard.frame(f"{key}#{epoch}", blob)
        args: Args = [epoch, signed, *self._limits]
        answer = (await self._scripts.run("remember", [key], args)).decode()
        # Another worker's signature of the same measurements is no other measurement.
        if answer == "conflict" and (await self.recall(run_id, [epoch])).get(epoch) == blob:
            return "known"
        return cast(Kept, answer)

    async def epochs(self, run_id: str) -> list[int]:
        """The epochs that are kept, rising; none for an unknown run."""
        fields: Any = await self._client.hkeys(self._keys.named("history", run_id))
        return sorted(int(field) for field in fields if field.isdigit())

    async def recall(self, run_id: str, epochs: Sequence[int]) -> dict[int, bytes]:
        """The blobs of these epochs, without those that are gone or not signed by a key
        that may decide."""
        if not epochs:
            return {}
        key = self._keys.named("history", run_id)
        blobs: Any = await self._client.hmget(key, [str(epoch) for epoch in epochs])
        found = {}
        for epoch, signed in zip(epochs, blobs, strict=True):
            if signed is not None:
                try:
                    found[epoch] = self._guard.check(f"{key}#{epoch}", signed).content
                except ContractError as error:
                    _log.warning("measurements passed over: %s, epoch %d: %s", run_id, epoch, error)
        return found

    async def forget(self, run_id: str) -> None:
        """Drop a run's history."""
        await self._client.delete(self._keys.named("history", run_id))


T = TypeVar("T")


@dataclass(frozen=True)
class Holder:
    """The trainer that has a run."""

    who: str
    seconds: float
    """Until its claim ends, unless it is renewed."""


@dataclass(frozen=True)
class RunAttempt:
    """One process, or one folder of restore points, that has trained under a run's id."""

    number: int
    """0 for the first under this id."""
    before: str
    """Who had the run in the attempt before, if this call began a new one; else empty."""


class RunStore(Store):
    """The runs of a partition.

    Args:
        keep: seconds that cuts which were taken back are remembered.
    """

    def __init__(self, shared: Shared, keep: int) -> None:
        super().__init__(shared)
        self._keep = keep

    async def claim(self, run_id: str, token: str, who: str, seconds: float) -> Holder | None:
        """Claim a run, or renew the claim of the same token; None, or who has it instead."""
        milliseconds = max(1, round(seconds * 1000))
        args: Args = [token, who, milliseconds]
        held = await self._scripts.run("claim_run", [self._keys.named("claim", run_id)], args)
        return Holder(_text(held[0]), held[1] / 1000) if held else None

    async def give_up(self, run_id: str, token: str) -> None:
        """End the claim of this token."""
        await self._scripts.run("claim_run", [self._keys.named("claim", run_id)], [token, "", 0])

    async def end_claim(self, run_id: str, who: str) -> None:
        """End the claim of a holder that is known to be gone; nothing if another has it by now."""
        key = self._keys.named("claim", run_id)
        found: Any = await self._client.hmget(key, ["token", "who"])
        token, holder = found
        if token is not None and holder == who.encode():
            await self._scripts.run("claim_run", [key], [_text(token), "", 0])

    async def attempt(self, run_id: str, token: str, who: str) -> RunAttempt:
        """The attempt of the run's holder: that of the last claim if the token is the same, else a
        new one. Remembered as long as decisions are."""
        name = self._keys.named("claim", run_id, "last")  # run ids have no colon
        found: Any = await self._client.hmget(name, ["token", "who", "attempt"])
        last, before, number = [None if value is None else _text(value) for value in found]
        fresh = last is not None and last != token
        known = int(number) if number and number.isdecimal() else 0
        attempt = RunAttempt(known + fresh, before or "unknown" if fresh else "")
        fields: Any = {"token": token, "who": who, "attempt": str(attempt.number)}
        await self._client.hset(name, mapping=fields)
        await self._client.pexpire(name, self._keep * 1000)
        return attempt

    async def took_back(self, run_id: str, cuts: Mapping[str, RolledBackCut]) -> None:
        """Remember cuts that a trainer took back, by the fingerprints of their units."""
        key = self._keys.named("rolled-back", run_id)
        for name, cut in cuts.items():
            await self._client.hset(key, name, self._guard.frame(f"{key}#{name}", encode(cut)))
        await self._client.expire(key, self._keep)

    async def taken_back(self, run_id: str) -> list[RolledBackCut]:
        """The cuts of a run that were taken back, in a fixed order."""
        cuts = await self._believed(
            self._keys.named("rolled-back", run_id),
            lambda value: decode(RolledBackCut, value, field="rolled back"),
        )
        return sorted(cuts, key=lambda cut: (cut.epoch, cut.idempotency_key))

    async def measured_calibration_probe(
        self, run_id: str, key: str, cuts: Sequence[WouldBeCut]
    ) -> None:
        """Remember what the decision ``key`` measured to calibrate by."""
        name = self._keys.named("would-be", run_id)
        data = msgpack.packb([encode(cut) for cut in cuts])
        await self._client.hset(name, key, self._guard.frame(f"{name}#{key}", data))
        await self._client.expire(name, self._keep)

    async def calibration_cuts(self, run_id: str) -> list[WouldBeCut]:
        """All calibration probes of a run that were measured, in a fixed order."""
        found = await self._believed(self._keys.named("would-be", run_id), _probes)
        return [cut for cuts in found for cut in cuts]

    async def _believed(self, key: str, read: Callable[[bytes], T]) -> list[T]:
        """The values of a hash in the order of their names. Those without the signature of a key
        that may decide, or that cannot be read, count as absent, and are named in the log."""
        stored: Any = await self._client.hgetall(key)
        found = []
        for name, framed in sorted(stored.items()):
            try:
                place = f"{key}#{name.decode(errors='replace')}"
                found.append(read(self._guard.check(place, framed).content))
            except (ContractError, ValueError, TypeError) as error:
                _log.warning("state passed over: %s: %s", key, error)
        return found


def _probes(data: bytes) -> list[WouldBeCut]:
    """The calibration probes of one decision, decoded."""
    return [decode(WouldBeCut, cut, field="calibration probe") for cut in msgpack.unpackb(data)]


def _text(stored: bytes) -> str:
    return stored.decode("utf-8", "replace")


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
        """The circuit, opened."""
        return replace(self, state="open", opened_at=now, probe_until=0)

    def closed(self) -> Circuit:
        """The circuit, closed; it still knows which failures were counted."""
        return Circuit(counted=self.counted)

    def probed(self, now: int, recovery: int) -> Circuit:
        """The circuit after it gave out a probe, if one is due."""
        rested = self.state == "open" and now >= self.opened_at + recovery
        deserted = self.state == "half_open" and now >= self.probe_until
        if rested or deserted:
            return replace(self, state="half_open", probe_until=now + _PROBE_MS)
        return self

    def failed(self, now: int, limit: int, reason: str, token: str) -> Circuit:
        """The circuit after a failure; a known token does not count again."""
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

    def encode(self) -> bytes:
        """The circuit as bytes; empty if it has nothing to remember."""
        values = list(vars(self).values())
        if not self.by_hand:
            del values[-1]  # as workers of before know it
        data: bytes = msgpack.packb(values) if self != Circuit() else b""
        return data

    @classmethod
    def decode(cls, data: bytes) -> Circuit:
        """The circuit of such bytes.

        Raises:
            ValueError, TypeError: if they are not those of a breaker.
        """
        state, failures, reason, opened_at, probe_until, counted, *rest = msgpack.unpackb(data)
        by_hand = str(rest[0]) if rest else ""
        return cls(state, failures, reason, opened_at, probe_until, tuple(counted), by_hand)


Step = Callable[[Circuit, int], Circuit]


class BreakerStore(Store):
    """The breakers of a partition."""

    def __init__(self, shared: Shared, settings: BreakerSettings) -> None:
        super().__init__(shared)
        self._index = self._keys.named("breakers")
        self._failures = settings.failures
        self._recovery = max(1, round(settings.recovery_seconds * 1000))
        self._keep = _KEEP_MS + 2 * self._recovery

    async def view(self, run_id: str, level: Level) -> BreakerView:
        """The breaker as it stands; nothing is admitted."""
        _, circuit = await self._read(run_id, level)
        return _view(run_id, level, circuit)

    async def admit(self, run_id: str, level: Level) -> BreakerView:
        """Ask to go ahead; ``admitted`` is the answer, ``probe`` if it is the one trial.

        A worker that is admitted reports :meth:`success` or :meth:`failure`, or that its probe led
        to no decision: :meth:`give_back`.
        """
        before, after, _ = await self._change(
            run_id, level, lambda now_is, now: now_is.probed(now, self._recovery)
        )
        view = _view(run_id, level, after)
        probe = before != after
        return replace(view, admitted=view.admitted or probe, probe=probe)

    async def give_back(self, run_id: str, level: Level) -> None:
        """Return a probe that led to no decision: the next caller gets one."""
        await self._change(
            run_id,
            level,
            lambda now_is, _: (
                replace(now_is, probe_until=0) if now_is.state == "half_open" else now_is
            ),
        )

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
        """Forget the failures so far and close after a probe. An open breaker stays open: work that
        was admitted before it opened does not show recovery."""
        return await self._transition(
            run_id,
            level,
            lambda now_is, _: now_is if now_is.state == "open" else now_is.closed(),
        )

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
        key = self._keys.named("breaker", run_id, level)
        found: Any = await self._client.hmget(key, ["signed"])
        stored: bytes = found[0] or b""
        if not stored:
            return stored, Circuit()
        try:
            data = self._guard.check(key, stored, may=(DECISIONS, OPERATIONS)).content
            return stored, Circuit.decode(data)
        except (ContractError, ValueError, TypeError) as error:
            return stored, Circuit(state="open", reason=f"its state is not to be believed: {error}")

    async def _write(self, run_id: str, level: Level, stored: bytes, circuit: Circuit) -> bool:
        key, data = self._keys.named("breaker", run_id, level), circuit.encode()
        signed = self._guard.frame(key, data) if data else b""
        listed = circuit.state != "closed" or circuit.failures > 0
        name = f"{run_id}:{level}"
        args: Args = [stored, signed, name, int(listed), self._keep]
        return bool(await self._scripts.run("breaker", [key, self._index], args))


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
