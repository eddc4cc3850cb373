"""The audit log as an append-only file: one line an entry, on disk before the call returns.

Promises: a line is written once, after the one before it, under a lock that all writers of the
host share; what was written is synced. A line that a crash cut short is taken off and written
again; nothing else in the file is ever changed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from leyline import GENESIS, AuditEntry

from .audit import Fault, Link, line_of, read_line

__all__ = ["AuditFile"]

_LONGEST_LINE = 1 << 20


class AuditFile:
    """One audit file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def links(self) -> Iterator[Link]:
        """Every line, in order; one that is no entry says why.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield read_line(line, f"{self.path}, line {number}")

    def last(self) -> tuple[int, str]:
        """Number and digest of the last whole line's entry; 0 and zeros for a file to come."""
        if not self.path.exists():
            return 0, GENESIS
        with self.path.open("rb") as file:
            return self._last(file.fileno())

    def extend(self, entries: Iterable[AuditEntry]) -> list[AuditEntry]:
        """Append the entries that are not in the file yet; those that were appended.

        Raises:
            ValueError: naming file and entry, if they do not continue the file's chain.
        """
        with self._locked() as descriptor:
            number, digest = self._last(descriptor)
            appended = []
            for entry in entries:
                if entry.number <= number:
                    continue
                if (entry.number, entry.previous) != (number + 1, digest):
                    raise ValueError(self._discontinued(entry, number))
                appended.append(entry)
                number, digest = entry.number, entry.digest
            if appended:
                _write(descriptor, b"".join(map(line_of, appended)))
                os.fsync(descriptor)
            return appended

    def _discontinued(self, entry: AuditEntry, number: int) -> str:
        fault = Fault(
            str(self.path),
            f"ends with entry {number}, and entry {entry.number} was not chained to it: the log "
            "on the bus is another one; keep this file and begin a new one",
        )
        return str(fault)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._take_off_torn_line(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _take_off_torn_line(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
        whole = tail.rfind(b"\n") + 1
        if whole < len(tail):
            os.ftruncate(descriptor, size - len(tail) + whole)

    def _last(self, descriptor: int) -> tuple[int, str]:
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
        lines = tail[: tail.rfind(b"\n") + 1].splitlines(keepends=True)
        if not lines:
            return 0, GENESIS
        link = read_line(lines[-1], f"{self.path}, its last line")
        if link.entry is None:
            raise ValueError(f"{link.place} {link.problem}")
        return link.entry.number, link.entry.digest


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
