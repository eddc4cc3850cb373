"""The breaker as decisions see it: complete in its gate, so that a replay meets the same one."""

from __future__ import annotations

import pytest

from elesh.safety import BreakerStatus, breaker_gate, grounds, votes
from leyline import (
    GateResult,
    Level,
    Outcome,
    Phase,
    PruningStatistics,
    SafetyValidation,
    StructuralPruningDecision,
)


def decision(*gates: GateResult) -> StructuralPruningDecision:
    figures = dict.fromkeys(
        (
            "parameters_before",
            "parameters_after",
            "macs_before",
            "macs_after",
            "channels_before",
            "channels_after",
            "channels_original",
            "quota",
        ),
        0,
    )
    return StructuralPruningDecision(
        idempotency_key=f"1:{'0' * 16}:ck:channel",
        run_id="run",
        epoch=1,
        model_hash="0" * 16,
        statistics=PruningStatistics(
            scorer="magnitude", phase_limit=0, cumulative_ratio=0, **figures
        ),
        safety=SafetyValidation(outcome=Outcome.NO_GO, phase=Phase.MODERATE, gates=gates),
        approved_for_application=False,
        rejection_reason="because",
    )


@pytest.mark.parametrize(
    "status",
    [
        BreakerStatus(),
        BreakerStatus("open", 3, "a: reason: with colons"),
        BreakerStatus("half_open", 4, ""),
    ],
)
def test_a_decision_tells_the_breaker_it_was_made_under(status: BreakerStatus) -> None:
    gate = breaker_gate(status)
    assert gate.passed is (status.state != "open")
    assert BreakerStatus.of(decision(gate)) == {Level.CHANNEL: status}


def test_a_decision_without_the_gate_was_made_under_a_closed_breaker() -> None:
    assert BreakerStatus.of(decision()) == {Level.CHANNEL: BreakerStatus()}


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("statistics", True),
        ("structure", True),
        ("gradient_isolation", True),
        ("minimum_channels", True),
        ("cumulative_limit", True),
        ("breaker", False),
        ("phase", False),
        ("noise", False),
        ("predicted_shift", False),
        ("requirements", False),
    ],
)
def test_broken_analyses_count_as_failures_and_careful_ones_do_not(
    name: str, failure: bool
) -> None:
    (vote,) = votes(decision(GateResult(name=name, passed=False))).values()
    assert vote == ("failure" if failure else "none" if name == "breaker" else "success")
    assert votes(decision(GateResult(name=name, passed=True))) == {Level.CHANNEL: "success"}


def test_a_failure_under_an_open_breaker_is_told_by_its_own_grounds_alone() -> None:
    """Else every further failure would wrap the reasons before it."""
    status = BreakerStatus("open", 3, "statistics: a NaN")
    failed = GateResult(name="statistics", passed=False, detail="a NaN again")
    made = decision(breaker_gate(status), failed)
    assert votes(made) == {Level.CHANNEL: "failure"}
    assert grounds(made, Level.CHANNEL) == "statistics: a NaN again"
    assert grounds(decision(breaker_gate(status)), Level.CHANNEL) == ""
