"""The overview as plain data: what runs do, what is broken, how the fleet stands.

Promises: pure functions of a history and a fleet; every figure that is unknown is None, and the
page says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from elesh.operate.fleet_status import FleetStatus
from leyline import Level

from .history import Decided, History, Run

__all__ = ["Band", "DecisionRow", "Mark", "Overview", "Problem", "RunView", "overview", "run_view"]

_QUIET_SECONDS = 120.0
_LATE_SECONDS = 60.0
RESULTS = ("applied", "rolled_back", "refused", "approved", "rejected")
"""What can have become of a decision; ``approved``: the trainer has not answered yet."""


@dataclass(frozen=True)
class Problem:
    """Something that an operator should look at."""

    tone: str
    """``bad`` or ``warn``."""
    what: str
    detail: str
    href: str = ""


@dataclass(frozen=True)
class Band:
    """A phase of the schedule on the time line."""

    phase: str
    start: int
    end: int
    limit: float
    """Share of the units that may be gone by then."""


@dataclass(frozen=True)
class Mark:
    """A decision on the time line."""

    epoch: int
    result: str
    """One of RESULTS."""
    key: str
    title: str


@dataclass(frozen=True)
class DecisionRow:
    """A decision in a table."""

    key: str
    epoch: int
    level: str
    phase: str
    result: str
    units: int
    parameters: int
    """Parameters that it removes."""
    measured: bool
    accuracy_drop: float | None
    """Under the mask, as the trainer measured it, 0 to 1."""
    reason: str


@dataclass(frozen=True)
class RunView:
    """One run."""

    run_id: str
    quiet: bool
    """Whether nothing was heard of it for two minutes."""
    seconds: float
    """Since it was last heard of."""
    epoch: int
    phase: str
    limit: float | None
    accuracy: float | None
    first_accuracy: float | None
    """At the checkpoint before the first cut."""
    loss: float | None
    parameters: int | None
    original_parameters: int | None
    pruned: tuple[tuple[str, float], ...]
    """Share of the original units that are gone, by level."""
    results: tuple[tuple[str, int], ...]
    accuracies: tuple[tuple[int, float], ...]
    shares: tuple[tuple[int, float], ...]
    """Epoch and share of channels gone (of heads, where there are no channels)."""
    bands: tuple[Band, ...]
    marks: tuple[Mark, ...]
    rows: tuple[DecisionRow, ...]
    """Newest first."""


@dataclass(frozen=True)
class Overview:
    """All that the first page shows."""

    at: datetime
    problems: tuple[Problem, ...]
    runs: tuple[RunView, ...]
    fleet: FleetStatus


def overview(history: History, fleet: FleetStatus) -> Overview:
    """The first page's data."""
    runs = tuple(run_view(run, fleet.at) for run in history.recent())
    return Overview(fleet.at, tuple(_problems(fleet, runs)), runs, fleet)


def run_view(run: Run, now: datetime) -> RunView:
    """One run's data."""
    points = [run.checkpoints[epoch] for epoch in sorted(run.checkpoints)]
    decided = sorted(run.decisions.values(), key=lambda d: (d.epoch, d.key))
    results = {each.key: _result(run, each) for each in decided}
    last = points[-1] if points else None
    seconds = max(0.0, (now - run.at).total_seconds())
    counts = Counter(results.values())
    level = Level.CHANNEL if any(Level.CHANNEL in p.pruned for p in points) else Level.HEAD
    return RunView(
        run_id=run.run_id,
        quiet=seconds > _QUIET_SECONDS,
        seconds=seconds,
        epoch=run.epoch,
        phase=decided[-1].phase if decided else "",
        limit=decided[-1].phase_limit if decided else None,
        accuracy=last.accuracy if last else None,
        first_accuracy=_before_first_cut(run, results),
        loss=last.loss if last else None,
        parameters=last.parameters if last else None,
        original_parameters=last.original_parameters if last else None,
        pruned=tuple((name.value, share) for name, share in last.pruned.items()) if last else (),
        results=tuple((result, counts[result]) for result in RESULTS if counts[result]),
        accuracies=tuple((p.epoch, p.accuracy) for p in points if p.accuracy is not None),
        shares=tuple((p.epoch, p.pruned[level]) for p in points if level in p.pruned),
        bands=tuple(_bands(decided)),
        marks=tuple(Mark(d.epoch, results[d.key], d.key, _title(d, results)) for d in decided),
        rows=tuple(_row(run, each, results[each.key]) for each in reversed(decided)),
    )


