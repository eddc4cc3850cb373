"""What one worker does and has done: counted once, shown by metrics, health and registry.

Pure but for the clock that it is given. :class:`~.reports.Reports` feeds it; nothing in here
waits.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

from elesh.bus import WorkerState
from elesh.observe import metrics
from leyline import ContractError, Level, PruningOutcome, StructuralPruningDecision

__all__ = ["Condition", "Status", "levels_of", "reason_of"]

_NAMED = frozenset(level.value for level in Level) - {Level.JOINT.value}

_RECENT = 1000
Doing = Literal["starting", "idle", "busy", "draining"]


@dataclass(frozen=True)
class Condition:
    """How a worker is, as its monitor sees it."""

    child: Literal["starting", "idle", "busy", "wedged", "dead"] = "starting"
    ready: bool = False
    why: str = "starting"
    """Why it is not ready; empty where it is."""


@dataclass
class Status:
    """Counters of one worker since it started."""

    worker_id: str
    version: str = field(default_factory=lambda: version("elesh"))
    clock: Callable[[], float] = time.time
    condition: Condition = field(default_factory=Condition)
    health_url: str = ""
    doing: Doing = "starting"
    completed: int = 0
    failed: int = 0
    fallbacks: int = 0
    dead_letters: int = 0
    peak_memory: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Trainers' outcomes that this worker heard of, by level and result."""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """Of the last analyses."""

    def __post_init__(self) -> None:
        self.started = self.clock()
        self._lacks, self._lacks_until = "", 0.0
        self._in_flight: dict[tuple[str, str], tuple[str, float]] = {}

    @property
    def lacks(self) -> str:
        """What it has no room for now; empty: nothing."""
        return self._lacks

    def lacking(self, what: str, *, until: float) -> None:
        """It lacks something, and takes nothing until then (monotonic seconds)."""
        self._lacks, self._lacks_until = what, until

    def lacking_for(self, now: float) -> float:
        """Seconds that it will take nothing more; at most zero if it may."""
        return self._lacks_until - now

    def announce(self) -> None:
        """Begin the counters that rates are taken of: the first event must find them at zero."""
        for level in Level:
            for result in ("completed", "failed"):
                metrics.ANALYSES.add(0, {"level": level.value, "result": result})
            for result in ("applied", "rolled_back"):
                metrics.OUTCOMES.add(0, {"level": level.value, "result": result})
            metrics.REMOVED_UNITS.add(0, {"level": level.value})
        for code in _codes(ContractError):
            metrics.DEAD_LETTERS.add(0, {"code": code})
        metrics.SAVED_PARAMETERS.add(0)
        metrics.SAVED_MACS.add(0)

    def serving(self) -> None:
        """It can take work."""
        self.doing = "idle"

    def draining(self) -> None:
        """It takes no new work."""
        self.doing = "draining"

    def began(self, key: str, origin: tuple[str, str]) -> None:
        """It works on an entry, which belongs to the decision of ``key``."""
        self._in_flight[origin] = key, self.clock()
        if self.doing != "draining":
            self.doing = "busy"

    def ended(self, origin: tuple[str, str]) -> None:
        """It has nothing to do with an entry any more."""
        _, since = self._in_flight.pop(origin, ("", None))
        if since is not None:
            labels = {"messaging.system": "redis", "messaging.destination.name": origin[0]}
            metrics.PROCESS_SECONDS.record(self.clock() - since, labels)
        if self.doing == "busy" and not self._in_flight:
            self.doing = "idle"

    @property
    def longest(self) -> tuple[str, float]:
        """What it has in flight for the longest time: the key of its decision, and since when."""
        return next(iter(self._in_flight.values()), ("", 0.0))

    def fetched(self, size: int) -> None:
        """Blobs were read."""
        metrics.BLOB_BYTES.add(size)

    def analysed(self, level: Level, seconds: float, peak_memory: int) -> None:
        """The child answered."""
        self.completed += 1
        self.seconds.append(seconds)
        self.peak_memory = max(self.peak_memory, peak_memory)
        metrics.ANALYSES.add(1, {"level": level.value, "result": "completed"})
        metrics.ANALYSIS_SECONDS.record(seconds, {"level": level.value})

    def gave_up(self, level: Level) -> None:
        """An analysis gave no result."""
        self.failed += 1
        metrics.ANALYSES.add(1, {"level": level.value, "result": "failed"})

    def committed(self, decision: StructuralPruningDecision) -> None:
        """A decision was published."""
        for level in levels_of(decision):
            approved = decision.approved_for_application and level in decision.taken
            verdict = "approved" if approved else "rejected"
            reason = "none" if approved else reason_of(decision, level)
            labels = {"level": level.value, "verdict": verdict, "reason": reason}
            metrics.DECISIONS.add(1, labels)

    def fell_back(self, name: str) -> None:
        """A fallback of the failure table was taken."""
        self.fallbacks += 1
        # "rung": the label of the version before.
        metrics.FALLBACKS.add(1, {"fallback": name, "rung": name})

    def redelivered(self, cause: str) -> None:
        """An entry went round again."""
        metrics.REDELIVERIES.add(1, {"cause": cause})

    def dead_lettered(self, code: str) -> None:
        """An entry went to the dead letters."""
        self.dead_letters += 1
        metrics.DEAD_LETTERS.add(1, {"code": code})

    def heard(self, outcome: PruningOutcome, decision: StructuralPruningDecision) -> None:
        """A trainer reported what it made of a decision; of a monitored cut only the end counts."""
        if outcome.watched:
            return
        for level in decision.taken or levels_of(decision):
            self.outcomes[level.value, outcome.result] += 1
            metrics.OUTCOMES.add(1, {"level": level.value, "result": outcome.result})
        if outcome.result == "applied":
            _saved(outcome, decision)

    @property
    def completion_rate(self) -> float:
        """Share of analyses that gave a result; 1 before the first."""
        ended = self.completed + self.failed
        return self.completed / ended if ended else 1.0

    @property
    def duration_p95(self) -> float:
        """95th percentile of the last thousand analyses, in seconds; 0 before the first."""
        return metrics.p95(self.seconds)

    def confirmed(self) -> dict[str, float]:
        """By level, the share of applied cuts among those that the trainer's own check decided."""
        shares = {}
        for level in {level for level, _ in self.outcomes}:
            applied = self.outcomes[level, "applied"]
            decided = applied + self.outcomes[level, "rolled_back"]
            if decided:
                shares[level] = applied / decided
        return shares

    def state(self) -> WorkerState:
        """What the register and the health page say of it."""
        key, since = self.longest
        return WorkerState(
            worker_id=self.worker_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=self.version,
            started_at=self.started,
            doing=self.doing,
            child=self.condition.child,
            ready=self.condition.ready,
            why=self.condition.why,
            key=key,
            since=since,
            health_url=self.health_url,
            completed=self.completed,
            failed=self.failed,
            fallbacks=self.fallbacks,
            dead_letters=self.dead_letters,
            duration_p95=self.duration_p95,
            peak_memory_bytes=self.peak_memory,
        )


