"""Replay: run the analysis of a recorded event again, publish nothing, compare with the record.

Promises: the same code and settings give the same bytes on the same kind of processor, and the same
decision with figures that differ by rounding on another; where they do not, the settings that
changed are named, and what the decision does differently. The analysis runs in a compute child, as
it did then, so a checkpoint that harms its process does so there. What chance decided is taken
from the record: levels that were missing, shards, fallbacks of the failure table of each
part, and the earlier decision that stands in for corrupt data.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elesh.bus import Bus, Delivery
from elesh.bus.admission import Heard, Work, admit, hear, read
from elesh.observe import linked_span
from elesh.safety import BreakerStatus
from elesh.settings import Settings
from elesh.worker.compute.process import ComputeChild
from elesh.worker.compute.protocol import DOCUMENT, REPLAYED, ChildFailure, Job
from elesh.worker.fallback_chain import is_corruption, stand_in
from leyline import ContractError, IdempotencyKey, Level, StructuralPruningDecision, decode, encode
from leyline.streams import CHECKPOINTS, REQUESTS

from .capture import Case, open_case, save_case, take_blobs, versions
from .diff import Change, changes, moved, rounded

__all__ = [
    "Replayed",
    "Selection",
    "capture",
    "count_selected",
    "recorded_decision",
    "replay",
    "replay_case",
]


@dataclass(frozen=True)
class Selection:
    """Which recorded events: all of a run, of an epoch, or of one key; empty selects everything."""

    key: str = ""
    run_id: str = ""
    epoch: int | None = None

    def takes(self, work: Work) -> bool:
        """Whether ``work`` is selected."""
        return (
            self.key in ("", str(work.key))
            and self.run_id in ("", work.run_id)
            and self.epoch in (None, work.key.epoch)
        )


@dataclass(frozen=True)
class Replayed:
    """One replayed key: the decision made now, the recorded one, and where they differ."""

    key: IdempotencyKey
    decision: StructuralPruningDecision | None
    recorded: StructuralPruningDecision | None
    settings: tuple[Change, ...] | None = ()
    """Settings that are not those that decided; None if these are not known any more."""
    error: str = ""
    """Why there is no decision now."""
    differences: tuple[Change, ...] = field(init=False, default=())
    """Every field of the decision that differs."""

    def __post_init__(self) -> None:
        if self.decision is not None and self.recorded is not None:
            before, after = (d.model_dump(mode="json") for d in (self.recorded, self.decision))
            object.__setattr__(self, "differences", tuple(changes(before, after)))

    @property
    def identical(self) -> bool:
        """Whether the bytes are the same."""
        return (
            self.decision is not None
            and self.recorded is not None
            and encode(self.decision) == encode(self.recorded)
        )

    @property
    def rounding(self) -> bool:
        """Whether it is the same decision, but for the rounding of figures."""
        return bool(self.differences) and all(map(rounded, self.differences))

    @property
    def moved(self) -> list[str]:
        """What the decision does differently, in words."""
        both = self.decision is not None and self.recorded is not None
        return moved(self.recorded, self.decision) if both else []  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Then:
    """What is known of a decision's making."""

    recorded: StructuralPruningDecision | None
    previous: StructuralPruningDecision | None
    """The decision that stands in."""
    decided_by: dict[str, Any] | None
    """Its settings."""

    def changed(self, settings: Settings) -> tuple[Change, ...] | None:
        """The settings that are others now; None if those of then are not known."""
        if self.decided_by is not None:
            return tuple(changes(self.decided_by, json.loads(settings.analysis_json)))
        known = self.recorded is None or self.recorded.settings_hash == settings.analysis_hash
        return () if known else None


async def replay(bus: Bus, settings: Settings, selection: Selection) -> AsyncIterator[Replayed]:
    """Replay every selected event that is still in the streams, in their order."""
    async with _child(settings) as child:
        async for delivery, work in _events(bus, selection):
            with linked_span(delivery.carrier, "replay", {"elesh.replayed": str(work.key)}):
                replayed = await _replay_recorded(bus, child, settings, work)
            yield replayed


async def count_selected(bus: Bus, selection: Selection) -> int:
    """How many events :func:`replay` would take."""
    return len([work async for _, work in _events(bus, selection)])


async def _replay_recorded(
    bus: Bus, child: ComputeChild, settings: Settings, work: Work
) -> Replayed:
    recorded = await recorded_decision(bus, work.key)
    decided_by = await bus.settings_of(recorded.settings_hash) if recorded else None
    before = recorded.stands_in if recorded else None
    previous = await recorded_decision(bus, IdempotencyKey.parse(before)) if before else None
    with tempfile.TemporaryDirectory(prefix="elesh-replay-") as name:
        folder = Path(name)
        then = _Then(recorded, previous, decided_by)
        try:
            await _fetch(bus, work, folder)
        except ContractError as error:
            return _stood_in(work, then, error, then.changed(settings))
        return await _replay(child, settings, work, folder, then)


