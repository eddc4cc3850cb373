"""The first page as plain data: what is broken, and where each run stands.

Promises: pure functions of a history and a fleet; every figure that is unknown is None, and the
page says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from elesh.operate.fleet_status import FleetStatus
from elesh.operate.run_history import Run

from .lists import RESULTS

__all__ = ["Problem", "RunRow", "problems", "run_row"]

_LATE_SECONDS = 60.0
_NAMED = 5
"""Problems of one kind that are named; the rest is counted."""


@dataclass(frozen=True)
class Problem:
    """Something that an operator should look at."""

    tone: str
    """``bad`` or ``warn``."""
    what: str
    detail: str
    href: str = ""


@dataclass(frozen=True)
class RunRow:
    """A run in the list of all."""

    run_id: str
    at: datetime
    """When it was last heard of."""
    epoch: int
    phase: str
    accuracy: float | None
    parameters: int | None
    original_parameters: int | None
    macs_left: float | None
    """Share of the original multiply-accumulates, 0 to 1."""
    results: tuple[tuple[str, int], ...]


def run_row(run: Run) -> RunRow:
    """A run's row."""
    last = max(run.checkpoints.values(), key=lambda point: point.order, default=None)
    decided = max(run.decisions.values(), key=lambda each: each.order, default=None)
    shape = last.shape if last else None
    return RunRow(
        run_id=run.run_id,
        at=run.at,
        epoch=run.epoch,
        phase=decided.phase if decided else "",
        accuracy=last.accuracy if last else None,
        parameters=shape.parameters if shape else None,
        original_parameters=shape.original_parameters if shape else None,
        macs_left=shape.macs / shape.original_macs if shape and shape.original_macs else None,
        results=results_of(run),
    )


def results_of(run: Run) -> tuple[tuple[str, int], ...]:
    """How many decisions of a run came to what."""
    counts = Counter(run.result(decided) for decided in run.decisions.values())
    return tuple((result, counts[result]) for result in RESULTS if counts[result])


def problems(fleet: FleetStatus, runs: Iterable[RunRow]) -> tuple[Problem, ...]:
    """What needs attention, the worst first; many of a kind are counted."""
    return (*_of_fleet(fleet), *_of_runs(runs))


def _of_fleet(fleet: FleetStatus) -> Iterator[Problem]:
    if not fleet.workers:
        yield Problem("bad", "No worker is alive", "checkpoints wait until one serves", "/fleet")
    tripped = [breaker for breaker in fleet.breakers if breaker.state != "closed"]
    for breaker in tripped[:_NAMED]:
        what = f"Breaker of {breaker.run_id} at level {breaker.level} is {breaker.state}"
        yield Problem("bad", what.replace("_", " "), breaker.reason, "/fleet#breakers")
    yield from _more(len(tripped), "bad", "breakers more are open", "/fleet#breakers")
    unready = [worker for worker in fleet.workers if not worker.ready]
    for worker in unready[:_NAMED]:
        yield Problem("warn", f"Worker {worker.worker_id} is not ready", worker.why, "/fleet")
    yield from _more(len(unready), "warn", "workers more are not ready", "/fleet")
    if fleet.dead_total:
        plural = "1 dead letter" if fleet.dead_total == 1 else f"{fleet.dead_total:,} dead letters"
        waiting = [each for each in fleet.dead_letters if not each.redriven_as]
        detail = ""
        if waiting:
            newest = waiting[0]
            detail = f"newest: {newest.message.reason if newest.message else newest.error}"
        yield Problem("warn", plural, detail, "/dead")
    for name, backlog in fleet.backlog.items():
        age = backlog.oldest_seconds
        if age is not None and age > _LATE_SECONDS:
            since = fleet.since(age)
            waits = f"the oldest entry has waited since {since:%H:%M:%S} UTC"
            yield Problem("warn", f"{name}: {waits}", "", "/fleet")


def _of_runs(runs: Iterable[RunRow]) -> Iterator[Problem]:
    taken_back = [run for run in runs if dict(run.results).get("rolled_back")]
    for run in taken_back[:_NAMED]:
        what = f"{run.run_id}: {dict(run.results)['rolled_back']} rolled back"
        yield Problem("warn", what, "the trainer took a cut back", f"/runs/{run.run_id}")
    yield from _more(
        len(taken_back), "warn", "runs more took cuts back", "/?outcome=rolled_back#runs"
    )


def _more(count: int, tone: str, what: str, href: str) -> Iterator[Problem]:
    if count > _NAMED:
        yield Problem(tone, f"{count - _NAMED:,} {what}", "", href)
