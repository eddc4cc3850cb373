"""What a decision needs to know of its level's circuit breaker, and what a decision tells it.

Promises: the state is written into the decision's ``breaker`` gate completely, so that a replay
decides under the very same breaker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from leyline import GateResult, Level, PruningOutcome, StructuralPruningDecision

from .gates import rejection
from .measured_gates import MEASURED_GATES
from .rolled_back import ROLLED_BACK

__all__ = [
    "ARCHITECTURE_GATES",
    "BreakerStatus",
    "Vote",
    "breaker_gate",
    "grounds",
    "levels_of",
    "vote_of",
    "votes",
]

State = Literal["closed", "open", "half_open"]
Vote = Literal["failure", "success", "none"]

ARCHITECTURE_GATES = frozenset({"structure", "gradient_isolation"})
"""Gates whose failure says that the network would not hold together: all is rejected then."""
INTEGRITY_GATES = ARCHITECTURE_GATES | frozenset(
    {
        "statistics",
        "minimum_channels",
        "minimum_heads",
        "cumulative_limit",
    }
)
"""Gates whose failure says that something is broken, not that a careful answer is no."""
REFUSED = "measured"
"""Stands for a cut of which no part was measured as safe: its ranking is no good."""


@dataclass(frozen=True)
class BreakerStatus:
    """A circuit breaker as the caller saw it."""

    state: State = "closed"
    failures: int = 0
    reason: str = ""

    @classmethod
    def of(cls, decision: StructuralPruningDecision) -> dict[Level, BreakerStatus]:
        """The breakers under which ``decision`` was made, by level; closed ones where it has no
        such gate."""
        found = {level: cls() for level in levels_of(decision)}
        for level, gate in _by_level(decision):
            if gate.name.endswith("breaker"):
                state, _, reason = gate.detail.partition(": ")
                found[level] = cls(cast(State, state), int(gate.measured or 0), reason)
        return found


def breaker_gate(status: BreakerStatus) -> GateResult:
    """Passed unless the breaker is open; a half-open one lets its trial through."""
    return GateResult(
        name="breaker",
        passed=status.state != "open",
        measured=status.failures,
        detail=f"{status.state}: {status.reason}" if status.reason else status.state,
    )


def levels_of(decision: StructuralPruningDecision) -> tuple[Level, ...]:
    """The levels that ``decision`` decides on."""
    parts = tuple(part.level for part in decision.levels)
    return parts or (decision.key.level,)


def votes(decision: StructuralPruningDecision) -> dict[Level, Vote]:
    """What a decision tells the breaker of each of its levels.

    Broken statistics, a cut that does not hold together, and one of which no part was measured as
    safe are a failure; a careful no (quota, phase, noise, predicted shift, requirements) is a
    success. What the trainer will report on or has rolled back before, an open breaker's own no,
    and a level that was never analysed say nothing.
    """
    failed = {level: set[str]() for level in levels_of(decision)}
    for level, gate in _by_level(decision):
        if not gate.passed:
            failed[level].add(gate.name.rpartition(".")[2])
    if any(not gate.passed and gate.name in MEASURED_GATES for gate in decision.safety.gates):
        for level in decision.taken or levels_of(decision):
            failed[level].add(REFUSED)
    silent = {part.level for part in decision.levels if part.verdict == "missing"}
    if decision.approved_for_application:
        silent |= set(decision.taken)
    if any(not gate.passed and gate.name == ROLLED_BACK for gate in decision.safety.gates):
        silent |= set(levels_of(decision))  # the rollbacks before it must not be forgotten
    found: dict[Level, Vote] = {}
    for level, names in failed.items():
        if names & INTEGRITY_GATES or REFUSED in names:
            found[level] = "failure"
        else:
            found[level] = "none" if level in silent or "breaker" in names else "success"
    return found


def grounds(decision: StructuralPruningDecision, level: Level) -> str:
    """Why a decision speaks against a level; empty if nothing does.

    An open breaker's own no is no ground: its reason would be wrapped into the next one.
    """
    gates = [gate for of, gate in _by_level(decision) if of is level]
    gates += [g for g in decision.safety.gates if g.name in MEASURED_GATES and g not in gates]
    return rejection(gate for gate in gates if not gate.name.endswith("breaker"))


def vote_of(outcome: PruningOutcome) -> Vote:
    """What a trainer's outcome tells the breakers of the levels that it cut.

    A rollback is a failure, unless the cut only went along with an earlier one; a cut that was made
    is a success once nothing is left of its watch.
    """
    if outcome.result == "rolled_back":
        return "none" if outcome.undone_with else "failure"
    return "success" if outcome.result == "applied" and not outcome.watched else "none"


def _by_level(decision: StructuralPruningDecision) -> Iterator[tuple[Level, GateResult]]:
    """The gates of single levels, without those of the joint set."""
    for gate in decision.safety.gates:
        level, dot, _ = gate.name.partition(".")
        if not decision.levels:
            yield decision.key.level, gate
        elif dot and level in list(Level) and level != Level.JOINT:
            yield Level(level), gate
