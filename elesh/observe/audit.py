"""The audit log without a server: messages as events, entries as lines, verification of the chain,
and the append-only file.

Promises: :func:`verify` names every place where an entry was removed, changed, or moved, and what
is wrong there. A line of the file is the entry's JSON with its digest as last member; every byte of
it is covered. A line is written once, after the one before it, under a lock that all writers of the
host share, and synced before the call returns. A line that a crash cut short is taken off and
written again; nothing else in the file is ever changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import singledispatch
from pathlib import Path

from leyline import (
    GENESIS,
    AuditEntry,
    AuditEvent,
    BreakerTransition,
    DeadLetter,
    Message,
    OperatorAction,
    PruningOutcome,
    StructuralPruningDecision,
    encode,
)

_LINE = re.compile(rb'(?P<body>\{.*),"digest":"(?P<digest>[0-9a-f]{64})"\}\n')


@dataclass(frozen=True)
class Fault:
    """One place where the chain does not hold."""

    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


@dataclass(frozen=True)
class Link:
    """What stands at one place of a stream or a file: an entry, or why there is none."""

    place: str
    entry: AuditEntry | None
    problem: str = ""
    doubt: str = ""
    """Why an entry that can be read may not be an auditor's: it has no auditor's signature."""


def audit_event(message: Message, *, source: str, at: datetime) -> AuditEvent | None:
    """What a message of the bus is to the audit log; None for messages that it does not keep.

    Args:
        source: where it stands, ``<stream>/<entry id>``.
        at: when it was put there.
    """
    return _translate(message, source, at)


@singledispatch
def _translate(message: Message, source: str, at: datetime) -> AuditEvent | None:
    return None


@_translate.register
def _of_decision(decision: StructuralPruningDecision, source: str, at: datetime) -> AuditEvent:
    statistics = decision.statistics
    figures = {
        "channels": sum(len(target.channel_indices) for target in decision.channels),
        "heads": sum(len(target.head_indices) for target in decision.attention_heads),
        "layers": len(decision.layers),
        "parameters_before": statistics.parameters_before,
        "parameters_after": statistics.parameters_after,
        "cumulative_ratio": statistics.cumulative_ratio,
        "phase_limit": statistics.phase_limit,
        "confidence": decision.safety.confidence,
        "predicted_shift": statistics.predicted_shift,
        "predicted_loss_rise": statistics.predicted_loss_rise,
    }
    return AuditEvent(
        kind="decision",
        action="approved" if decision.approved_for_application else "rejected",
        actor="elesh",
        at=at,
        subject=decision.idempotency_key,
        run_id=decision.run_id,
        epoch=decision.epoch,
        reason=decision.rejection_reason,
        source=source,
        digest=_digest(decision),
        figures={name: float(value) for name, value in figures.items() if value is not None},
        gates=decision.safety.gates,
        fallbacks=decision.fallbacks,
    )


@_translate.register
def _of_outcome(outcome: PruningOutcome, source: str, at: datetime) -> AuditEvent:
    figures = {
        "accuracy_before": outcome.accuracy_before,
        "accuracy_masked": outcome.accuracy_masked,
        "loss_before": outcome.loss_before,
        "loss_masked": outcome.loss_masked,
        "parameters_before": outcome.parameters_before,
        "parameters_after": outcome.parameters_after,
    }
    return AuditEvent(
        kind="outcome",
        action=outcome.result,
        actor=f"trainer of {outcome.run_id}",
        at=at,
        subject=outcome.idempotency_key,
        run_id=outcome.run_id,
        epoch=outcome.epoch,
        reason=outcome.detail,
        source=source,
        digest=_digest(outcome),
        figures={name: float(value) for name, value in figures.items() if value is not None},
    )


@_translate.register
def _of_transition(change: BreakerTransition, source: str, at: datetime) -> AuditEvent:
    return AuditEvent(
        kind="breaker",
        action=change.after,
        actor="elesh",
        at=change.at,
        subject=f"{change.run_id}:{change.level}",
        run_id=change.run_id,
        reason=change.reason,
        source=source,
        digest=_digest(change),
        figures={"failures": float(change.failures)},
    )


@_translate.register
def _of_dead_letter(dead_letter: DeadLetter, source: str, at: datetime) -> AuditEvent:
    return AuditEvent(
        kind="dead_letter",
        action=dead_letter.error_code,
        actor=dead_letter.worker_id,
        at=dead_letter.at,
        subject=f"{dead_letter.stream}/{dead_letter.entry_id}"[:512],
        reason=dead_letter.reason,
        source=source,
        digest=_digest(dead_letter),
        figures={"deliveries": float(dead_letter.deliveries)},
    )


@_translate.register
def _of_action(action: OperatorAction, source: str, at: datetime) -> AuditEvent:
    return AuditEvent(
        kind="operator",
        action=action.action,
        actor=action.operator or "unknown",
        at=action.at,
        subject=action.subject,
        reason="; ".join(filter(None, (action.reason, action.outcome)))[:8192],
        source=source,
        digest=_digest(action),
    )


def _digest(message: Message) -> str:
    return hashlib.sha256(encode(message)).hexdigest()


def line_of(entry: AuditEntry) -> bytes:
    """An entry as a line of the append-only file, its end included."""
    return entry.text[:-1].encode() + f',"digest":"{entry.digest}"}}\n'.encode()


def read_line(line: bytes, place: str) -> Link:
    """What a line of the file holds; its digest and every byte of it are checked."""
    found = _LINE.fullmatch(line)
    if found is None:
        return Link(place, None, "is no line of an audit log: cut short or overwritten")
    text = found["body"] + b"}"
    if hashlib.sha256(text).hexdigest().encode() != found["digest"]:
        return Link(place, None, "was changed: it does not have the digest that it states")
    try:
        return Link(place, AuditEntry.model_validate_json(text))
    except ValueError as error:
        return Link(place, None, f"is no audit entry: {error}")


def verify(
    links: Iterable[Link], *, number: int = 0, digest: str = "", signed_from: int = 1
) -> list[Fault]:
    """Every fault of a chain that should begin at entry 1 and end at entry ``number``.

    Args:
        number: 0 says that its end is not known (a file alone): what was cut off is not seen.
        signed_from: entries before this one may be unsigned: there was no keyring yet.
    """
    faults: list[Fault] = []
    digests, places = {0: GENESIS}, {0: "the beginning"}
    expected, place = 1, places[0]
    for link in links:
        entry, place = link.entry, link.place
        if entry is None:
            faults.append(Fault(place, link.problem))
            expected += 1
            continue
        if link.doubt and entry.number >= signed_from:
            faults.append(Fault(place, f"entry {entry.number} is not an auditor's: {link.doubt}"))
        if entry.number != expected:
            faults.append(Fault(place, f"entry {entry.number} where entry {expected} should be"))
        before = digests.get(entry.number - 1)
        if before is not None and before != entry.previous:
            problem = f"was changed: entry {entry.number} was chained to another"
            faults.append(Fault(places[entry.number - 1], problem))
        digests[entry.number], places[entry.number] = entry.digest, place
        expected = max(expected, entry.number + 1)
    return faults + _at_the_end(digests, expected - 1, number, digest, place)


def sound(links: Iterable[Link], faults: Iterable[Fault]) -> str:
    """Which entries a chain with faults still vouches for, as a phrase; empty for none."""
    bad = {fault.place for fault in faults}
    runs: list[tuple[int, int]] = []
    for link in links:
        if link.entry is None or link.place in bad:
            continue
        number = link.entry.number
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in runs[:5])


def _at_the_end(
    digests: dict[int, str], last: int, number: int, digest: str, place: str
) -> list[Fault]:
    if number and last < number:
        gone = f"entry {number} is" if last + 1 == number else f"entries {last + 1} to {number} are"
        return [Fault(f"after {place}", f"{gone} missing: the chain ends at entry {number}")]
    if number and digests.get(number, digest) != digest:
        return [
            Fault(place, f"entry {number} was changed: it has not the digest of the chain's end")
        ]
    return []


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
