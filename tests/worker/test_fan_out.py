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
IN_PARTS = {"supervisor.AT_ONCE_BYTES": 0}
"""As if every checkpoint were a large one."""
SHARDED = {**IN_PARTS, "fan_out.SHARD_BYTES": 1}


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
        station.worker(constants=IN_PARTS)
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


@pytest.mark.slow
def test_a_level_with_large_statistics_is_split_by_groups_of_layers_and_joined_under_one_quota(
    station: Station,
) -> None:
    for _ in range(2):
        station.worker(layers_per_worker=1, constants=SHARDED)
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
    faulty(station, "raise:lost", "shard:g1", layers_per_worker=1, constants=SHARDED)
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert "g1" not in decision.units
    assert "g1" in dict(decision.ignored), "and the decision says so"
    assert decision.units


@pytest.mark.slow
def test_the_same_checkpoint_published_at_once_by_many_is_planned_once(station: Station) -> None:
    for _ in range(2):
        station.worker(constants=IN_PARTS)
    station.publish(two_levels(), times=5)
    station.wait_decisions(1)
    station.wait_for(lambda: len(station.telemetry("duplicate")) == 4, "the duplicates to be known")
    assert len(station.decisions()) == 1
    assert len(station.telemetry("planned")) == 1
    assert len(station.read(WORK)) == 3


def test_a_checkpoint_that_has_parts_already_is_not_decided_at_once_again(
    station: Station,
) -> None:
    worker = faulty(station, "raise:lost", "level:layer")
    station.publish(two_levels(), times=6)
    station.wait_decisions(1)
    station.wait_for(lambda: len(station.telemetry("duplicate")) == 5, "the duplicates to be known")
    assert sum("levels are analysed apart" in line for line in worker.log) == 1
    assert not station.telemetry("retried")
    assert len(station.decisions()) == 1


@pytest.mark.slow
def test_a_level_that_stops_every_worker_at_once_is_named_and_the_others_decide(
    station: Station,
) -> None:
    station.publish(two_levels())
    for _ in range(3):  # All levels at once, then twice the part.
        dying = faulty(station, "worker", "level:layer", bus={"max_deliveries": 2})
        station.wait_for(lambda: dying.process.poll() is not None, "the worker to be stopped")  # noqa: B023
    faulty(station, "worker", "level:layer", bus={"max_deliveries": 2})
    (decision,) = station.wait_decisions(1)
    parts = {part.level: part for part in decision.levels}
    assert parts[Level.LAYER].verdict == "missing"
    assert "it stopped every worker that took it" in parts[Level.LAYER].reason
    assert parts[Level.CHANNEL].verdict != "missing"
    assert not station.read(DEAD)


@pytest.mark.slow
def test_a_worker_killed_with_a_part_loses_nothing_and_the_join_comes_once(
    station: Station,
) -> None:
    dying = faulty(station, "hold:60", "level:layer", constants=IN_PARTS)
    station.publish(two_levels())

    def begun() -> bool:
        """Whether the layer's part is with the child: its channels are stored."""
        return bool(station.telemetry("stored")) and len(station.telemetry("fetched")) >= 2

    station.wait_for(begun, "the part to begin")
    dying.end(signal.SIGKILL)
    station.worker(constants=IN_PARTS)
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
            station,
            "hold:60",
            "level:layer",
            worker={"window_seconds": window},
            constants=IN_PARTS,
        )
    station.publish(two_levels())
    (decision,) = station.wait_decisions(1)
    parts = {part.level: part for part in decision.levels}
    assert parts[Level.LAYER].verdict == "missing"
    assert parts[Level.LAYER].reason == "no result within the window"
    assert parts[Level.CHANNEL].verdict != "missing"
    assert not station.read(DEAD)
