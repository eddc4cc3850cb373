"""A checkpoint becomes one decision, whatever is published twice, killed or shared."""

from __future__ import annotations

import itertools
import signal
import time
from dataclasses import replace

import layer_networks
import pytest
from head_networks import checkpoint as heads_checkpoint
from head_networks import transformer
from station import Station, checkpoint

from elesh.analysis import analyze
from elesh.settings import Settings
from leyline import Level, encode
from leyline.streams import VALIDATION


@pytest.mark.slow
def test_a_checkpoint_becomes_one_decision_with_telemetry_for_every_step(station: Station) -> None:
    station.worker()
    bundle = checkpoint()
    station.publish(bundle)
    (decision,) = station.wait_decisions(1)
    assert decision.idempotency_key == str(bundle.key(decision.key.level))
    assert decision.approved_for_application
    station.wait_for(lambda: station.telemetry("settled"), "the last step")
    assert [event.step for event in station.telemetry()] == [
        "received", "fetched", "analysed", "settled",
    ]  # fmt: skip
    assert len(station.messages(VALIDATION)) == 1


def test_the_worker_decides_what_the_library_decides(station: Station) -> None:
    worker = station.worker()
    station.publish(checkpoint(seed=5))
    (decision,) = station.wait_decisions(1)
    settings = Settings.load(station.folder / "settings-0.yaml")
    assert encode(analyze(checkpoint(seed=5), settings)) == encode(decision), worker.log


def test_channels_and_layers_of_a_small_checkpoint_are_decided_at_once(station: Station) -> None:
    station.worker()
    bundle = replace(layer_networks.network(), levels=(Level.CHANNEL, Level.LAYER))
    station.publish(bundle)
    (decision,) = station.wait_decisions(1)
    settings = Settings.load(station.folder / "settings-0.yaml")
    assert encode(analyze(bundle, settings)) == encode(decision)
    assert decision.key.level is Level.JOINT
    assert [target.layer_name for target in decision.layers] == ["b4"]
    analysed = {event.idempotency_key: event.metrics for event in station.telemetry("analysed")}
    assert analysed.keys() == {str(bundle.key(Level.JOINT))}
    (metrics,) = analysed.values()
    assert metrics.layers == 10
    assert not station.telemetry("planned")


def test_channels_and_heads_of_one_checkpoint_are_one_decision(station: Station) -> None:
    worker = station.worker()
    whole = heads_checkpoint(transformer(16, 16))
    both = replace(whole, levels=(Level.CHANNEL, Level.HEAD))
    station.publish(both)
    (decision,) = station.wait_decisions(1)
    settings = Settings.load(station.folder / "settings-0.yaml")
    assert encode(analyze(both, settings)) == encode(decision), worker.log
    assert decision.approved_for_application
    assert decision.attention_heads[0].attention_entropy
    assert [part.verdict for part in decision.levels] == ["nothing", "taken"]


def test_the_same_checkpoint_published_five_times_is_decided_once(station: Station) -> None:
    station.worker()
    station.worker()
    station.publish(checkpoint(), times=5)
    station.publish(checkpoint(number=2))
    decisions = station.wait_decisions(2)
    station.wait_for(lambda: len(station.telemetry("duplicate")) == 4, "four duplicates")
    assert len({d.idempotency_key for d in decisions}) == len(station.decisions()) == 2


def test_two_workers_share_the_work(station: Station) -> None:
    station.worker()
    station.worker()
    numbers = itertools.count()

    def both() -> bool:
        # One more each time: a busy machine may wake one of them late.
        station.publish(checkpoint(number=next(numbers)))
        return {event.worker_id for event in station.telemetry("settled")} == {"w1", "w2"}

    station.wait_for(both, "both workers to settle something")
    published = next(numbers)
    decided = {decision.idempotency_key for decision in station.wait_decisions(published)}
    assert len(decided) == published


def test_a_worker_killed_in_the_middle_is_finished_by_another(station: Station) -> None:
    first = station.worker()
    first.child.suspend()  # the analysis cannot end before the kill
    station.publish(checkpoint())
    station.wait_for(lambda: station.telemetry("fetched"), "the analysis to begin")
    first.end(signal.SIGKILL)
    station.worker()
    (decision,) = station.wait_decisions(1)
    (committed,) = station.wait_for(lambda: station.telemetry("settled"), "the settlement")
    assert (committed.worker_id, decision.approved_for_application) == ("w2", True)


@pytest.mark.slow
def test_a_lease_outlives_an_analysis_many_times_as_long(station: Station) -> None:
    first = station.worker(bus={"lease_seconds": 0.5})
    station.worker(bus={"lease_seconds": 0.5})
    busy = first.child
    second_child = station.workers[1].child
    busy.suspend()
    second_child.suspend()
    station.publish(checkpoint())
    (fetched,) = station.wait_for(lambda: station.telemetry("fetched"), "the analysis to begin")
    holder = next(w for w in station.workers if w.name == fetched.worker_id)
    other = next(w for w in station.workers if w is not holder)
    other.child.resume()
    # The other worker goes on for eight leases: had the first entry been up for grabs, it would
    # have taken it, since expired leases go first.
    begun, number = time.monotonic(), 1
    while time.monotonic() < begun + 8 * 0.5:
        number += 1
        station.publish(checkpoint(number=number))
        station.wait_decisions(number - 1)
    holder.child.resume()
    station.wait_decisions(number)
    assert len(station.telemetry("fetched")) == number
    assert not station.telemetry("lost")


def test_sigterm_finishes_what_was_begun(station: Station) -> None:
    worker = station.worker()
    child = worker.child
    child.suspend()
    station.publish(checkpoint())
    station.wait_for(lambda: station.telemetry("fetched"), "the analysis to begin")
    worker.process.terminate()
    child.resume()
    assert worker.process.wait(60) == 0
    assert len(station.decisions()) == 1
    assert any("drained" in line for line in worker.log)


def test_a_killed_child_is_replaced_and_the_decision_says_so(station: Station) -> None:
    worker = station.worker()
    child = worker.child
    child.suspend()
    station.publish(checkpoint())
    station.wait_for(lambda: station.telemetry("fetched"), "the analysis to begin")
    child.kill()
    (decision,) = station.wait_decisions(1)
    assert [taken.rung for taken in decision.fallbacks] == ["worker_crash"]
    assert len(station.telemetry("fallback")) == 1


def test_an_analysis_over_its_window_falls_back_to_basic_scoring(station: Station) -> None:
    worker = station.worker(worker={"window_seconds": 5.0})
    worker.child.suspend()
    station.publish(checkpoint())
    (decision,) = station.wait_decisions(1)
    assert [taken.rung for taken in decision.fallbacks] == ["analysis_timeout"]
    assert decision.statistics.scorer == "multi_metric"
