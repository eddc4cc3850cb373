"""The first page and the lists of runs and decisions as plain data: problems, the state of each
run, filters, pages.

Promises: pure functions of a history and a fleet; every figure that is unknown is None, and the
page says so; a list says how many rows there are in all, so that nothing is missed unseen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Generic, TypeVar
from urllib.parse import urlencode

from elesh.operate.fleet_status import FleetStatus
from elesh.operate.run_history import Decided, Run, RunHistory
from leyline import InvalidField, Level

RESULTS = ("applied", "rolled_back", "refused", "approved", "rejected")
"""What can have become of a decision; ``approved``: the trainer has not answered yet."""
_ROWS = 50
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """The filters of a list; empty fields filter nothing."""

    text: str = ""
    """In the name of the run, and of decisions in the key or the reason too."""
    run: str = ""
    """One run, by its whole name."""
    outcome: str = ""
    level: str = ""
    first: int | None = None
    """First epoch."""
    last: int | None = None
    page: int = 1

    @classmethod
    def of(cls, query: Mapping[str, str], *, run: str = "") -> Wanted:
        """What a query string asks for.

        Raises:
            InvalidField: if a field is not one of the choices, or not a number.
        """
        wanted = cls(
            text=query.get("text", "").strip()[:200],
            run=run or query.get("run", "").strip(),
            outcome=_one_of("outcome", query.get("outcome", ""), RESULTS),
            level=_one_of("level", query.get("level", ""), [level.value for level in Level]),
            first=_number("first", query.get("first", "")),
            last=_number("last", query.get("last", "")),
            page=_number("page", query.get("page", "")) or 1,
        )
        return wanted

    @property
    def filters(self) -> bool:
        """Whether any filter is set."""
        return replace(self, page=1, run="") != Wanted()

    def address(self, page: int = 1) -> str:
        """The query string of another page of the same list."""
        fields = {
            "text": self.text,
            "outcome": self.outcome,
            "level": self.level,
            "first": "" if self.first is None else str(self.first),
            "last": "" if self.last is None else str(self.last),
            "page": str(page) if page > 1 else "",
        }
        return "?" + urlencode({name: value for name, value in fields.items() if value})

    def takes(self, run: Run, decided: Decided) -> bool:
        """Whether it asks for a decision."""
        return (
            (not self.level or self.level in (*decided.levels, decided.level.value))
            and (self.first is None or decided.epoch >= self.first)
            and (self.last is None or decided.epoch <= self.last)
            and (not self.outcome or run.result(decided) == self.outcome)
            and (not self.text or self._speaks_of(run, decided))
        )

    def _speaks_of(self, run: Run, decided: Decided) -> bool:
        text = self.text.lower()
        outcome = run.outcome(decided.key)
        said = (run.run_id, decided.key, decided.reason, outcome.detail if outcome else "")
        return any(text in each.lower() for each in said)


@dataclass(frozen=True)
class Paged(Generic[T]):
    """A page of a list."""

    rows: tuple[T, ...]
    total: int
    page: int
    pages: int
    first: int
    """Number of the first row shown, from 1; 0 where there is none."""


def paged(rows: Sequence[T], page: int) -> Paged[T]:
    """A page of rows; one past the end is the last."""
    pages = max(1, -(-len(rows) // _ROWS))
    page = min(max(1, page), pages)
    start = (page - 1) * _ROWS
    shown = tuple(rows[start : start + _ROWS])
    return Paged(shown, len(rows), page, pages, start + 1 if shown else 0)


def runs_of(history: RunHistory, wanted: Wanted) -> list[Run]:
    """The runs that match, the one with the latest message first."""
    text = wanted.text.lower()
    found = history.recent()
    if text:
        found = [run for run in found if text in run.run_id.lower()]
    decisions = replace(wanted, text="")
    if decisions.filters:
        found = [
            run
            for run in found
            if any(decisions.takes(run, decided) for decided in run.decisions.values())
        ]
    return found


def decisions_of(runs: Iterable[Run], wanted: Wanted) -> list[tuple[Run, Decided]]:
    """The decisions that match, newest first."""
    found = [
        (run, decided)
        for run in runs
        for decided in run.decisions.values()
        if wanted.takes(run, decided)
    ]
    return sorted(found, key=lambda each: (each[1].order, each[1].key), reverse=True)


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value and value not in choices:
        raise InvalidField(name, f"one of {', '.join(choices)}", value)
    return value


def _number(name: str, value: str) -> int | None:
    if not value.strip():
        return None
    if not (value.strip().isdecimal() and len(value) < 12):
        raise InvalidField(name, "a number", value)
    return int(value)


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