def levels_of(decision: StructuralPruningDecision) -> tuple[Level, ...]:
    """The levels that were asked for."""
    return tuple(part.level for part in decision.levels) or (decision.key.level,)


def _codes(kind: type[ContractError]) -> set[str]:
    """Every class of error that a dead letter can have."""
    return {kind.code}.union(*map(_codes, kind.__subclasses__()))


def reason_of(decision: StructuralPruningDecision, level: Level) -> str:
    """Why a level was rejected, as a label: its first gate that failed, else that of the whole
    decision, else one fixed word."""
    failed = [gate.name for gate in decision.safety.gates if not gate.passed]
    own = [name.partition(".")[2] for name in failed if name.startswith(f"{level.value}.")]
    whole = [name.removeprefix("joint.") for name in failed if name.partition(".")[0] not in _NAMED]
    return next(iter([*own, *whole]), "nothing_to_remove")


def _saved(outcome: PruningOutcome, decision: StructuralPruningDecision) -> None:
    """Count what a cut that stays has saved."""
    counts = {
        Level.CHANNEL: sum(len(target.channel_indices) for target in decision.channels),
        Level.HEAD: sum(len(target.head_indices) for target in decision.attention_heads),
        Level.LAYER: len(decision.layers),
    }
    for level, count in counts.items():
        if count:
            metrics.REMOVED_UNITS.add(count, {"level": level.value})
    parameters = outcome.parameters_before - outcome.parameters_after
    metrics.SAVED_PARAMETERS.add(max(0, parameters))
    statistics = decision.statistics
    metrics.SAVED_MACS.add(max(0, statistics.macs_before - statistics.macs_after))
