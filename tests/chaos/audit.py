"""The audit: what the streams must say after any faults. Pure: facts in, violations out.

Every acknowledged checkpoint is in its stream; every checkpoint has one decision or is a dead
letter; no key has two decisions or a conflict; poison is among the dead letters; nothing is
pending; no lease was taken from a worker that was alive and connected; a trainer that listens heard
the end of all that it published; and how soon the work of a killed worker went on elsewhere, with
and without the time in which every other one was at work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from leyline import DeadLetter, TelemetryEvent

from .faults import Fault, Kind
from .idle import BEGUN, ENDED, Life, checkpoint_of, idle_seconds

__all__ = ["Facts", "Report", "audit"]

_TO_ALL = frozenset(
    {Kind.RESTART_SERVER, Kind.FREEZE_SERVER, Kind.STALL, Kind.REFUSE, Kind.FAILOVER}
)
_SLACK = 1.0
"""Seconds by which clocks of the log and of telemetry may differ in order."""


@dataclass(frozen=True)
class Facts:
    """Everything that the streams, the producers and the driver say."""

    acknowledged: frozenset[str]
    """Event ids that the server said it has."""
    checkpoints: dict[str, str]
    """Key of the decision that each event in the stream asks for, by event id."""
    decisions: Sequence[str]
    """Keys of the published decisions."""
    records: frozenset[str]
    """Keys that have a record."""
    dead_letters: Sequence[DeadLetter]
    telemetry: Sequence[TelemetryEvent]
    poison: frozenset[str]
    """Entries of the checkpoints' stream that are poison."""
    pending: int
    faults: Sequence[Fault]
    lease: float
    lives: Sequence[Life] = ()
    """When which worker served."""
    asked: frozenset[str] = frozenset()
    """Keys of what a trainer published that listens."""
    answered: frozenset[str] = frozenset()
    """Keys of what it heard the end of."""


@dataclass
class Report:
    """Figures and violations."""

    violations: dict[str, list[str]] = field(default_factory=dict)
    recoveries: list[float] = field(default_factory=list)
    """Seconds from a worker's kill until its work ran elsewhere. Here and below only where the
    server answered all the time: nobody can take over through it else."""
    unattended: list[float] = field(default_factory=list)
    """The same without the time after the lease in which no worker had a free hand."""
    offers: list[float] = field(default_factory=list)
    """Seconds from a worker's kill until its entries were taken from it, for any worker."""

    def require(self, name: str, offenders: Iterable[str]) -> None:
        """Note what breaks the promise ``name``."""
        self.violations[name] = sorted(offenders)

    @property
    def clean(self) -> bool:
        """Whether every promise was kept."""
        return not any(self.violations.values())


def p99(seconds: Sequence[float]) -> float | None:
    """The 99th percentile, the nearest rank; None of nothing."""
    ordered = sorted(seconds)
    return ordered[round(0.99 * (len(ordered) - 1))] if ordered else None


def audit(facts: Facts) -> Report:
    """Hold the facts to the promises."""
    report = Report()
    dead = {dead_letter.idempotency_key for dead_letter in facts.dead_letters}
    decided = Counter(facts.decisions)
    keys = set(facts.checkpoints.values())
    dead_lettered = {dead_letter.entry_id for dead_letter in facts.dead_letters}
    report.require("lost events", facts.acknowledged - facts.checkpoints.keys())
    report.require("lost keys", keys - decided.keys() - dead)
    report.require("lost poison", facts.poison - dead_lettered)
    report.require("duplicate decisions", (key for key, n in decided.items() if n > 1))
    report.require("decisions without record", decided.keys() - facts.records)
    report.require("conflicts", _conflicts(facts))
    report.require("decided unasked", decided.keys() - keys)
    report.require("deaf", facts.asked - facts.answered)
    report.require("left pending", ["entries"] * facts.pending)
    report.require("live leases stolen", _stolen(facts))
    for kill, seconds in _recoveries(facts):
        report.recoveries.append(seconds)
        report.unattended.append(_unattended(facts, kill, seconds))
    report.offers = list(_offers(facts))
    return report


def _conflicts(facts: Facts) -> Iterable[str]:
    yield from (x.idempotency_key for x in facts.dead_letters if x.error_code == "conflict")
    yield from (e.idempotency_key for e in facts.telemetry if e.step == "conflict")


def _stolen(facts: Facts) -> Iterable[str]:
    """Entries that were taken from an owner whom no fault had kept from renewing."""
    for event in facts.telemetry:
        if event.step != "reclaimed":
            continue
        owner, at = _owner(event), event.at.timestamp()
        if not any(_excuses(fault, owner, at, facts.lease) for fault in facts.faults):
            yield f"{event.detail} at {event.at:%H:%M:%S.%f} by {event.worker_id}"


def _owner(event: TelemetryEvent) -> str:
    """From whom an entry was taken."""
    return event.detail.split("of ")[-1].split()[0]


def _excuses(fault: Fault, owner: str, at: float, lease: float) -> bool:
    """Whether a fault may have kept ``owner`` from renewing a lease that was over at ``at``."""
    if fault.begun > at + _SLACK:
        return False
    if fault.kind in _TO_ALL:
        return fault.ended > at - 2 * lease - _SLACK
    if fault.target != owner:
        return False
    if fault.kind in (Kind.KILL_WORKER, Kind.DRAIN_WORKER):
        return True
    return fault.kind is Kind.FREEZE_WORKER and fault.ended > at - lease - _SLACK


def _recoveries(facts: Facts) -> Iterable[tuple[Fault, float]]:
    """For what each killed worker had begun and not ended: how long until another began it."""
    events = sorted((e for e in facts.telemetry if e.idempotency_key), key=lambda event: event.at)
    for fault in facts.faults:
        if fault.kind is not Kind.KILL_WORKER:
            continue
        held: dict[str, bool] = {}
        for event in events:
            if event.worker_id == fault.target:
                held[checkpoint_of(event)] = event.step not in ENDED
        for checkpoint in (name for name, open_ in held.items() if open_):
            later = (
                event.at.timestamp() - fault.begun
                for event in events
                if checkpoint_of(event) == checkpoint
                and event.worker_id != fault.target
                and event.step in BEGUN
                and event.at.timestamp() > fault.begun
            )
            if (first := next(later, None)) is not None and _undisturbed(facts, fault, first):
                yield fault, first


def _unattended(facts: Facts, kill: Fault, seconds: float) -> float:
    """Of the time from a kill until the work ran elsewhere, the lease and what came after it while
    somebody could have taken it."""
    lease = min(seconds, facts.lease)
    late = kill.begun + lease, kill.begun + seconds
    return lease + idle_seconds(facts.lives, facts.faults, facts.telemetry, late)


def _undisturbed(facts: Facts, kill: Fault, seconds: float) -> bool:
    """Whether the server could be reached from a kill on for so long."""
    until = kill.begun + seconds
    silences = (f for f in facts.faults if f.kind in _TO_ALL)
    return not any(f.begun < until and f.ended > kill.begun for f in silences)


def _offers(facts: Facts) -> Iterable[float]:
    killed = {f.target: f for f in facts.faults if f.kind is Kind.KILL_WORKER}
    for event in facts.telemetry:
        if event.step == "reclaimed" and (kill := killed.get(_owner(event))):
            seconds = event.at.timestamp() - kill.begun
            # What was taken before the kill was lost to an earlier freeze.
            if seconds > 0 and _undisturbed(facts, kill, seconds):
                yield seconds
