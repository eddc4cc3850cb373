"""Reads the bus for pages and reports: newest entries first, then on in both directions.

Promises: reads only; a message that cannot be read is passed over (it is among the dead letters).
The first page waits for the newest entries alone; older ones are read in pieces between requests,
and :attr:`Reader.until` says how far back that has come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from elesh.bus import Bus, BusUnavailable, Delivery, moment
from elesh.bus.admission import Work, hear
from elesh.observe import Link
from elesh.observe.spanfile import find_trace
from elesh.operate.fleet_status import FleetStatus, fleet_status_of
from elesh.operate.replay import DecisionContext, admitted, fetched, recorded_decision
from elesh.operate.run_history import Entry, Run, RunHistory
from elesh.settings import Settings
from elesh.worker.telemetry.auditor import audit_links
from leyline import (
    CheckpointBundle,
    ContractError,
    IdempotencyKey,
    TooLarge,
)
from leyline.streams import (
    CHECKPOINTS,
    DECISIONS,
    OUTCOMES,
    REQUESTS,
    STREAMS,
    TELEMETRY,
    Stream,
)

_FOLDED = (CHECKPOINTS, REQUESTS, DECISIONS, OUTCOMES, TELEMETRY)
_BY_NAME = {stream.name: stream for stream in STREAMS}
_STATISTICS = ("statistics", "gates", "layers", "heads")
"""What of a checkpoint a page needs, by the stem of its file."""
_LARGEST = 256 << 20
_CACHED = 8
_FIRST, _PIECE, _SEARCHED = 40, 20, 200
"""Entries of each stream that the first page waits for, that are read on at a time, and that a
search for one run reads at a time."""
_TELEMETRY = 2000
"""Entries of the telemetry in which changes of breakers are looked for."""
_FOUND_SECONDS = 20.0
"""For how long a decision's trace, or a run that is not in memory, is not looked for again."""
_FRESH_SECONDS = 0.5
"""For how long what was read last serves other pages, too."""


