"""The session: off the training thread, never in its way, and its requests are answered."""

from __future__ import annotations

import threading

import networks
from station import Station, checkpoint

from elesh.settings import Settings
from elesh.trainer import Session
from leyline import CheckpointReady, IdempotencyKey, Level, StructuralAnalysisRequest
from leyline.streams import CHECKPOINTS, REQUESTS


def settings_of(station: Station) -> Settings:
    return Settings.load(station.settings_file())


def test_a_published_checkpoint_is_decided_and_comes_back_to_its_run(station: Station) -> None:
    station.worker()
    with Session("run", station.url, settings_of(station)) as session:
        session.publish(checkpoint())
        assert session.wait(60)
        (decision,) = session.decisions()
    assert decision.idempotency_key == str(checkpoint().key(Level.CHANNEL))
    assert session.missed == 0


def test_a_request_is_answered_under_its_own_id(station: Station) -> None:
    station.worker()
    with Session("run", station.url, settings_of(station)) as session:
        session.request(checkpoint(), "rq-7")
        assert session.wait(60)
        (decision,) = session.decisions()
    hash_ = checkpoint().architecture.model_hash
    assert decision.key == IdempotencyKey(60, hash_, "rq-7", Level.CHANNEL)
    (message,) = station.messages(REQUESTS)
    assert isinstance(message, StructuralAnalysisRequest)


def test_decisions_of_other_runs_are_not_seen(station: Station) -> None:
    station.worker()
    with Session("another-run", station.url, settings_of(station)) as session:
        assert session.wait_connected(60)
        station.publish(checkpoint())
        station.wait_decisions(1)
        mine = checkpoint(number=2)
        metadata = mine.metadata.model_copy(update={"run_id": "another-run"})
        session.publish(networks.bundle(mine.architecture, metadata=metadata))
        assert session.wait(60)
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


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    with Session("run", "redis://127.0.0.1:1/0"):
        pass
    assert set(threading.enumerate()) <= before