def _result(run: Run, decided: Decided) -> str:
    outcome = run.outcome(decided.key)
    if outcome is not None:
        return str(outcome.result)
    return "approved" if decided.approved else "rejected"


def _before_first_cut(run: Run, results: dict[str, str]) -> float | None:
    cuts = [run.decisions[key].epoch for key, result in results.items() if result == "applied"]
    if not cuts:
        return None
    known = [p.accuracy for p in run.checkpoints.values() if p.epoch == min(cuts)]
    return known[0] if known else None


def _title(decided: Decided, results: dict[str, str]) -> str:
    words = results[decided.key].replace("_", " ")
    what = f"{decided.units} {decided.level}s" if decided.units else f"{decided.level}s"
    return f"epoch {decided.epoch}: {what} {words}"


def _bands(decided: list[Decided]) -> Iterator[Band]:
    """Phases as the decisions state them, each up to where the next begins."""
    starts: list[Decided] = []
    for each in decided:
        if not starts or starts[-1].phase != each.phase:
            starts.append(each)
    for index, each in enumerate(starts):
        begin = 0 if index == 0 else each.epoch
        end = starts[index + 1].epoch if index + 1 < len(starts) else decided[-1].epoch
        yield Band(each.phase, begin, max(end, begin), each.phase_limit)


def _row(run: Run, decided: Decided, result: str) -> DecisionRow:
    outcome = run.outcome(decided.key)
    drop = None
    if outcome and outcome.accuracy_before is not None and outcome.accuracy_masked is not None:
        drop = outcome.accuracy_before - outcome.accuracy_masked
    reason = decided.reason or (outcome.detail if outcome else "")
    return DecisionRow(
        key=decided.key,
        epoch=decided.epoch,
        level=decided.level.value,
        phase=decided.phase,
        result=result,
        units=decided.units,
        parameters=decided.parameters_before - decided.parameters_after,
        measured=decided.measured,
        accuracy_drop=None if drop is None or drop != drop else drop,
        reason=reason,
    )


def _problems(fleet: FleetStatus, runs: tuple[RunView, ...]) -> Iterator[Problem]:
    for breaker in fleet.breakers:
        if breaker.state != "closed":
            what = f"Breaker of {breaker.run_id} at level {breaker.level} is {breaker.state}"
            yield Problem("bad", what.replace("_", " "), breaker.reason, "/fleet#breakers")
    if not fleet.workers:
        yield Problem("bad", "No worker is alive", "checkpoints wait until one serves", "/fleet")
    for worker in fleet.workers:
        if not worker.ready:
            yield Problem("warn", f"Worker {worker.worker_id} is not ready", worker.why, "/fleet")
    waiting = [entry for entry in fleet.dead_letters if not entry.redriven_as]
    if waiting:
        plural = "1 dead letter" if len(waiting) == 1 else f"{len(waiting)} dead letters"
        newest = waiting[0]
        reason = newest.message.reason if newest.message else newest.error
        yield Problem("warn", plural, f"newest: {reason}", "/dead")
    for name, backlog in fleet.backlog.items():
        age = backlog.oldest_seconds
        if age is not None and age > _LATE_SECONDS:
            yield Problem("warn", f"{name}: the oldest entry has waited {age:.0f} s", "", "/fleet")
    for run in runs:
        counts = dict(run.results)
        if counts.get("rolled_back"):
            what = f"{run.run_id}: {counts['rolled_back']} rolled back"
            yield Problem("warn", what, "the trainer took a cut back", f"/runs/{run.run_id}")