class Reader:
    """Reads one partition; its history grows with every :meth:`refresh`."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        self.bus = bus
        self.history = RunHistory()
        self._settings = settings
        self._reading = asyncio.Lock()
        self._newest: dict[str, str] = {}
        """Of each stream, the id up to which it was read forwards."""
        self._oldest: dict[str, str] = {}
        """Of each stream that has older entries, the id down to which it was read backwards."""
        self._backwards: asyncio.Task[None] | None = None
        self._seen = 0
        self._fleet: FleetStatus | None = None
        self._asked_at = self._read_at = float("-inf")
        # What was looked for last, and when by the loop's clock.
        self._found: dict[str, tuple[Run | None, float]] = {}
        self._contexts: dict[IdempotencyKey, tuple[DecisionContext | None, float]] = {}

    @property
    def until(self) -> datetime | None:
        """Back to when the streams were read so far; None once all of them were."""
        ids = [each for name, each in self._oldest.items() if name != TELEMETRY.name]
        if not ids:
            return None
        return moment(max(int(each.partition("-")[0]) for each in ids))

    def renew(self) -> None:
        """Read again at the next question, however lately that was done."""
        self._asked_at = self._read_at = float("-inf")

    async def refresh(self) -> RunHistory:
        """The history up to now; what is older than the first look goes on being read."""
        async with self._reading:
            now = asyncio.get_running_loop().time()
            if now - self._read_at < _FRESH_SECONDS:
                return self.history
            for stream in _FOLDED:
                if stream.name not in self._newest:
                    await self._first_look(stream)
                else:
                    await self._forwards(stream)
            self._read_at = asyncio.get_running_loop().time()
        if self._oldest and (self._backwards is None or self._backwards.done()):
            self._backwards = asyncio.create_task(self._read_backwards())
        return self.history

    async def whole(self) -> RunHistory:
        """The history of everything that is remembered, waited for."""
        await self.refresh()
        if self._backwards is not None:
            await self._backwards
        return self.history

    async def run(self, run_id: str) -> Run | None:
        """One run; what the history has let go of, or not come to, is looked for in the streams."""
        known = self.history.runs.get(run_id)
        if known is not None and not known.let_go:
            return known
        found, at = self._found.get(run_id, (None, float("-inf")))
        if asyncio.get_running_loop().time() - at < _FOUND_SECONDS:
            return found or known
        if known is None and self._newest and not self.history.let_go and self.until is None:
            return None
        return await self.search(run_id) or known

    async def search(self, run_id: str) -> Run | None:
        """One run, from everything in the streams; only its messages are decoded."""
        found, name = RunHistory(), run_id.encode()
        for stream in _FOLDED[:4]:
            last = ""
            while piece := await self.bus.newest(stream, count=_SEARCHED, before=last):
                last = piece[-1].entry_id
                found.take(self._entries(each for each in piece if name in _bytes(each)))
                await asyncio.sleep(0)
        self._found[run_id] = found.runs.get(run_id), asyncio.get_running_loop().time()
        while len(self._found) > _CACHED:
            del self._found[next(iter(self._found))]
        return found.runs.get(run_id)

    async def fleet(self) -> FleetStatus:
        """Workers, streams, breakers and the newest dead letters now."""
        now = asyncio.get_running_loop().time()
        if self._fleet is None or now - self._asked_at >= _FRESH_SECONDS:
            self._fleet = await fleet_status_of(self.bus)
            self._asked_at = now
        return self._fleet

    async def context(self, key: IdempotencyKey) -> DecisionContext | None:
        """A decision with its checkpoint's statistics and its trace; None if there is none."""
        known, at = self._contexts.get(key, (None, float("-inf")))
        now = asyncio.get_running_loop().time()
        if now - at > _FOUND_SECONDS:
            known = await self._context(key)
            self._contexts[key] = known, now
            while len(self._contexts) > _CACHED:
                del self._contexts[next(iter(self._contexts))]
        return known

    async def _context(self, key: IdempotencyKey) -> DecisionContext | None:
        decision = await recorded_decision(self.bus, key)
        if decision is None:
            return None
        bundle, missing = await self._bundle(key, decision.run_id)
        spans = await asyncio.to_thread(find_trace, str(key))
        return DecisionContext(decision, bundle, missing=missing, spans=tuple(spans))

    async def audited(self, last: int, count: int) -> list[Link]:
        """``count`` entries of the audit log up to the one numbered ``last``, newest first."""
        links: list[Link] = []
        async for link in audit_links(self.bus, after=max(0, last - count)):
            links.append(link)
            if len(links) >= count:
                break
        return links[::-1]

    async def close(self) -> None:
        """Stop reading."""
        if self._backwards is not None:
            self._backwards.cancel()
            with contextlib.suppress(asyncio.CancelledError, BusUnavailable):
                await self._backwards
        await self.bus.close()

    # Forwards and backwards

    async def _first_look(self, stream: Stream) -> None:
        found = await self.bus.newest(stream, count=_FIRST)
        self._newest[stream.name] = found[0].entry_id if found else "0"
        if len(found) == _FIRST:
            self._oldest[stream.name] = found[-1].entry_id
        self.history.take(self._entries(found))

    async def _forwards(self, stream: Stream) -> None:
        while True:
            last = self._newest[stream.name]
            last, found = await self.bus.follow(stream, last_id=last, block_seconds=0)
            if not found:
                return
            self._newest[stream.name] = last
            self.history.take(self._entries(found))

    async def _read_backwards(self) -> None:
        """Read on towards the oldest entries, a piece of the least read stream at a time."""
        while self._oldest:
            name = max(self._oldest, key=lambda each: int(self._oldest[each].partition("-")[0]))
            before = self._oldest[name]
            try:
                found = await self.bus.newest(_BY_NAME[name], count=_PIECE, before=before)
            except BusUnavailable:
                return  # the next page goes on from here
            self.history.take(self._entries(found))
            self._seen += len(found) if name == TELEMETRY.name else 0
            if found:
                self._oldest[name] = found[-1].entry_id
            enough = name == TELEMETRY.name and self._seen >= _TELEMETRY
            if len(found) < _PIECE or enough or self.history.full:
                del self._oldest[name]
            await asyncio.sleep(0)  # pages go on being served

    def _entries(self, deliveries: Iterable[Delivery]) -> Iterable[Entry]:
        for delivery in deliveries:
            if delivery.stream is TELEMETRY and b"BreakerTransition" not in _bytes(delivery):
                continue
            if entry := self._read(delivery):
                yield entry

    def _read(self, delivery: Delivery) -> Entry | None:
        """The message of an entry, and its place; None if its signature or content is not sound."""
        try:
            message = hear(delivery, self.bus.guard).message
        except ContractError:
            return None
        return Entry(message, delivery.stream.name, delivery.entry_id)

    # A decision's checkpoint

    async def _bundle(
        self, key: IdempotencyKey, run_id: str
    ) -> tuple[CheckpointBundle | None, str]:
        """The statistics of a decision's checkpoint, else why they are not there."""
        work = await self._work(key, run_id)
        if work is None:
            return None, "the checkpoint's event is no longer in its stream"
        try:
            return await self._fetch(work), ""
        except ContractError as error:
            return None, str(error)

    async def _work(self, key: IdempotencyKey, run_id: str) -> Work | None:
        """The checkpoint that a decision was made for."""
        run = await self.run(run_id)
        if (run is None or str(key) not in run.places) and self.until is not None:
            run = await self.search(run_id)
        place = run.places.get(str(key)) if run else None
        if place is None:
            return None
        stream, entry = place
        found = await self.bus.read(_BY_NAME[stream], start=entry, end=entry)
        return admitted(found[0], self.bus, self._settings) if found else None

    async def _fetch(self, work: Work) -> CheckpointBundle:
        """The statistics alone: a page shows neither program nor weights."""
        blobs = {name: ref for name, ref in work.blobs.items() if Path(name).stem in _STATISTICS}
        size = sum(ref.size for ref in blobs.values())
        if size > _LARGEST:
            raise TooLarge("statistics", f"at most {_LARGEST} bytes for the console", size)
        return await fetched(self.bus, work, blobs)


def _bytes(delivery: Delivery) -> bytes:
    """An entry as it came, to look for a name in before it is decoded."""
    return delivery.fields.get(b"envelope", b"")
