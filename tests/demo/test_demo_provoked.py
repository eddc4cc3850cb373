"""The demo's provoked rollback: one epoch on wrong labels, while a cut of the moderate phase is
monitored."""

from __future__ import annotations

import pytest
import torch

from elesh.demo.training import Training
from elesh.settings import Settings
from elesh.trainer import Session


class Told:
    """An observer that notes what it is told."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_provoked(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def on_wait(self) -> None:
        self.epochs.append(-1)


def test_one_epoch_is_trained_on_wrong_labels_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, told = Settings(), Told()
    session = Session("provoked", "redis://127.0.0.1:1/0", settings)
    training = Training(session, settings, epochs=124, every=4, seed=0, provoked=True)
    training._observer = told  # type: ignore[assignment]
    right = training.data.train.labels
    assert torch.equal(training._labels(70), right)  # nothing is monitored
    monkeypatch.setattr(Session, "monitored", property(lambda self: ("key",)))
    assert torch.equal(training._labels(40), right)  # the conservative phase
    assert not (training._labels(70) == right).any()
    assert torch.equal(training._labels(71), right)
    assert told.epochs == [70]


def test_a_paced_run_waits_for_the_last_answer_once_in_vain_and_a_trainer_without_a_bus_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, told = Settings(), Told()
    session = Session("paced", "redis://127.0.0.1:1/0", settings)
    training = Training(
        session, settings, epochs=124, every=4, seed=0, paced=True, answer_seconds=0.01
    )
    training._observer = told  # type: ignore[assignment]
    training._published = ["4:a:b:joint"]
    training._await_answers()
    assert told.epochs == [], "no bus: nobody can have answered"
    monkeypatch.setattr(Session, "wait_connected", lambda self, timeout: True)
    training._await_answers()
    assert told.epochs == [-1]
    assert training._patience == 0
