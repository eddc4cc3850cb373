"""What a recorded decision rested on, as far as it is still there: checkpoint and history.

For people who ask why. A checkpoint whose blobs have expired, or a run without a history, leaves
the explanation with what the decision says of itself.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from elesh.analysis import ImportanceTracker
from elesh.bus import Bus, Delivery
from elesh.bus.admission import Work, admit, hear
from elesh.observe.spanfile import RecordedSpan
from elesh.settings import Settings
from leyline import (
    BlobRef,
    CheckpointBundle,
    ContractError,
    IdempotencyKey,
    StructuralPruningDecision,
)
from leyline.streams import CHECKPOINTS, REQUESTS

from .replay import recorded_decision

__all__ = ["DecisionContext", "admitted", "decision_context", "fetched"]


@dataclass(frozen=True)
class DecisionContext:
    """A decision and what is left of its input."""

    decision: StructuralPruningDecision
    bundle: CheckpointBundle | None
    tracker: ImportanceTracker | None = None
    """Of the run's checkpoints up to the decision's own."""
    missing: str = ""
    """Why there is no bundle."""
    spans: tuple[RecordedSpan, ...] = ()
    """Of its trace, for those who show it."""


async def decision_context(
    bus: Bus, settings: Settings, key: IdempotencyKey
) -> DecisionContext | None:
    """The context of the decision that was published for ``key``; None if there is none."""
    decision = await recorded_decision(bus, key)
    if decision is None:
        return None
    tracker = await _history(bus, settings, decision.run_id, decision.epoch)
    work = await _work(bus, settings, key)
    if work is None:
        return DecisionContext(decision, None, tracker, "its event has left the stream")
    try:
        return DecisionContext(decision, await fetched(bus, work, work.blobs), tracker)
    except ContractError as error:
        return DecisionContext(decision, None, tracker, str(error))


async def _work(bus: Bus, settings: Settings, key: IdempotencyKey) -> Work | None:
    """The event that asked for the decision, if it is still in a stream."""
    for stream in (CHECKPOINTS, REQUESTS):
        for delivery in await bus.read(stream):
            work = admitted(delivery, bus, settings)
            if work is not None and key == work.key:
                return work
    return None


def admitted(delivery: Delivery, bus: Bus, settings: Settings) -> Work | None:
    """The checkpoint that an entry asks to analyse, however old it is; None for another, and for
    one that is among the dead letters."""
    window, now = settings.window_seconds, datetime.now(UTC)
    try:
        work = admit(hear(delivery, bus.guard), window=window, now=now, redriven=now)
    except ContractError:
        return None
    return work if isinstance(work, Work) else None


async def fetched(bus: Bus, work: Work, blobs: Mapping[str, BlobRef]) -> CheckpointBundle:
    """The checkpoint of ``work``, with these of its blobs, by the names of their files."""
    with tempfile.TemporaryDirectory(prefix="elesh-decision-") as name:
        folder = Path(name)
        for file, ref in blobs.items():
            await bus.blobs.fetch(ref, folder / file)
        (folder / "checkpoint.json").write_text(work.document.model_dump_json())
        return await asyncio.to_thread(CheckpointBundle.load, folder)


async def _history(
    bus: Bus, settings: Settings, run_id: str, until: int
) -> ImportanceTracker | None:
    kept = settings.importance_history_epochs
    store = bus.history(kept, int(settings.analysis_cache_size))
    epochs = [epoch for epoch in await store.epochs(run_id) if epoch <= until]
    if not epochs:
        return None
    return ImportanceTracker.of_epochs(run_id, await store.recall(run_id, epochs), kept)
