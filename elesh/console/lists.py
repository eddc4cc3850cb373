"""Lists of runs and decisions: filtered by what a query asks for, a page at a time.

Promises: pure; a list says how many rows there are in all, so that nothing is missed unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar
from urllib.parse import urlencode

from elesh.operate.run_history import Decided, Run, RunHistory
from leyline import InvalidField, Level

__all__ = ["RESULTS", "Paged", "Wanted", "decisions_of", "paged", "runs_of"]

RESULTS = ("applied", "rolled_back", "refused", "approved", "rejected")
"""What can have become of a decision; ``approved``: the trainer has not answered yet."""
_ROWS = 50
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What a list is asked for; empty fields ask for nothing in particular."""

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
            InvalidField: if a field is none of the choices, or no number.
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
        """Whether anything but a page is asked for."""
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
    """The runs that are asked for, last heard of first."""
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
    """The decisions that are asked for, newest first."""
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