@asynccontextmanager
async def _child(settings: Settings) -> AsyncIterator[ComputeChild]:
    """A compute child for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="elesh-child-") as name:
        child = ComputeChild(settings.worker.memory_limit, Path(name))
        try:
            yield child
        finally:
            await child.kill()


async def capture(bus: Bus, key: str, path: Path) -> Case | None:
    """Write the event of ``key`` with all that belongs to it; None if it is not in the streams.

    Raises:
        MissingBlob: if one of its blobs has expired since.
    """
    async for delivery, work in _events(bus, Selection(key)):
        decision = await recorded_decision(bus, work.key)
        case = Case(
            stream=delivery.stream.name,
            entry_id=delivery.entry_id,
            envelope=delivery.envelope,
            decision=decision,
            settings=await bus.settings_of(decision.settings_hash) if decision else None,
            versions=versions(),
        )
        with tempfile.TemporaryDirectory(prefix="elesh-capture-") as name:
            await _fetch(bus, work, Path(name), document=False)
            save_case(path, case, Path(name))
        return case
    return None


async def replay_case(path: Path, settings: Settings | None) -> Replayed:
    """Replay a captured case; without ``settings`` by those that decided it.

    Raises:
        ContractError: if the file or what is in it is not sound.
    """
    case = open_case(path)
    work = _admitted(read(case.envelope))
    chosen = settings or Settings.model_validate(case.settings or {})
    with tempfile.TemporaryDirectory(prefix="elesh-replay-") as name:
        folder = Path(name)
        take_blobs(path, work.blobs, folder)
        (folder / DOCUMENT).write_bytes(encode(work.document))
        async with _child(chosen) as child:
            then = _Then(case.decision, None, case.settings)
            return await _replay(child, chosen, work, folder, then)


async def recorded_decision(bus: Bus, key: IdempotencyKey) -> StructuralPruningDecision | None:
    """The decision that was published for ``key``, or None."""
    record = await bus.record(key)
    if record is None:
        return None
    message = read(record.envelope).message
    return message if isinstance(message, StructuralPruningDecision) else None


async def _events(bus: Bus, selection: Selection) -> AsyncIterator[tuple[Delivery, Work]]:
    """The selected events, each key once; what never was work is among the dead letters."""
    done: set[IdempotencyKey] = set()
    for stream in (CHECKPOINTS, REQUESTS):
        for delivery in await bus.read(stream):
            try:
                work = _admitted(hear(delivery, bus.guard))
            except ContractError:
                continue
            if work.key not in done and selection.takes(work):
                done.add(work.key)
                yield delivery, work


def _admitted(heard: Heard) -> Work:
    """The work of an event, however old it is."""
    now = datetime.now(UTC)
    work = admit(heard, window=Settings().window_seconds, now=now, redriven=now)
    if not isinstance(work, Work):
        raise ContractError("event", "a checkpoint or a request", type(work).__name__)
    return work


async def _fetch(bus: Bus, work: Work, folder: Path, *, document: bool = True) -> None:
    for name, ref in work.blobs.items():
        await bus.blobs.fetch(ref, folder / name)
    if document:
        (folder / DOCUMENT).write_bytes(encode(work.document))


async def _replay(
    child: ComputeChild, settings: Settings, work: Work, folder: Path, then: _Then
) -> Replayed:
    changed, recorded = then.changed(settings), then.recorded
    job = _job(settings, work, folder, recorded)
    try:
        reply = await child.run(job, timeout=2 * work.window * max(1, len(job.parts)))
        if reply.failed is not None:
            raise reply.failed.error
        decision = decode(StructuralPruningDecision, reply.result, field=f"result of {work.key}")
    except ContractError as error:
        return _stood_in(work, then, error, changed)
    except ChildFailure as error:
        return Replayed(work.key, None, recorded, changed, str(error))
    return Replayed(work.key, decision, recorded, changed)


def _stood_in(
    work: Work, then: _Then, error: ContractError, changed: tuple[Change, ...] | None
) -> Replayed:
    """The earlier decision again, if it stood in then and the data is still corrupt."""
    before = then.recorded.stands_in if then.recorded else None
    if before is None or not is_corruption(error):
        return Replayed(work.key, None, then.recorded, changed, str(error))
    if then.previous is None:
        gone = f"{before} stands in, and its record is not here: {error}"
        return Replayed(work.key, None, then.recorded, changed, gone)
    decision = stand_in(then.previous, work.document, str(work.key), error)
    return Replayed(work.key, decision, then.recorded, changed)


def _job(
    settings: Settings, work: Work, folder: Path, recorded: StructuralPruningDecision | None
) -> Job:
    """What the child is asked, as it was then: the same gaps, breakers and fallbacks."""
    gaps = _gaps(recorded)
    levels = tuple(level for level in work.document.levels if level not in gaps)
    breakers = BreakerStatus.of(recorded) if recorded else {}
    states = [breakers.get(level, BreakerStatus()) for level in levels]
    parts = recorded.parts if recorded else ()
    return Job(
        kind="again" if parts else "decide",
        folder=str(folder),
        key=str(work.key),
        settings=settings.model_dump_json(),
        levels=levels,
        breakers=tuple((each.state, each.failures, each.reason) for each in states),
        threads=settings.threads,
        parts=tuple(map(encode, parts)),
        fallbacks=_fallbacks(recorded) if recorded else (),
        missing=tuple((str(level), reason) for level, reason in gaps.items()),
        taken_back=tuple(map(encode, recorded.rolled_back)) if recorded else (),
        loss_factor=encode(recorded.loss_factor) if recorded and recorded.loss_factor else b"",
        recorded=encode(recorded) if recorded else b"",
    )


def _fallbacks(recorded: StructuralPruningDecision) -> tuple[tuple[str, str], ...]:
    """The fallbacks that were taken for the whole decision, or for joining its parts."""
    of_parts = dict.fromkeys(taken for part in recorded.parts for taken in part.fallbacks)
    left = Counter(recorded.fallbacks) - Counter(of_parts.keys())
    return tuple((taken.rung, taken.reason) for taken in left.elements() if taken.rung in REPLAYED)


def _gaps(recorded: StructuralPruningDecision | None) -> dict[Level, str]:
    """The levels that the recorded decision had to do without, each with the reason."""
    parts = recorded.levels if recorded else ()
    return {part.level: part.reason for part in parts if part.verdict == "missing"}
