"""Three failures in a row switch a level off; training and other runs go on."""

from __future__ import annotations

from redis.asyncio import Redis
from station import Station, checkpoint
from test_bad_input import put_nan, with_statistics

from elesh.bus import Bus
from leyline import BreakerTransition, Level, Outcome, PruningOutcome
from leyline.streams import DEAD, OUTCOMES, TELEMETRY


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


def test_after_two_failures_the_next_checkpoint_is_still_approved(station: Station) -> None:
    station.worker()
    fail(station, 2)
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert decision.approved_for_application


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
        station.publish(checkpoint(number=number))
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
    station.publish(checkpoint(number=9))
    last = station.wait_decisions(4)[-1]
    assert "rolled back by the trainer" in last.rejection_reason
