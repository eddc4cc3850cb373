"""The journal of a run: what was begun and what was done, so that a killed run can go on.

Promises: a line counts once it is on disk, and then for good; a line that a kill has torn, and one
whose digest is not its own, count for nothing. What the lines amount to (:class:`Situation`) is a
pure fold over them. A disk that is full for a moment loses no line that may wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from elesh.observe import get_logger
from leyline import PruningOutcome

from .evaluation import Evaluation, Expected, expected, failed_check
from .files import is_at, open_private, write_durably

Line = Mapping[str, Any]
_DIGEST = 16
_SINGLE = 5
"""So many limits below is a single report that takes a cut back: one is no verdict on less."""
_log = get_logger(__name__)


@dataclass(frozen=True)
class MadeCut:
    """A cut that was made and reported, and may still be undone."""

    outcome: PruningOutcome
    """As it was reported when the cut was made."""
    before: int
    """The restore point from just before it."""
    limit: float
    """The drop of accuracy that takes it back."""
    left: int
    """Reports of accuracy that it must still stand; 0: it is no longer monitored."""
    doubted: bool = False
    """Whether the last reports are below the limit, by no more than training scatters."""
    moves: tuple[float, ...] = ()
    """Of accuracy from epoch to epoch before the cut."""
    reports: tuple[float, ...] = ()
    """Accuracies of now, one for each report since the cut."""
    losses: tuple[float, ...] = ()
    """Losses of the same reports."""
    samples: int = 0
    """Number of samples behind the accuracy; 0 if unknown."""

    @property
    def key(self) -> str:
        """The decision's idempotency key."""
        return self.outcome.idempotency_key

    @property
    def scatter(self) -> float:
        """Standard deviation of accuracy from epoch to epoch, as far as it is known."""
        return self._expected(self.reports).scatter

    def _expected(self, reports: Sequence[float]) -> Expected:
        before, after = self.outcome.accuracy_before or 0.0, self.outcome.accuracy_after
        after = before if after is None else after
        return expected(
            before, after, self.moves, self.limit, reports=reports, samples=self.samples
        )

    def falls_short(self, now: Evaluation, limits: int = 1) -> bool:
        """Whether these figures alone are so many limits below those before the cut, or no
        numbers."""
        return not now.finite or self._falls((now.accuracy,), limits)

    def failure(self, now: Evaluation) -> str:
        """Why the cut has to be taken back; empty if it has not.

        Accuracy must have fallen by more than the limit since before the cut, and further than
        training scatters by itself since right after it: by the mean of all reports, or by the last
        one where that is five limits below. And the loss, where one is measured, must have risen: a
        fall without that is of few samples, by chance.
        """
        if not now.finite:
            return failed_check(self.outcome.accuracy_before or 0.0, now, self.limit)
        reports, losses = (*self.reports, now.accuracy), (*self.losses, now.loss)
        for count in sorted({1, len(reports)}):
            tail = reports[-count:]
            # A single report is judged by those before it: it would hide in its own scatter.
            known = self._expected(self.reports if count == 1 else reports)
            limits = _SINGLE if len(tail) == 1 else 1
            if self._falls(tail, limits) and known.fell(tail) and self._rose(losses[-count:]):
                of = f" in the mean of {count} reports" if len(tail) > 1 else ""
                return (
                    f"accuracy {self.outcome.accuracy_before:.4f} fell to "
                    f"{sum(tail) / len(tail):.4f}{of}, more than {self.limit:g},"
                )
        return ""

    def stood(self, now: Evaluation) -> MadeCut:
        """After one report more. One below the limit that training's scatter explains leaves the
        next ones to decide, for as many more as there were to stand."""
        reports, losses = (*self.reports, now.accuracy), (*self.losses, now.loss)
        doubted = self.falls_short(now) or self._falls(reports)
        over = len(reports) >= 2 * (self.outcome.watched or 0)
        left = (0 if over else self.left) if doubted else self.left - 1
        return replace(self, reports=reports, losses=losses, doubted=doubted, left=left)

    def _rose(self, losses: Sequence[float]) -> bool:
        """Whether the mean loss is above that before the cut, or none is measured."""
        before = self.outcome.loss_before
        return not before or not losses or sum(losses) / len(losses) > before

    def _falls(self, reports: Sequence[float], limits: int = 1) -> bool:
        before = self.outcome.accuracy_before
        mean = sum(reports) / len(reports)
        return before is not None and before - mean > limits * self.limit + 1e-9

    def as_line(self) -> Line:
        """For the journal."""
        return vars(self) | {"outcome": self.outcome.model_dump(mode="json")}

    @classmethod
    def of_line(cls, line: Line) -> MadeCut:
        """From the journal."""
        lists = {name: tuple(line.get(name, ())) for name in ("moves", "reports", "losses")}
        outcome = PruningOutcome.model_validate(line["outcome"])
        return cls(**{**line, **lists, "outcome": outcome})


