"""What the fleet knows of a training run: who speaks for it, which of its cuts were taken back, how
far its predictions were off, and what was measured at its earlier checkpoints.

Promises: a claim is taken, renewed and given up in one atomic step by the server's clock, and that
of a holder that is gone ends with its lease; a cut that was taken back is kept as long as decisions
are. Both are signed like the decisions that are made from them.

The history of measurements (the Offline Cache's shared half) is one hash a run, one field an epoch,
written once in one step, so that workers that run side by side, redeliveries and replays give the
same history; the newest epochs stay, within a number and a size, and all of it is forgotten when
the run has been silent for its time to live. Losing it costs history, never correctness: no
decision is made from it alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import msgpack

from elesh.bus.guard import Guard
from elesh.bus.scripts import Scripts
from elesh.bus.server.client import Client
from elesh.settings import BusSettings
from leyline import ContractError, RolledBackCut, WouldBeCut, decode, encode

__all__ = ["Attempt", "HistoryStore", "Holder", "Kept", "RunStore"]


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


T = TypeVar("T")


@dataclass(frozen=True)
class Holder:
    """The trainer that has a run."""

    who: str
    seconds: float
    """Until its claim ends, unless it is renewed."""


@dataclass(frozen=True)
class Attempt:
    """One process, or one folder of restore points, that has trained under a run's id."""

    number: int
    """0 for the first under this id."""
    before: str
    """Who had the run in the attempt before, if this call began a new one; else empty."""


class RunStore:
    """The runs of a partition.

    Args:
        keep: seconds that cuts which were taken back are remembered.
    """

    def __init__(
        self, client: Client, scripts: Scripts, guard: Guard, partition: str, keep: int
    ) -> None:
        self._client, self._scripts, self._guard, self._keep = client, scripts, guard, keep
        self._prefix = f"elesh:{{{partition}}}"

    async def claim(self, run_id: str, token: str, who: str, seconds: float) -> Holder | None:
        """Claim a run, or renew the claim of the same token; None, or who has it instead."""
        milliseconds = max(1, round(seconds * 1000))
        held = await self._scripts.claim_run(self.claim_key(run_id), token, who, milliseconds)
        return Holder(_text(held[0]), held[1] / 1000) if held else None

    async def give_up(self, run_id: str, token: str) -> None:
        """End a claim of one's own."""
        await self._scripts.claim_run(self.claim_key(run_id), token, "", 0)

    async def end_claim(self, run_id: str, who: str) -> None:
        """End the claim of a holder that is known to be gone; nothing if another has it by now."""
        found: Any = await self._client.hmget(self.claim_key(run_id), ["token", "who"])
        token, holder = found
        if token is not None and holder == who.encode():
            await self._scripts.claim_run(self.claim_key(run_id), _text(token), "", 0)

    async def attempt(self, run_id: str, token: str, who: str) -> Attempt:
        """The attempt of the run's holder: that of the last claim if the token is the same, else a
        new one. Remembered as long as decisions are."""
        name = f"{self.claim_key(run_id)}:last"  # run ids have no colon
        found: Any = await self._client.hmget(name, ["token", "who", "attempt"])
        last, before, number = [None if value is None else _text(value) for value in found]
        fresh = last is not None and last != token
        known = int(number) if number and number.isdecimal() else 0
        attempt = Attempt(known + fresh, before or "unknown" if fresh else "")
        fields: Any = {"token": token, "who": who, "attempt": str(attempt.number)}
        await self._client.hset(name, mapping=fields)
        await self._client.pexpire(name, self._keep * 1000)
        return attempt

    async def took_back(self, run_id: str, cuts: Mapping[str, RolledBackCut]) -> None:
        """Remember cuts that a trainer took back, by the fingerprints of their units."""
        key = self._cuts(run_id)
        for name, cut in cuts.items():
            await self._client.hset(
                key, name, self._guard.frame_state(_place(key, name), encode(cut))
            )
        await self._client.expire(key, self._keep)

    async def taken_back(self, run_id: str) -> list[RolledBackCut]:
        """The cuts of a run that were taken back, in a fixed order."""
        cuts = await self._believed(
            self._cuts(run_id), lambda value: decode(RolledBackCut, value, field="rolled back")
        )
        return sorted(cuts, key=lambda cut: (cut.epoch, cut.idempotency_key))

    async def measured_calibration_probe(
        self, run_id: str, key: str, cuts: Sequence[WouldBeCut]
    ) -> None:
        """Remember what the decision ``key`` measured to calibrate by."""
        name = self._calibration_probe(run_id)
        data = msgpack.packb([encode(cut) for cut in cuts])
        await self._client.hset(name, key, self._guard.frame_state(_place(name, key), data))
        await self._client.expire(name, self._keep)

    async def calibration_cuts(self, run_id: str) -> list[WouldBeCut]:
        """All calibration probes of a run that were measured, in a fixed order."""
        found = await self._believed(self._calibration_probe(run_id), _probes)
        return [cut for cuts in found for cut in cuts]

    async def _believed(self, key: str, read: Callable[[bytes], T]) -> list[T]:
        """The values of a hash in the order of their names. Those without the signature of a key
        that may decide, or that are none, count as absent, and are named in the log."""
        stored: Any = await self._client.hgetall(key)
        found = []
        for name, framed in sorted(stored.items()):
            try:
                place = _place(key, name.decode(errors="replace"))
                found.append(read(self._guard.state(place, framed)))
            except (ContractError, ValueError, TypeError) as error:
                _log.warning("state passed over: %s: %s", key, error)
        return found

    def _calibration_probe(self, run_id: str) -> str:
        return f"{self._prefix}:would-be:{run_id}"

    def claim_key(self, run_id: str) -> str:
        """Where the claim of a run is."""
        return f"{self._prefix}:claim:{run_id}"

    def _cuts(self, run_id: str) -> str:
        return f"{self._prefix}:rolled-back:{run_id}"


def _probes(data: bytes) -> list[WouldBeCut]:
    """What one decision measured to calibrate by."""
    return [decode(WouldBeCut, cut, field="would-be cut") for cut in msgpack.unpackb(data)]


def _text(stored: bytes) -> str:
    return stored.decode("utf-8", "replace")


def _place(key: str, name: str) -> str:
    """Where a field of a hash stands, for its signature."""
    return f"{key}#{name}"
