"""What the fleet knows of a run: cuts that were taken back, calibration probes."""

from __future__ import annotations

from redis import Redis

from leyline import RolledBackCut, WouldBeCut

MEASURED = WouldBeCut(units=1, predicted=1, measured=1)


def cut(epoch: int, name: str = "stem") -> RolledBackCut:
    key = f"{epoch}:0123456789abcdef:ck-{epoch}:channel"
    return RolledBackCut(
        idempotency_key=key,
        epoch=epoch,
        units=((name, (epoch,)),),
        scores=(0.5,),
        scorers=(("channel", "margins"),),
    )


def test_cuts_that_were_taken_back_are_known_in_the_order_of_their_epochs(with_bus) -> None:
    async def story(bus):
        for epoch in (40, 9, 60):
            await bus.runs.took_back("run", {f"print-{epoch}": cut(epoch)})
        assert await bus.runs.taken_back("run") == [cut(9), cut(40), cut(60)]
        await bus.runs.took_back("run", {"print-9": cut(9, "again")})
        assert await bus.runs.taken_back("run") == [cut(9, "again"), cut(40), cut(60)]

    with_bus(story)


def test_a_run_s_cuts_are_no_other_run_s(with_bus) -> None:
    async def story(bus):
        await bus.runs.took_back("run", {"print": cut(9)})
        assert await bus.runs.taken_back("other") == []
        await bus.runs.measured_calibration_probe("run", "key", [MEASURED])
        assert await bus.runs.calibration_cuts("other") == []

    with_bus(story)


def test_would_be_cuts_are_kept_by_decision_and_once(with_bus) -> None:
    first = WouldBeCut(units=1, predicted=0.1, measured=0.2)
    second = WouldBeCut(units=2, predicted=0.3, measured=0.4)

    async def story(bus):
        await bus.runs.measured_calibration_probe("run", "b", [second])
        for _ in range(2):
            await bus.runs.measured_calibration_probe("run", "a", [first, first])
        assert await bus.runs.calibration_cuts("run") == [first, first, second]

    with_bus(story)


def test_what_is_known_of_a_run_is_kept_as_long_as_decisions_and_not_for_ever(
    with_bus, redis_url: str, partition: str
) -> None:
    async def story(bus):
        await bus.runs.took_back("run", {"print": cut(9)})
        await bus.runs.measured_calibration_probe("run", "key", [MEASURED])
        return bus.settings.record_ttl_seconds

    keep = with_bus(story)
    with Redis.from_url(redis_url) as client:
        names = [n for n in client.keys(f"elesh:{{{partition}}}:*") if n.endswith(b":run")]
        assert len(names) == 2
        for name in names:
            assert keep - 60 < client.ttl(name) <= keep