@dataclass(frozen=True)
class Situation:
    """Where a run stands."""

    point: int | None = None
    """The restore point that is the present, or was when it was written."""
    begun: Line | None = None
    """What was begun and not done: ``begin`` is ``apply`` or ``rollback``, ``goal`` the point to
    go back to, ``pending`` the outcomes if it is interrupted."""
    cuts: tuple[MadeCut, ...] = ()
    """Cuts that are monitored, or younger than the oldest restore point; oldest first."""
    unreported: Mapping[str, Line] = field(default_factory=dict)
    """Outcomes that the bus does not have yet, by event id."""
    tried: tuple[str, ...] = ()
    """Keys of the decisions that were ever begun to be applied, oldest first."""
    carriers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Trace contexts of the decisions whose outcome may still be reported, by key."""
    moves: tuple[float, ...] = ()
    """Of accuracy from epoch to epoch, the last ones, without what cuts did to it."""
    uncut: int = 0
    """Reports for which training is still watched without a cut, after a rollback."""

    @property
    def monitored(self) -> tuple[MadeCut, ...]:
        """Cuts in their monitoring window, oldest first."""
        return tuple(cut for cut in self.cuts if cut.left)

    def as_line(self) -> Line:
        """For the journal."""
        return vars(self) | {"cuts": [cut.as_line() for cut in self.cuts]}

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
        if "carriers" in line:
            now = replace(now, carriers={**now.carriers, **line["carriers"]})
        if "point" in line:
            now = replace(now, point=line["point"])
        if "done" in line:
            now = replace(now, begun=None)
        if "uncut" in line:
            now = replace(now, moves=tuple(line["moves"]), uncut=line["uncut"])
        if "cuts" in line:
            now = replace(now, cuts=tuple(MadeCut.of_line(cut) for cut in line["cuts"]))
        fresh = {**now.unreported, **line.get("outcomes", {})}
        if "reported" in line:
            fresh.pop(line["reported"], None)
        # Contexts of decisions whose last outcome was reported are not needed any more.
        pending = (now.begun or {}).get("pending", ())
        waiting = [line["idempotency_key"] for line in (*pending, *fresh.values())]
        needed = {*waiting, *(cut.key for cut in now.cuts)}
        carriers = {key: value for key, value in now.carriers.items() if key in needed}
        return replace(now, unreported=fresh, carriers=carriers)


def _whole(line: Line) -> Situation:
    cuts = tuple(MadeCut.of_line(cut) for cut in line["cuts"])
    lists = {name: tuple(line.get(name, ())) for name in ("tried", "moves")}
    return Situation(**{**line, **lists, "cuts": cuts})


class Journal:
    """The lines of a run, in a file or (without one) in memory.

    Args:
        file: a digest and a JSON object a line; read at once, and shortened to what still matters.
            Where lines are damaged, the file is kept beside it as ``journal.damaged``.

    Raises:
        OSError: if the file is there and cannot be read.
    """

    def __init__(self, file: Path | None) -> None:
        self.situation = Situation()
        self.whole = True
        """Whether every line that was ever written could be read; False also where there was no
        file, or none in it: it is made with one. If not, restore points know better where the run
        stands."""
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._path = file
        if file is None:
            return
        lines, damaged = _read(file)
        self.whole = bool(lines) and not damaged
        for line in lines:
            self.situation = self.situation.after(line)
        if damaged:
            _log.error("journal damaged", file=file, lines=damaged, kept="journal.damaged")
            with contextlib.suppress(OSError):
                os.replace(file, file.with_suffix(".damaged"))
        self._open(file)

    def _open(self, file: Path) -> None:
        start = _bytes({"situation": self.situation.as_line()})
        try:
            write_durably(file, start)
        except OSError as error:
            _log.warning("journal not shortened", file=file, reason=str(error))
            if not file.exists():
                self._waiting.append(start)
        self._open_at_end(file)

    def _open_at_end(self, file: Path) -> None:
        self._file = os.fdopen(open_private(file, os.O_RDWR), "r+b", buffering=0)
        self._end = _end_of_lines(self._file.read())

    def write(self, **line: Any) -> None:
        """Add a line; on return it is on disk. Safe to call from any thread.

        Raises:
            OSError: if it cannot be written; it counts for nothing then.
        """
        with self._lock:
            if self._file is not None:
                self._append(_bytes(line))
            self.situation = self.situation.after(line)

    def write_later(self, **line: Any) -> None:
        """Add a line that counts at once, and is on disk as soon as the disk takes it: at the
        latest before the next one. For what may be done again after a kill."""
        with self._lock:
            if self._file is not None:
                data = _bytes(line)
                try:
                    self._append(data)
                except OSError as error:
                    _log.warning("journal line waits for the disk", reason=str(error))
                    self._waiting.append(data)
            self.situation = self.situation.after(line)

    @property
    def waits(self) -> bool:
        """Whether lines wait for the disk."""
        return bool(self._waiting)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is None:
                return
            if self._waiting:
                with contextlib.suppress(OSError):
                    self._append(b"")
            self._file.close()
            self._file = None

    def _append(self, data: bytes) -> None:
        if self._file is None or self._path is None:
            return
        if not is_at(self._path, self._file):  # deleted since: what the lines were is written again
            begun, whole = self._file, _bytes({"situation": self.situation.as_line()})
            write_durably(self._path, whole)
            self._waiting.clear()
            self._open_at_end(self._path)
            begun.close()
        data = b"".join([*self._waiting, data])
        # Also cuts off what a kill or a full disk left of a line: it must not spoil the next one.
        self._file.truncate(self._end)
        self._file.seek(self._end)
        if self._file.write(data) < len(data):
            raise OSError(errno.ENOSPC, "written in part only", self._file.name)
        os.fsync(self._file.fileno())
        self._end += len(data)
        self._waiting.clear()


def _bytes(line: Line) -> bytes:
    text = json.dumps(line).encode()
    return b"%s %s\n" % (_digest(text), text)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGEST].encode()


def _end_of_lines(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _read(file: Path) -> tuple[list[Line], int]:
    """The sound lines, and how many are not; what follows the last newline was torn by a kill."""
    if not file.exists():
        return [], 0
    data = file.read_bytes()
    *whole, _torn = data.split(b"\n")
    split = [line.partition(b" ") for line in whole]
    sound = [json.loads(text) for digest, _, text in split if digest == _digest(text)]
    return sound, len(whole) - len(sound)
