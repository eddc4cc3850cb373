"""When some worker had nothing in flight: until then nobody can take over what another one left.

Pure: lives, faults and telemetry in, seconds out. Between two entries that follow each other within
a moment a worker counts as busy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from leyline import TelemetryEvent

from .faults import Fault, Kind

__all__ = ["BEGUN", "ENDED", "Life", "checkpoint_of", "idle_seconds"]

BEGUN = frozenset({"received", "fetched"})
ENDED = frozenset(
    {"settled", "duplicate", "dead_letter", "stored", "planned", "handed_over", "lost"}
)
_MOMENT = 0.1
Span = tuple[float, float]


@dataclass(frozen=True)
class Life:
    """A worker served from one moment to another, in seconds since the epoch."""

    worker: str
    since: float
    until: float


def checkpoint_of(event: TelemetryEvent) -> str:
    """The checkpoint that an event tells of: its parts begin under the key of the whole and end
    under those of their levels."""
    return event.idempotency_key.rpartition(":")[0]


def idle_seconds(
    lives: Iterable[Life],
    faults: Sequence[Fault],
    events: Sequence[TelemetryEvent],
    within: Span,
) -> float:
    """For how long of ``within`` at least one worker lived, ran and had nothing in flight."""
    frozen: dict[str, list[Span]] = {}
    for fault in faults:
        if fault.kind is Kind.FREEZE_WORKER:
            frozen.setdefault(fault.target, []).append((fault.begun, fault.ended))
    held = _held(events)
    idle: list[Span] = []
    for life in lives:
        busy = [*held.get(life.worker, ()), *frozen.get(life.worker, ())]
        begin, end = max(life.since, within[0]), min(life.until, within[1])
        idle += _between(busy, begin, end)
    return sum(end - begin for begin, end in _merged(idle))


def _held(events: Iterable[TelemetryEvent]) -> Mapping[str, list[Span]]:
    """When each worker had something in flight; what has no end lasts until it begins another."""
    held: dict[str, list[Span]] = {}
    open_: dict[str, tuple[str, float]] = {}
    for event in sorted(events, key=lambda event: event.at):
        name, checkpoint = event.worker_id, checkpoint_of(event)
        at, (mine, since) = event.at.timestamp(), open_.get(name, ("", 0.0))
        if not checkpoint:
            continue
        if event.step in BEGUN and mine != checkpoint:
            if mine:
                held.setdefault(name, []).append((since, at))
            open_[name] = checkpoint, at
        elif event.step in ENDED and mine == checkpoint:
            held.setdefault(name, []).append((since, at + _MOMENT))
            del open_[name]
    for name, (_, since) in open_.items():
        held.setdefault(name, []).append((since, float("inf")))
    return held


def _between(busy: Iterable[Span], begin: float, end: float) -> Iterable[Span]:
    """What is left of ``begin`` to ``end`` without the busy spans."""
    for start, stop in _merged(busy):
        if start > begin and min(start, end) > begin:
            yield begin, min(start, end)
        begin = max(begin, stop)
    if end > begin:
        yield begin, end


def _merged(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not meet."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged
