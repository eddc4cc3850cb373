"""Reading from the bus for the console: the history goes on from where it was, the rest is asked.

Promises: reads only; a message that cannot be read is passed over (it is among the dead letters).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from elesh.bus import Bus, Delivery
from elesh.bus.admission import Work, admit, hear
from elesh.observe import Link
from elesh.observe.spanfile import RecordedSpan, find_trace
from elesh.operate.fleet_status import FleetStatus, fleet_status_of
from elesh.operate.replay import recorded_decision
from elesh.settings import Settings
from elesh.worker.telemetry.auditor import audit_links
from leyline import (
    CheckpointBundle,
    ContractError,
    IdempotencyKey,
    Message,
    StructuralPruningDecision,
    TooLarge,
)
from leyline.streams import CHECKPOINTS, DECISIONS, OUTCOMES, REQUESTS, TELEMETRY, Stream

from .history import History

__all__ = ["DecisionContext", "Reader"]

_FOLDED = (CHECKPOINTS, REQUESTS, DECISIONS, OUTCOMES, TELEMETRY)
_AUDITED = 200
_STATISTICS = ("statistics", "gates", "layers", "heads")
"""What of a checkpoint a page needs, by the stem of its file."""
_LARGEST = 256 << 20
_CACHED = 8
_PLACES = 10_000


@dataclass(frozen=True)
class DecisionContext:
    """What is still there of one decision."""

    decision: StructuralPruningDecision
    bundle: CheckpointBundle | None
    missing: str
    """Why the checkpoint's statistics are not there; empty where they are."""
    spans: tuple[RecordedSpan, ...]


class Reader:
    """Reads one partition; its history grows with every :meth:`refresh`."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        self.bus = bus
        self.history = History()
        self._settings = settings
        self._last = dict.fromkeys((stream.name for stream in _FOLDED), "0")
        self._reading = asyncio.Lock()
        self._places: dict[IdempotencyKey, tuple[Stream, str]] = {}
        self._looked_at: dict[str, str] = {}
        self._bundles: OrderedDict[IdempotencyKey, CheckpointBundle] = OrderedDict()

    async def refresh(self) -> History:
        """The history up to now."""
        async with self._reading:
            for stream in _FOLDED:
                while True:
                    last, found = await self.bus.follow(
                        stream, last_id=self._last[stream.name], block_seconds=0
                    )
                    if not found:
                        break
                    self._last[stream.name] = last
                    self.history.take(said for each in found if (said := self._read(each)))
        return self.history

    async def fleet(self) -> FleetStatus:
        """Workers, streams, breakers and dead letters now."""
        return await fleet_status_of(self.bus, dead_letters=None)

    async def context(self, key: IdempotencyKey) -> DecisionContext | None:
        """A decision with its checkpoint's statistics and its trace; None if there is none."""
        decision = await recorded_decision(self.bus, key)
        if decision is None:
            return None
        bundle, missing = await self._bundle(key)
        spans = await asyncio.to_thread(find_trace, str(key))
        return DecisionContext(decision, bundle, missing, tuple(spans))

    async def audited(self) -> list[Link]:
        """The newest entries of the audit log, oldest first."""
        head = await self.bus.audit.head()
        after = max(0, head.number - _AUDITED)
        return [link async for link in audit_links(self.bus, after=after)]

    async def _bundle(self, key: IdempotencyKey) -> tuple[CheckpointBundle | None, str]:
        """The statistics of a decision's checkpoint, else why they are not there."""
        if key not in self._bundles:
            work = await self._work(key)
            if work is None:
                return None, "the checkpoint's event is no longer in its stream"
            try:
                self._bundles[key] = await self._fetch(work)
            except ContractError as error:
                return None, str(error)
        self._bundles.move_to_end(key)
        while len(self._bundles) > _CACHED:
            self._bundles.popitem(last=False)
        return self._bundles[key], ""

    async def _work(self, key: IdempotencyKey) -> Work | None:
        """The checkpoint that a decision was made for; each event is looked at once."""
        for stream in (CHECKPOINTS, REQUESTS):
            start = self._looked_at.get(stream.name, "-")
            for delivery in await self.bus.read(stream, start=start):
                self._looked_at[stream.name] = f"({delivery.entry_id}"
                if work := self._admitted(delivery):
                    self._places[work.key] = (stream, delivery.entry_id)
        while len(self._places) > _PLACES:
            del self._places[next(iter(self._places))]
        if key not in self._places:
            return None
        stream, entry = self._places[key]
        found_again = await self.bus.read(stream, start=entry, end=entry)
        return self._admitted(found_again[0]) if found_again else None

    def _read(self, delivery: Delivery) -> tuple[Message, datetime] | None:
        """What an entry says, and when; None for one that nobody is to believe."""
        try:
            heard = hear(delivery, self.bus.guard)
            return heard.message, heard.envelope.created_at
        except ContractError:
            return None

    def _admitted(self, delivery: Delivery) -> Work | None:
        window = self._settings.window_seconds
        try:
            now = datetime.now(UTC)
            work = admit(hear(delivery, self.bus.guard), window=window, now=now, redriven=now)
        except ContractError:
            return None  # it is among the dead letters
        return work if isinstance(work, Work) else None

    async def _fetch(self, work: Work) -> CheckpointBundle:
        """The statistics alone: program and weights are no business of a page."""
        blobs = {name: ref for name, ref in work.blobs.items() if Path(name).stem in _STATISTICS}
        size = sum(ref.size for ref in blobs.values())
        if size > _LARGEST:
            raise TooLarge("statistics", f"at most {_LARGEST} bytes for the console", size)
        with tempfile.TemporaryDirectory(prefix="elesh-console-") as name:
            folder = Path(name)
            for file, ref in blobs.items():
                await self.bus.blobs.fetch(ref, folder / file)
            (folder / "checkpoint.json").write_text(work.document.model_dump_json())
            return await asyncio.to_thread(CheckpointBundle.load, folder)
