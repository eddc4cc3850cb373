"""Three failures in a row switch a level off; training and other runs go on."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from station import Station, checkpoint
from test_bad_input import put_nan, with_statistics

from contracts.examples import MESSAGES
from elesh.bus import Bus
from elesh.bus.admission import Work, admit, read
from elesh.settings import Settings
from elesh.worker.executor import AnalysisExecutor
from elesh.worker.leases import Busy
from leyline import (
    BreakerTransition,
    Level,
    Outcome,
    PruningOutcome,
    StructuralPruningDecision,
    encode,
    wrap,
)
from leyline.streams import DEAD, OUTCOMES, TELEMETRY, WORKERS


def fail(station: Station, times: int) -> None:
    async def publish(bus: Bus) -> None:
        redis = Redis.from_url(station.url)
        for _ in range(times):
            await with_statistics(put_nan)(bus, redis)
        await redis.aclose()

    station.on_bus(publish)
    station.wait_for(lambda: len(station.read(DEAD)) >= times, f"{times} dead letters")


def test_after_three_failed_analyses_the_fourth_checkpoint_is_rejected_by_the_open_breaker(
    station: Station,
) -> None:
    station.worker()
    fail(station, 3)
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert not decision.approved_for_application
    assert decision.safety.outcome is Outcome.NO_GO
    assert "breaker" in decision.rejection_reason
    assert "open" in decision.rejection_reason
    assert decision.channels, "analyses go on as telemetry"
    changes = [m for m in station.messages(TELEMETRY) if isinstance(m, BreakerTransition)]
    assert [(c.before, c.after) for c in changes] == [("closed", "open")]


@pytest.mark.parametrize("failure", [Busy("another analysis takes long"), None])
def test_the_probe_of_an_analysis_that_led_to_no_decision_is_given_back(
    tmp_path: Path, failure: Exception | None
) -> None:
    now = datetime(2025, 1, 14, 12, tzinfo=UTC)
    envelope = encode(wrap(MESSAGES["CheckpointReady"], source="test", now=now))
    work = admit(read(envelope), window=60, now=now)
    assert isinstance(work, Work)
    given_back = []

    async def admitted(run: str, level: Level) -> Any:
        return SimpleNamespace(
            admitted=True, probe=True, state="half_open", failures=3, reason="", level=level
        )

    async def give_back(run: str, level: Level) -> None:
        given_back.append((run, level))

    async def known(*_: Any) -> list[Any]:
        return []

    bus: Any = SimpleNamespace(
        guard=SimpleNamespace(requires_signatures=True),
        history=lambda *_: None,
        breakers=SimpleNamespace(admit=admitted, give_back=give_back),
        runs=SimpleNamespace(taken_back=known, calibration_cuts=known),
    )
    reports: Any = SimpleNamespace(step=None)
    executor = AnalysisExecutor(bus, Settings(), reports, tmp_path)
    job = executor._job("decide", work, tmp_path)

    async def scenario() -> None:
        async with executor._with_run(job, work):
            if failure is not None:
                raise failure

    if failure is None:
        asyncio.run(scenario())
        assert given_back == []
        return
    with pytest.raises(Busy):
        asyncio.run(scenario())
    assert given_back == [(work.run_id, Level(level)) for level in job.levels]


@pytest.mark.slow
def test_after_two_failures_the_next_checkpoint_is_still_approved(station: Station) -> None:
    station.worker()
    fail(station, 2)
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert decision.approved_for_application


@pytest.mark.slow
def test_an_open_breaker_that_was_reset_approves_again(station: Station) -> None:
    station.worker()
    fail(station, 3)
    station.on_bus(lambda bus: bus.breakers.reset("run", Level.CHANNEL))
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert decision.approved_for_application


def test_three_rollbacks_reported_by_the_trainer_open_the_breaker(station: Station) -> None:
    station.worker()
    for number in range(3):
        # Other statistics each time: the same cut would not be proposed again.
        station.publish(checkpoint(number=number, seed=number))
        decision = station.wait_decisions(number + 1)[-1]
        assert decision.approved_for_application
        outcome = PruningOutcome(
            idempotency_key=decision.idempotency_key, run_id="run", epoch=60, result="rolled_back"
        )
        station.on_bus(lambda bus, o=outcome: bus.publish(OUTCOMES, o, source="t", run_id="run"))
    station.wait_for(
        lambda: station.on_bus(lambda bus: bus.breakers.view("run", Level.CHANNEL)).state == "open",
        "the breaker to open",
    )
    station.publish(checkpoint(number=9, seed=9))
    last = station.wait_decisions(4)[-1]
    assert "rolled back by the trainer" in last.rejection_reason


def outcome_of(decision: StructuralPruningDecision, **fields: Any) -> PruningOutcome:
    key = decision.idempotency_key
    return PruningOutcome(idempotency_key=key, run_id="run", epoch=60, **fields)


def tell(station: Station, *outcomes: PruningOutcome) -> None:
    """Publish outcomes and wait until workers have taken them all in."""
    for outcome in outcomes:
        station.on_bus(lambda bus, o=outcome: bus.publish(OUTCOMES, o, source="t", run_id="run"))

    def done() -> bool:
        pending = station.on_bus(lambda bus: bus.pending(WORKERS, OUTCOMES))
        return (pending.pending, pending.waiting) == (0, 0)

    station.wait_for(done, "the outcomes to be taken in")


def failures(station: Station) -> int:
    return station.on_bus(lambda bus: bus.breakers.view("run", Level.CHANNEL)).failures


@pytest.mark.slow
def test_a_cut_on_probation_and_one_that_went_along_say_nothing_to_the_breaker(
    station: Station,
) -> None:
    station.worker()
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    station.on_bus(lambda bus: bus.breakers.failure("run", Level.CHANNEL, "earlier"))
    tell(station, outcome_of(decision, result="applied", watched=3))
    assert failures(station) == 1
    other = decision.key.at(Level.HEAD)
    tell(station, outcome_of(decision, result="rolled_back", undone_with=str(other)))
    assert failures(station) == 1
    tell(station, outcome_of(decision, result="rolled_back", rolled_back_epoch=62))
    assert failures(station) == 2
    tell(station, outcome_of(decision, result="applied", watched=0))
    assert failures(station) == 0


@pytest.mark.slow
def test_an_outcome_that_comes_again_or_of_another_run_moves_no_breaker(station: Station) -> None:
    station.worker()
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    tell(station, outcome_of(decision, result="applied", watched=0))
    tell(station, outcome_of(decision, result="rolled_back", rolled_back_epoch=62))
    assert failures(station) == 1
    for delivery in station.read(OUTCOMES):  # the same events, appended again by somebody
        with SyncRedis.from_url(station.url) as redis:
            redis.xadd(OUTCOMES.key(station.partition), dict(delivery.fields))  # type: ignore[arg-type]
    foreign = outcome_of(decision, result="applied", watched=0).model_copy(
        update={"run_id": "another"}
    )
    station.on_bus(lambda bus: bus.publish(OUTCOMES, foreign, source="t", run_id="another"))
    station.wait_for(lambda: station.read(DEAD), "the foreign outcome's dead letter")
    tell(station)
    assert failures(station) == 1
    (letter,) = station.messages(DEAD)
    assert letter.error_code == "identity_mismatch"  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_cut_that_was_rolled_back_is_not_proposed_again_for_the_same_evidence(
    station: Station,
) -> None:
    station.worker()
    station.publish(checkpoint(number=1))
    (first,) = station.wait_decisions(1)
    assert first.approved_for_application
    rolled_back = outcome_of(
        first, result="rolled_back", rolled_back_epoch=62, detail="accuracy fell"
    )
    tell(station, rolled_back)
    station.publish(checkpoint(number=2))
    again = station.wait_decisions(2)[-1]
    assert again.units == first.units
    assert not again.approved_for_application
    assert f"{first.idempotency_key} was rolled back at epoch 62" in again.rejection_reason
    assert [cut.idempotency_key for cut in again.rolled_back] == [first.idempotency_key]
    assert failures(station) == 1, "the refusal neither counts nor forgets"
    station.publish(checkpoint(number=3, seed=5))
    other = station.wait_decisions(3)[-1]
    assert other.units != first.units
    assert other.approved_for_application
