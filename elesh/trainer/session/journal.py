"""What was begun and what was done: by it a run that was killed knows where it stands.

Promises: a line counts once it is on disk, and then for good; a line that a kill has torn counts
for nothing. What the lines amount to (:class:`Situation`) is a pure fold over them.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from leyline import PruningOutcome

from .restore_points import write_durably

__all__ = ["Journal", "Situation", "MonitoredCut"]

Line = Mapping[str, Any]


@dataclass(frozen=True)
class MonitoredCut:
    """A monitored cut."""

    outcome: PruningOutcome
    """As it was reported when the cut was made."""
    before: int
    """The restore point from just before it."""
    limit: float
    """The drop of accuracy that takes it back."""
    left: int
    """Reports that it must still stand."""

    @property
    def key(self) -> str:
        """The decision's idempotency key."""
        return self.outcome.idempotency_key

    def fails(self, accuracy: float) -> bool:
        """Whether this accuracy is too far below the one before the cut; NaN is, too."""
        before = self.outcome.accuracy_before
        return before is not None and not before - accuracy <= self.limit

    def as_line(self) -> Line:
        """For the journal."""
        return vars(self) | {"outcome": self.outcome.model_dump(mode="json")}

    @classmethod
    def of_line(cls, line: Line) -> MonitoredCut:
        """From the journal."""
        return cls(**{**line, "outcome": PruningOutcome.model_validate(line["outcome"])})


@dataclass(frozen=True)
class Situation:
    """Where a run stands."""

    point: int | None = None
    """The restore point that is the present, or was when it was written."""
    epoch: int = 0
    """The epoch of that point."""
    begun: Line | None = None
    """What was begun and not done: ``begin`` is ``apply`` or ``rollback``, ``goal`` the point to
    go back to, ``pending`` the outcomes if it is cut short."""
    watched: tuple[MonitoredCut, ...] = ()
    """Monitored cuts, oldest first."""
    unreported: Mapping[str, Line] = field(default_factory=dict)
    """Outcomes that the bus does not have yet, by event id."""
    tried: tuple[str, ...] = ()
    """Keys of the decisions that were ever begun to be applied, oldest first."""

    def as_line(self) -> Line:
        """For the journal."""
        return vars(self) | {"watched": [cut.as_line() for cut in self.watched]}

    def after(self, line: Line) -> Situation:
        """The situation once ``line`` is written."""
        if "situation" in line:
            return _whole(line["situation"])
        now = self
        if "begin" in line:
            now = replace(now, begun=line)
        if line.get("begin") == "apply":
            keys = [outcome["idempotency_key"] for outcome in line["pending"]]
            now = replace(now, tried=(*now.tried, *keys))
        if "point" in line:
            now = replace(now, point=line["point"], epoch=line["epoch"])
        if "done" in line:
            now = replace(now, begun=None)
        if "watched" in line:
            cuts = tuple(MonitoredCut.of_line(cut) for cut in line["watched"])
            now = replace(now, watched=cuts)
        fresh = {**now.unreported, **line.get("outcomes", {})}
        if "reported" in line:
            fresh.pop(line["reported"], None)
        return replace(now, unreported=fresh)


def _whole(line: Line) -> Situation:
    cuts = tuple(MonitoredCut.of_line(cut) for cut in line["watched"])
    return Situation(**{**line, "watched": cuts, "tried": tuple(line.get("tried", ()))})


class Journal:
    """The lines of a run, in a file or (without one) in memory.

    Args:
        file: one JSON object a line; read at once, and shortened to what still matters.
    """

    def __init__(self, file: Path | None) -> None:
        self.situation = Situation()
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        if file is None:
            return
        if file.exists():
            for line in _lines(file.read_bytes()):
                self.situation = self.situation.after(line)
        write_durably(file, _bytes({"situation": self.situation.as_line()}))
        self._file = file.open("ab", buffering=0)

    def write(self, **line: Any) -> None:
        """Add a line; on return it is on disk. Safe to call from any thread.

        Raises:
            OSError: if it cannot be written; it counts for nothing then.
        """
        with self._lock:
            if self._file is not None:
                _append(self._file, _bytes(line))
            self.situation = self.situation.after(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _append(file: IO[bytes], data: bytes) -> None:
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, "written in part only", file.name)
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)  # a half line must not spoil the next one
        raise


def _bytes(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _lines(data: bytes) -> Iterable[Line]:
    """The whole lines; what follows the last newline was torn by a kill."""
    *whole, _torn = data.split(b"\n")
    return [json.loads(line) for line in whole]
