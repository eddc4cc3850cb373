"""The session: off the training thread, never in its way, and its requests are answered."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from guarded import World, decide, told
from redis import Redis
from station import PATIENCE, Station, checkpoint
from trainer_nets import same

from elesh.bus import BreakerView, Bus, Commit
from elesh.bus.state.runs import RunStore
from elesh.settings import Settings, SettingsError
from elesh.trainer import Evaluation, Session
from elesh.trainer.recovery.files import FolderInUse
from elesh.trainer.recovery.recovery import Recovery
from leyline import (
    CheckpointBundle,
    CheckpointMetadata,
    CheckpointReady,
    IdempotencyKey,
    InvalidField,
    Level,
    Outcome,
    StructuralAnalysisRequest,
    StructuralPruningDecision,
)
from leyline.streams import CHECKPOINTS, MASKS, RECOMPILE, REQUESTS, VALIDATION

AWAY = "redis://127.0.0.1:1/0"


def settings_of(station: Station, **trainer: Any) -> Settings:
    return Settings.load(station.settings_file(), trainer=trainer)


@pytest.mark.slow
def test_a_published_checkpoint_is_decided_and_comes_back_to_its_run(station: Station) -> None:
    station.worker()
    with Session("run", station.url, settings_of(station)) as session:
        session.publish(checkpoint())
        assert session.wait(PATIENCE)
        (decision,) = session.decisions()
    assert decision.idempotency_key == str(checkpoint().key(Level.CHANNEL))
    assert session.missed == 0


@pytest.mark.slow
def test_monitored_decisions_have_the_name_of_the_version_before() -> None:
    with Session("run-names", "redis://127.0.0.1:1/0") as session:
        assert session.monitored == session.watched == ()
    assert Session.watched is Session.monitored


@pytest.mark.parametrize(("margin", "differ"), [(0.1, False), (0.3, True)])
@pytest.mark.slow
def test_a_worker_that_decides_by_other_settings_than_the_trainer_has_is_noticed_once(
    station: Station, caplog: pytest.LogCaptureFixture, margin: float, differ: bool
) -> None:
    limits = {"max_predicted_shift": 1e9, "safety_margin": margin}
    station.worker(structured_pruning={"channel_analysis": limits})
    with Session("run", station.url, settings_of(station)) as session:
        for request in ("one", "two"):
            session.request(checkpoint(), request)
            assert session.wait(PATIENCE)
            assert len(session.decisions()) == 1
    assert caplog.text.count("worker and trainer have different settings") == differ


def test_a_request_is_answered_under_its_own_id(station: Station) -> None:
    station.worker()
    with Session("run", station.url, settings_of(station)) as session:
        session.request(checkpoint(), "rq-7")
        assert session.wait(PATIENCE)
        (decision,) = session.decisions()
    hash_ = checkpoint().architecture.model_hash
    assert decision.key == IdempotencyKey(60, hash_, "rq-7", Level.CHANNEL)
    (message,) = station.messages(REQUESTS)
    assert isinstance(message, StructuralAnalysisRequest)


def test_other_content_under_a_published_key_is_a_named_conflict(station: Station) -> None:
    bundle = checkpoint()
    other = replace(bundle, metadata=bundle.metadata.model_copy(update={"accuracy": 0.25}))
    with Session("run", station.url, settings_of(station)) as session:
        for each in (bundle, bundle, other):  # the same twice is one request
            assert session.request(each, "rq-7")
        assert session.wait(PATIENCE)
        ((key, reason),) = session.failed.items()
    assert (session.missed, len(station.messages(REQUESTS))) == (1, 1)
    assert key.split(":")[2] == "rq-7"
    assert "idempotency_key" in reason
    assert "another request id" in reason


@pytest.mark.slow
def test_decisions_of_other_runs_are_not_seen(station: Station) -> None:
    station.worker()
    with Session("another-run", station.url, settings_of(station)) as session:
        assert session.wait_connected(PATIENCE)
        station.publish(checkpoint())
        station.wait_decisions(1)
        mine = checkpoint(number=2)
        metadata = mine.metadata.model_copy(update={"run_id": "another-run"})
        session.publish(networks.bundle(mine.architecture, metadata=metadata))
        assert session.wait(PATIENCE)
        assert [d.run_id for d in session.decisions()] == ["another-run"]


def test_the_same_bundle_published_twice_is_one_event(station: Station) -> None:
    with Session("run", station.url, settings_of(station)) as session:
        session.publish(checkpoint())
        session.publish(checkpoint())
    messages = station.messages(CHECKPOINTS)
    assert [type(m) for m in messages] == [CheckpointReady]


def test_publishing_never_waits_when_the_bus_is_away_and_the_miss_is_counted() -> None:
    with Session("run", "redis://127.0.0.1:1/0") as session:
        queued = [session.publish(checkpoint(number=n)) for n in range(12)]
    assert queued == [True] * 8 + [False] * 4
    assert session.missed == 12


def test_a_checkpoint_without_a_run_id_is_that_of_its_session_and_one_of_another_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = list[Any]()
    with Session("mine", AWAY) as session:
        monkeypatch.setattr(session, "_queue", lambda stream, bundle, *rest: sent.append(bundle))
        session.publish(checkpoint())
        assert sent[0].metadata.run_id == "mine"
        assert sent[0].metadata.checkpoint_id != checkpoint().metadata.checkpoint_id
        with pytest.raises(InvalidField, match=r"run_id=session\.run_id"):
            session.publish(replace(sent[0], metadata=renamed(sent[0], "other")))
    assert len(sent) == 1


def renamed(bundle: CheckpointBundle, run_id: str) -> CheckpointMetadata:
    return bundle.metadata.model_copy(update={"run_id": run_id})


@pytest.mark.slow
def test_a_second_trainer_of_a_run_is_refused_by_name_and_goes_on_without_elesh(
    station: Station,
) -> None:
    settings = settings_of(station)
    with Session("run", station.url, settings) as first:
        assert first.wait_connected(60)
        with Session("run", station.url, settings) as second:
            assert second.wait_connected(60)
            assert f":{os.getpid()}" in second.refused
            assert "another run id" in second.refused
            assert not second.publish(checkpoint())
            assert second.missed == 1
            world = World()
            outcome = second.apply(decide(world.original), world.surgeon, told(0.9))
            assert (outcome.result, outcome.detail) == ("refused", second.refused)
        assert first.publish(checkpoint())
    assert len(station.messages(CHECKPOINTS)) == 1
    with Session("run", station.url, settings) as third:
        assert third.wait_connected(60)
        assert third.refused == "", "a trainer that has ended gives its claim up"


def test_the_claim_of_a_trainer_that_is_gone_ends_with_its_lease(station: Station) -> None:
    station.on_bus(lambda bus: bus.runs.claim("run", "dead", "elsewhere:1", 0.6))
    settings = settings_of(station, claim_seconds=0.8)
    with Session("run", station.url, settings) as session:
        assert session.wait_connected(PATIENCE)
        assert "elsewhere:1" in session.refused
        station.wait_for(lambda: not session.refused, "the claim to end")
        assert session.publish(checkpoint())
    assert len(station.messages(CHECKPOINTS)) == 1


def test_a_trainer_that_lost_its_claim_publishes_nothing_more(station: Station) -> None:
    settings = settings_of(station, claim_seconds=3600)
    with Session("run", station.url, settings) as session:
        assert session.wait_connected(PATIENCE)
        # As after a long pause of the process: the lease ran out, and another took the run.
        with Redis.from_url(station.url) as client:
            client.delete(f"elesh:{{{station.partition}}}:claim:run")
        station.on_bus(lambda bus: bus.runs.claim("run", "other", "elsewhere:1", 60))
        session.publish(checkpoint())
    assert "elsewhere:1" in session.refused
    assert session.missed == 1
    assert station.messages(CHECKPOINTS) == []


def test_a_trainer_that_pauses_between_renewal_and_publish_is_refused_by_the_server(
    station: Station, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def renewed(*_: object) -> None:
        """Just now, as it believes."""

    with Session("run", station.url, settings_of(station, claim_seconds=3600)) as session:
        assert session.wait_connected(PATIENCE)
        monkeypatch.setattr(RunStore, "claim", renewed)
        with Redis.from_url(station.url) as client:
            claim = {"token": "other", "who": "elsewhere:1"}
            client.hset(f"elesh:{{{station.partition}}}:claim:run", mapping=claim)
        session.publish(checkpoint())
    assert session.missed == 1
    assert station.messages(CHECKPOINTS) == []


def test_a_killed_trainer_takes_its_claim_over_at_once_by_its_restore_folder(
    station: Station, tmp_path: Path
) -> None:
    settings = settings_of(station, claim_seconds=3600)
    session = Session("run", station.url, settings, restore_dir=tmp_path)
    token = Recovery(tmp_path / "elsewhere").token
    assert (tmp_path / "run" / "claim").read_text() != token
    token = (tmp_path / "run" / "claim").read_text()
    station.on_bus(lambda bus: bus.runs.claim("run", token, "killed:1", 3600))
    with session:
        assert session.wait_connected(PATIENCE)
        assert session.refused == ""


def test_a_folder_in_use_is_refused_when_the_session_is_made(tmp_path: Path) -> None:
    settings = Settings(trainer={"claim_seconds": 0.1})
    with (
        Session("run", AWAY, settings, restore_dir=tmp_path),
        pytest.raises(FolderInUse, match="in use"),
    ):
        Session("run", AWAY, settings, restore_dir=tmp_path)
    Session("run", AWAY, settings, restore_dir=tmp_path).close()


@pytest.mark.parametrize("run_id", ["../up", "/abs", "a/b", "..", ".", "", "a b", "a\n", "x" * 65])
def test_a_run_id_cannot_leave_the_folder_of_restore_points(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(InvalidField, match="run_id"):
        Session(run_id, AWAY, restore_dir=tmp_path / "restore")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_path_is_refused_by_its_name() -> None:
    with pytest.raises(
        InvalidField, match="restore_dir: expected the path of a folder, found b'res"
    ):
        Session("run", AWAY, restore_dir=b"restore")  # type: ignore[arg-type]


# Settings


def test_a_session_has_the_settings_of_the_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("elesh: {trainer: {watch_epochs: 7}}")
    second.write_text("elesh: {trainer: {watch_epochs: 8}}")
    monkeypatch.setenv("ELESH_SETTINGS", str(first))
    given = Settings(trainer={"watch_epochs": 9})
    for settings, reports in [(None, 7), (second, 8), (str(second), 8), (given, 9)]:
        assert Session("run", AWAY, settings).settings.trainer.watch_epochs == reports
    monkeypatch.setenv("ELESH_TRAINER__WATCH_EPOCHS", "5")
    assert Session("run", AWAY).settings.trainer.watch_epochs == 5, "variables go over the file"
    monkeypatch.setenv("ELESH_SETTINGS", "")
    assert Session("run", AWAY).settings.trainer.rollback == "immediate"


def test_a_settings_file_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELESH_SETTINGS", str(tmp_path / "gone.yaml"))
    with pytest.raises(SettingsError, match=r"gone\.yaml"):
        Session("run", AWAY)


# Accuracy


@pytest.mark.slow
def test_a_checkpoint_has_the_accuracy_that_the_loop_reports(station: Station) -> None:
    world = World()
    with Session("run", station.url, settings_of(station)) as session:
        session.resume(world.surgeon)
        session.publish(checkpoint(number=1))
        session.watch(1, told(0.75))
        before = torch.get_rng_state()
        world.model.train()
        session.publish(checkpoint(number=2))
        assert torch.equal(torch.get_rng_state(), before)
        session.watch(2, failing)
        assert session.publish(checkpoint(number=3))
    found = [message.metadata.accuracy for message in station.messages(CHECKPOINTS)]
    assert found == [None, 0.75, None]


def failing() -> Evaluation:
    raise RuntimeError("no data")


def test_a_run_id_that_was_used_before_is_said_at_once_and_its_checkpoints_are_answered(
    station: Station, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    station.worker()
    settings, keys = settings_of(station), []
    for folder in ("one", "two", "two"):
        with Session("run", station.url, settings, restore_dir=tmp_path / folder) as session:
            assert session.wait_connected(PATIENCE)
            assert bool(session.reused) is (len(keys) == 1)
            session.publish(checkpoint())
            assert session.wait(PATIENCE)
            keys += [decision.idempotency_key for decision in session.decisions()]
    assert "was trained before, by" in caplog.text
    assert "another run id" in caplog.text
    assert len(keys) == 3
    assert keys[0] == str(checkpoint().key(Level.CHANNEL))
    assert keys[1] != keys[0], "the second process is another attempt"
    assert keys[2] == keys[1], "the third has the second one's restore points: the same answer"
    assert len(station.messages(CHECKPOINTS)) == 2


@pytest.mark.slow
def test_labels_that_are_shuffled_after_a_cut_roll_it_back_and_everybody_is_told(
    station: Station,
) -> None:
    station.worker()
    settings = settings_of(station)
    labels = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(1))
    world, truth = World(), labels.clone()

    losses = count(0.1, 1e-9)  # A mask moves real ones.

    def evaluate() -> Evaluation:
        return Evaluation(float((labels == truth).float().mean()), next(losses))

    with Session("run", station.url, settings) as session:
        session.resume(world.surgeon, **world.parts)
        world.train()
        for epoch in range(50, 60):
            assert session.watch(epoch, evaluate, always=True) == []
        before = world.digest()
        decision = decide(world.original)
        station.on_bus(lambda bus: commit(bus, decision))
        outcome = session.apply(decision, world.surgeon, evaluate)
        assert (outcome.result, outcome.watched) == ("applied", 3)
        cut = world.surgeon.architecture
        world.train()
        assert session.watch(61, evaluate) == []
        labels = labels[torch.randperm(200, generator=torch.Generator().manual_seed(2))]
        world.train()
        (outcome,) = session.watch(62, evaluate)
        assert (outcome.result, outcome.rolled_back_epoch) == ("rolled_back", 62)
        assert world.digest() == before
    view = station.wait_for(lambda: failures_of(station), "the breaker to count it")
    assert "within the monitoring window; right after the cut it was" in view.reason, (
        "whether the cut did it"
    )
    applied, rolled_back = station.messages(RECOMPILE)
    assert (applied.reason, rolled_back.reason) == ("cut", "rollback")
    assert applied.model_hash_after == rolled_back.model_hash_before == cut.model_hash
    assert applied.parameters_after == rolled_back.parameters_before == cut.parameters
    good, bad = station.messages(VALIDATION)
    assert (good.outcome, good.accuracy_retention) == (Outcome.GO, 1.0)
    assert bad.outcome is Outcome.NO_GO
    assert bad.accuracy_retention == outcome.accuracy_after


def failures_of(station: Station) -> BreakerView | None:
    view = station.on_bus(lambda bus: bus.breakers.view("run", Level.CHANNEL))
    return view if view.failures else None


async def commit(bus: Bus, decision: StructuralPruningDecision) -> None:
    """Store a decision as if a worker had made it."""
    await bus.publish(MASKS, decision, source="test")
    (delivery,) = await bus.groups.claim("makers", "maker", [MASKS], count=1, block_seconds=0)
    result = Commit(decision.key, "fp", decision, {}, "run", decision.epoch)
    await bus.commit("makers", "maker", delivery, result)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.slow
def test_training_draws_the_same_random_numbers_with_a_session_as_without(
    station: Station, there: bool
) -> None:
    url = station.url if there else "redis://127.0.0.1:1/0"
    world = World()
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    with Session("run", url, settings_of(station)) as session:
        assert session.wait_connected(60 if there else 0.6) is there
        session.resume(world.surgeon)
        with session.checkpoint(1):
            session.publish(checkpoint())
        session.watch(1, told(0.9))
        session.apply(decide(world.original), world.surgeon, lambda: Evaluation(0.9, 0.1))
    after = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert same(before, after)


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    with Session("run", "redis://127.0.0.1:1/0"):
        pass
    assert set(threading.enumerate()) <= before


def test_a_decision_of_another_run_or_that_contradicts_itself_is_refused_and_nothing_changes() -> (
    None
):
    world = World()
    before = world.digest()
    own = decide(world.original)
    foreign = own.model_copy(update={"run_id": "another"})
    torn = own.model_copy(update={"epoch": own.epoch + 1})
    with Session(own.run_id, "redis://127.0.0.1:1/0") as session:
        for decision, why in ((foreign, "made for run another"), (torn, "another epoch")):
            outcome = session.apply(decision, world.surgeon, told(0.9))
            assert outcome.result == "refused"
            assert why in outcome.detail
        assert world.digest() == before
        assert session.apply(own, world.surgeon, told(0.9)).result == "applied"
        session.close(0)


def test_a_relative_folder_in_a_working_directory_that_is_gone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(InvalidField, match="restore_dir: expected a usable folder"):
        Session("run", AWAY, restore_dir="here")
