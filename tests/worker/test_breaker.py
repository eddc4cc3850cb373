"""Three failures in a row switch a level off; training and other runs go on."""

from __future__ import annotations

from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from station import Station, checkpoint
from test_bad_input import put_nan, with_statistics

from elesh.bus import Bus
from leyline import BreakerTransition, Level, Outcome, PruningOutcome, StructuralPruningDecision
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
