"""A checkpoint of several levels over the fleet: one decision, whoever dies when."""

from __future__ import annotations

import signal
from dataclasses import replace

import layer_networks
import pytest
from station import Station, checkpoint, faulty

from elesh.analysis import analyze
from elesh.settings import Settings
from leyline import CheckpointBundle, Level, encode, read_envelope, unwrap
from leyline.streams import DEAD, WORK

LEVELS = (Level.CHANNEL, Level.LAYER)
PARTS = {"supervisor.ONE_JOB_BYTES": 0}
"""Every checkpoint of several levels is as good as a large one."""


def two_levels(number: int = 1) -> CheckpointBundle:
    bundle = layer_networks.network()
    # Runs of their own, so that no breaker counts one's failures in another's decision.
    own = {"checkpoint_id": f"ck-{number}", "run_id": f"run-{number}"}
    metadata = bundle.metadata.model_copy(update=own)
    return replace(bundle, metadata=metadata, levels=LEVELS)


def decided_alone(station: Station, bundle: CheckpointBundle) -> bytes:
    return encode(analyze(bundle, Settings.load(station.folder / "settings-0.yaml")))


def test_parts_go_to_whoever_is_free_and_the_decision_is_that_of_one_process(
    station: Station,
) -> None:
    for _ in range(2):
        station.worker(constants=PARTS)
    count, workers = 0, set[str]()
    while workers != {"w1", "w2"}:  # One may be done before the other gets its turn of a processor.
        assert count < 60, "both were free, and one did all"
        station.publish(*(two_levels(number) for number in range(count, count + 6)))
        count += 6
        decisions = station.wait_decisions(count)
        stored = station.telemetry("stored")
        assert len(stored) == 2 * count
        workers = {event.worker_id for event in stored}
    for decision in decisions:
        number = int(decision.key.decision_id.removeprefix("ck-"))
        assert encode(decision) == decided_alone(station, two_levels(number))
    parts = [unwrap(read_envelope(delivery.envelope)) for delivery in station.read(WORK)]
    assert len(parts) == count * 3, "two parts and one join each"


def test_a_small_checkpoint_of_several_levels_is_decided_in_one_job(station: Station) -> None:
    station.worker()
    station.publish(two_levels())
    (decision,) = station.wait_decisions(1)
    assert encode(decision) == decided_alone(station, two_levels())
    assert len(station.telemetry("fetched")) == 1, "the checkpoint is read once"
    assert not station.read(WORK)


def test_levels_that_one_job_cannot_decide_become_parts_and_each_falls_back_by_itself(
    station: Station,
) -> None:
    worker = faulty(station, "crash", "full")
    station.publish(two_levels())
    (decision,) = station.wait_decisions(1)
    assert [part.level for part in decision.parts] == list(LEVELS)
    assert all(len(part.fallbacks) == 1 for part in decision.parts)
    assert len(station.telemetry("planned")) == 1
    assert any("one job failed" in line for line in worker.log)


@pytest.mark.slow
def test_a_level_that_kills_every_worker_that_takes_it_leaves_the_others_to_decide(
    station: Station,
) -> None:
    for _ in range(4):  # the checkpoint kills one, the part two; the last one joins
        faulty(station, "worker", "level:layer", bus={"lease_seconds": 0.5, "max_deliveries": 2})
    station.publish(two_levels())
    (decision,) = station.wait_decisions(1)
    parts = {part.level: part for part in decision.levels}
    assert parts[Level.LAYER].verdict == "missing"
    assert parts[Level.CHANNEL].verdict != "missing"
    assert not station.read(DEAD)


def test_a_breakers_probe_that_led_to_no_decision_in_one_job_is_there_for_the_parts(
    station: Station,
) -> None:
    faulty(station, "crash", "full", breaker={"recovery_seconds": 0.001})
    bundle = two_levels()
    run = bundle.metadata.run_id
    station.on_bus(lambda bus: bus.breakers.trip(run, Level.CHANNEL, "by hand"))
    station.publish(bundle)
    (decision,) = station.wait_decisions(1)
    assert len(station.telemetry("planned")) == 1
    assert "breaker" not in str(decision.levels)


@pytest.mark.slow
def test_a_level_with_large_statistics_is_split_by_groups_of_layers_and_joined_under_one_quota(
    station: Station,
) -> None:
    for _ in range(2):
        station.worker(layers_per_worker=1, constants=PARTS | {"fan_out.SHARD_BYTES": 1})
    bundle = checkpoint()
    station.publish(bundle)
    (decision,) = station.wait_decisions(1)
    parts = {event.detail.partition(":")[0] for event in station.telemetry("stored")}
    assert parts == {"channel.0", "channel.1", "channel.2"}
    whole = analyze(bundle, Settings.load(station.folder / "settings-0.yaml"))
    assert decision.key == whole.key
    assert decision.approved_for_application
    removed = sum(len(units) for units in decision.units.values())
    assert 0 < removed <= decision.statistics.quota == whole.statistics.quota
    assert set(decision.units) <= {group.name for group in bundle.architecture.groups}


def test_a_shard_that_fails_leaves_its_groups_alone_and_the_others_decide(
    station: Station,
) -> None:
    faulty(
        station,
        "raise:lost",
        "shard:g1",
        layers_per_worker=1,
        constants=PARTS | {"fan_out.SHARD_BYTES": 1},
    )
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert "g1" not in decision.units
    assert "g1" in dict(decision.ignored), "and the decision says so"
    assert decision.units


@pytest.mark.slow
def test_the_same_checkpoint_published_at_once_by_many_is_planned_once(station: Station) -> None:
    for _ in range(2):
        station.worker(constants=PARTS)
    station.publish(two_levels(), times=5)
    station.wait_decisions(1)
    station.wait_for(lambda: len(station.telemetry("duplicate")) == 4, "the duplicates to be known")
    assert len(station.decisions()) == 1
    assert len(station.telemetry("planned")) == 1
    assert len(station.read(WORK)) == 3


@pytest.mark.slow
def test_a_worker_killed_with_a_part_loses_nothing_and_the_join_comes_once(
    station: Station,
) -> None:
    dying = faulty(station, "hold:60", "level:layer", constants=PARTS)
    station.publish(two_levels())

    def begun() -> bool:
        """Whether the layer's part is with the child: its channels are stored."""
        return bool(station.telemetry("stored")) and len(station.telemetry("fetched")) >= 2

    station.wait_for(begun, "the part to begin")
    dying.end(signal.SIGKILL)
    station.worker(constants=PARTS)
    (decision,) = station.wait_decisions(1)
    assert encode(decision) == decided_alone(station, two_levels())
    assert len(station.decisions()) == 1
    assert not station.read(DEAD)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_level_that_misses_the_deadline_is_named_and_the_others_decide(
    station: Station,
) -> None:
    window = 3.0
    for _ in range(2):
        faulty(
            station, "hold:60", "level:layer", constants=PARTS, worker={"window_seconds": window}
        )
    station.publish(two_levels())
    (decision,) = station.wait_decisions(1)
    parts = {part.level: part for part in decision.levels}
    assert parts[Level.LAYER].verdict == "missing"
    assert parts[Level.LAYER].reason == "no result within the window"
    assert parts[Level.CHANNEL].verdict != "missing"
    assert not station.read(DEAD)
