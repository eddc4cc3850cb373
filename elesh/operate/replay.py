"""Replay: run the analysis of a recorded event again, publish nothing, compare with the record.

Promises: the same code and settings give the same bytes on the same kind of processor, and the same
decision with figures that differ by rounding on another; where they do not, the settings that
changed are named, and what the decision does differently. The analysis runs in a compute child, as
it did then, so a checkpoint that harms its process does so there. What chance decided is taken
from the record: levels that were missing, shards, fallbacks of the failure table of each
part, and the earlier decision that stands in for corrupt data.

What a recorded decision rested on, for people who ask why, is read as far as it is still there: a
checkpoint whose blobs have expired, or a run without a history, leaves the explanation with what
the decision says of itself. Two decisions, or two sets of settings, are compared side by side: what
differs, and what that means."""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from elesh.analysis import ImportanceTracker
from elesh.bus import Bus, Delivery
from elesh.bus.admission import Heard, Work, admit, hear, read
from elesh.observe import linked_span
from elesh.observe.spanfile import RecordedSpan
from elesh.safety import BreakerStatus
from elesh.settings import Settings
from elesh.worker.compute.process import ComputeChild
from elesh.worker.compute.protocol import DOCUMENT, REPLAYED, ChildFailure, Job
from elesh.worker.fallback_chain import is_corruption, stand_in
from leyline import (
    BlobRef,
    CheckpointBundle,
    ContractError,
    IdempotencyKey,
    Level,
    StructuralPruningDecision,
    decode,
    encode,
)
from leyline.streams import CHECKPOINTS, REQUESTS

from .capture import Case, open_case, save_case, take_blobs, versions


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
    """Settings that are not those that decided; None if those are no longer known."""
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
    """The job for the child, as it was then: the same missing levels, breakers and fallbacks."""
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


_SHOWN = 160
"""Characters of a value that are shown of a difference."""
_ROUNDING = 1e-5
"""What float32 sums of another order may differ by: of a figure, or of 1 where it is smaller, since
figures near zero are differences of larger ones."""


class Change(NamedTuple):
    """One value that differs: the path to it, what it was, what it is."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {_brief(self.before)} -> {_brief(self.after)}"


def changes(before: Any, after: Any, path: str = "") -> Iterator[Change]:
    """Every difference of two JSON-like values. Lists of things with names (gates, targets) are
    compared name by name; others of other length are one difference."""
    named_before, named_after = _by_name(before), _by_name(after)
    if named_before is not None and named_after is not None:
        old, new = list(named_before), list(named_after)
        if old != new and set(old) == set(new):
            yield Change(f"{path} (order)", old, new)
        for name in named_before | named_after:
            inside = f"{path}[{name}]"
            yield from changes(named_before.get(name), named_after.get(name), inside)
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            inside = f"{path}.{name}" if path else str(name)
            yield from changes(before.get(name), after.get(name), inside)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from changes(old, new, f"{path}[{index}]")
    elif before != after:
        yield Change(path, before, after)


def rounded(change: Change) -> bool:
    """Whether only rounding differs: two figures that another kind of processor, which adds up in
    another order, may both have measured."""
    before, after = change.before, change.after
    if not (isinstance(before, float) and isinstance(after, float)):
        return False
    return math.isclose(before, after, rel_tol=_ROUNDING, abs_tol=_ROUNDING)


def _by_name(value: Any) -> dict[str, Any] | None:
    """The members of a list by their names, in its order; None if not all have one of their own."""
    if not isinstance(value, list):
        return None
    named = {
        str(item.get("name", item.get("layer_name"))): item
        for item in value
        if isinstance(item, dict) and ("name" in item or "layer_name" in item)
    }
    return named if len(named) == len(value) else None


def _brief(value: Any) -> str:
    """A value on one line of which the start is enough to see what it is."""
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def moved(before: StructuralPruningDecision, after: StructuralPruningDecision) -> list[str]:
    """What two decisions on one checkpoint do differently, in words: verdict, units, gates."""
    lines = []
    if (old := _verdict(before)) != (new := _verdict(after)):
        lines.append(f"was {old}, is {new}")
    lines += _units(before.units, after.units)
    lines += _layers(before, after)
    gates = {gate.name: gate.passed for gate in before.safety.gates}
    for gate in after.safety.gates:
        if gates.get(gate.name, gate.passed) != gate.passed:
            lines.append(f"gate {gate.name}: now {'passed' if gate.passed else 'failed'}")
    return lines


def _verdict(decision: StructuralPruningDecision) -> str:
    if decision.approved_for_application:
        return "approved"
    return f"rejected ({decision.rejection_reason})"


def _units(before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = set(before.get(name, ())), set(after.get(name, ()))
        gone = [
            f"{what} {', '.join(map(str, sorted(units)))}"
            for what, units in (("also", new - old), ("no longer", old - new))
            if units
        ]
        if gone:
            lines.append(f"{name}: removes {'; '.join(gone)}")
    return lines


def _layers(before: StructuralPruningDecision, after: StructuralPruningDecision) -> list[str]:
    old, new = ({target.layer_name for target in d.layers} for d in (before, after))
    return [f"layer {name} goes" for name in sorted(new - old)] + [
        f"layer {name} stays" for name in sorted(old - new)
    ]
