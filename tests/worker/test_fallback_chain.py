"""The failure table, each row by a fault in the real compute child, end to end."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import layer_networks
import numpy as np
import pytest
from station import Station, checkpoint, faulty, ready, send
from test_bad_input import pack_unchecked, put_nan

from elesh.bus import Bus, read_dead_letter
from leyline import CheckpointBundle, Level, Outcome
from leyline.arrays import unpack_arrays
from leyline.streams import CHECKPOINTS, DEAD


def fallbacks(station: Station) -> list[str]:
    """Fallbacks as telemetry told them."""
    return [event.detail.partition(":")[0] for event in station.telemetry("fallback")]


@pytest.mark.slow
def test_a_timeout_falls_back_to_basic_importance_scoring(station: Station) -> None:
    faulty(station, "hold:60", worker={"window_seconds": 4.0})
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert [taken.rung for taken in decision.fallbacks] == ["analysis_timeout"]
    assert decision.statistics.scorer == "multi_metric"
    assert decision.safety.confidence < 0.6
    assert fallbacks(station) == ["analysis_timeout"]


@pytest.mark.slow
def test_a_crash_is_answered_by_a_fresh_child_and_the_whole_analysis(
    station: Station, tmp_path: Path
) -> None:
    faulty(station, "crash", f"once:{tmp_path / 'crashed'}")
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert [taken.rung for taken in decision.fallbacks] == ["worker_crash"]
    assert "signal 6" in decision.fallbacks[0].reason
    assert decision.statistics.scorer == "output_projection"
    assert fallbacks(station) == ["worker_crash"]


@pytest.mark.slow
def test_a_child_that_crashes_each_time_is_a_dead_letter_and_the_worker_lives(
    station: Station,
) -> None:
    worker = faulty(station, "exit", "always")
    station.publish(checkpoint())
    (dead,) = station.wait_for(lambda: station.read(DEAD), "the dead letter")
    dead_letter = read_dead_letter(dead)
    assert (dead_letter.error_code, dead_letter.deliveries) == ("analysis_failed", 1)
    assert "exit code 3 after worker_crash" in dead_letter.reason
    assert worker.process.poll() is None


@pytest.mark.parametrize("fault", ["memory", "shared"])
@pytest.mark.slow
def test_over_its_memory_the_analysis_is_channels_only_and_conservative(
    station: Station, fault: str
) -> None:
    limit = 400 << 20
    faulty(station, f"{fault}:{2 * limit}", worker={"memory_limit": limit})
    station.publish(checkpoint(epoch=100))
    (decision,) = station.wait_decisions(1)
    assert [taken.rung for taken in decision.fallbacks] == ["memory_overflow"]
    assert str(limit) in decision.fallbacks[0].reason
    statistics = decision.statistics
    assert statistics.scorer == "multi_metric"
    assert statistics.cumulative_ratio <= 0.05, "the conservative limit, although it is moderate"
    assert fallbacks(station) == ["memory_overflow"]


async def with_nan(bus: Bus, bundle: CheckpointBundle) -> None:
    """Publish the checkpoint with a NaN in its statistics."""
    views, _ = unpack_arrays(bundle.blobs()["statistics"])
    arrays = {name: view.copy() for name, view in views.items()}
    put_nan(arrays)
    event = await ready(bus, bundle)
    blob = await bus.blobs.put(pack_unchecked(arrays))
    await send(bus, CHECKPOINTS, event.model_copy(update={"statistics": blob, "gates": None}))


async def with_noise(bus: Bus, bundle: CheckpointBundle) -> None:
    """Publish the checkpoint with random bytes for its statistics of every level."""
    event = await ready(bus, bundle)
    blob = await bus.blobs.put(random.Random(0).randbytes(4096))
    layers = blob if event.layers else None
    noise = {"statistics": blob, "gates": None, "layers": layers}
    await send(bus, CHECKPOINTS, event.model_copy(update=noise))


@pytest.mark.slow
def test_corrupt_data_is_answered_by_the_previous_analysis_as_telemetry_only(
    station: Station,
) -> None:
    station.worker()
    station.publish(checkpoint(epoch=60, number=1))
    (first,) = station.wait_decisions(1)
    assert first.approved_for_application
    station.on_bus(lambda bus: with_nan(bus, checkpoint(epoch=61, number=2)))
    second = station.wait_decisions(2)[1]
    assert (second.epoch, second.key.decision_id) == (61, "ck-2")
    assert second.channels == first.channels
    assert not second.approved_for_application
    assert second.safety.outcome is Outcome.NO_GO
    (taken,) = second.fallbacks
    assert taken.rung == "data_corruption"
    assert first.idempotency_key in taken.reason
    assert second.rejection_reason.startswith("data: ")
    assert fallbacks(station) == ["data_corruption"]
    (dead,) = station.wait_for(lambda: station.read(DEAD), "the dead letter")
    assert read_dead_letter(dead).error_code == "not_finite", "and the bytes are kept"
    # A stand-in is no good analysis: the next ones stand on the first again.
    station.on_bus(lambda bus: with_nan(bus, checkpoint(epoch=62, number=3)))
    third = station.wait_decisions(3)[2]
    assert first.idempotency_key in third.fallbacks[0].reason
    station.on_bus(lambda bus: with_noise(bus, checkpoint(epoch=63, number=4)))
    fourth = station.wait_decisions(4)[3]
    assert first.idempotency_key in fourth.fallbacks[0].reason


@pytest.mark.slow
def test_data_that_is_corrupt_for_every_level_has_a_stand_in_too(station: Station) -> None:
    station.worker()

    def at(epoch: int, number: int) -> CheckpointBundle:
        bundle = layer_networks.network()
        names = {"epoch": epoch, "checkpoint_id": f"ck-{number}"}
        metadata = bundle.metadata.model_copy(update=names)
        return replace(bundle, metadata=metadata, levels=(Level.CHANNEL, Level.LAYER))

    station.publish(at(100, 1))
    (first,) = station.wait_decisions(1)
    station.on_bus(lambda bus: with_noise(bus, at(101, 2)))
    second = station.wait_decisions(2)[1]
    assert (second.key.level, second.stands_in) == (Level.JOINT, first.idempotency_key)
    assert second.fallbacks[-1].rung == "data_corruption"
    assert not second.approved_for_application
    (dead,) = station.wait_for(lambda: station.read(DEAD), "the dead letter")
    assert read_dead_letter(dead).error_code == "malformed"


def test_a_gradient_that_failed_is_answered_by_magnitude_with_less_confidence(
    station: Station,
) -> None:
    station.worker()
    bundle = checkpoint()
    channels = {
        name: data.model_copy(update={"taylor_importance": np.zeros_like(data.taylor_importance)})
        for name, data in bundle.channels.items()
    }
    station.publish(replace(bundle, channels=channels, gates={}))
    (decision,) = station.wait_decisions(1)
    assert [taken.rung for taken in decision.fallbacks] == ["taylor_failure"]
    assert decision.statistics.scorer == "magnitude"
    assert decision.safety.confidence < 0.3
    assert fallbacks(station) == ["taylor_failure"]


def test_a_cut_that_does_not_hold_together_is_rejected_as_a_whole(station: Station) -> None:
    faulty(station, "structure")
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert [taken.rung for taken in decision.fallbacks] == ["safety_failure"]
    assert not decision.approved_for_application
    assert decision.safety.outcome is Outcome.NO_GO
    assert "structure: it falls apart" in decision.rejection_reason
    assert fallbacks(station) == ["safety_failure"]


def test_a_level_that_fails_for_good_leaves_the_others_to_decide_and_is_named(
    station: Station,
) -> None:
    faulty(station, "raise:the head fell off", "level:layer")
    bundle = replace(layer_networks.network(), levels=(Level.CHANNEL, Level.LAYER))
    station.publish(bundle)
    (decision,) = station.wait_decisions(1)
    parts = {part.level: part for part in decision.levels}
    assert parts[Level.LAYER].verdict == "missing"
    assert "the head fell off" in parts[Level.LAYER].reason
    assert parts[Level.CHANNEL].verdict != "missing"
    assert decision.key.level is Level.JOINT
    (planned,) = station.telemetry("planned")
    assert "the head fell off" in planned.detail, "why its levels were analysed apart"
    assert not station.read(DEAD)


def test_a_checkpoint_all_of_whose_levels_fail_is_a_dead_letter_with_its_own_bytes(
    station: Station,
) -> None:
    faulty(station, "raise:nothing works", "always")
    bundle = replace(layer_networks.network(), levels=(Level.CHANNEL, Level.LAYER))
    station.publish(bundle)
    (dead,) = station.wait_for(lambda: station.read(DEAD), "the dead letter")
    dead_letter, (published,) = read_dead_letter(dead), station.read(CHECKPOINTS)
    assert (dead_letter.stream, dead_letter.entry_id) == ("checkpoints", published.entry_id)
    assert dead_letter.original == published.original
    assert "nothing works" in dead_letter.reason
    assert not station.decisions()
