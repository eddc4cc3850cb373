"""TensorBoard summaries: a session is in the event file, and nothing of it stops training."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import networks
import pytest
from tensorboardX.proto.event_pb2 import Event

from elesh.analysis import analyze
from elesh.settings import Settings
from elesh.trainer import Session
from elesh.trainer.adapters.tensorboard import TensorBoardSummaries
from elesh.trainer.session.session import Observers
from leyline import CheckpointBundle, PruningOutcome


def events(folder: Path) -> Iterator[Event]:
    """The events of the one file in a folder: length, its checksum, data, its checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, place = path.read_bytes(), 0
    while place < len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        yield Event.FromString(data[place + 12 : place + 12 + size])
        place += 12 + size + 4


@pytest.fixture
def bundle() -> CheckpointBundle:
    made = networks.bundle(networks.chain([40, 48, 32]), epoch=60)
    metadata = made.metadata.model_copy(update={"accuracy": 0.75, "loss": 0.5})
    return networks.bundle(made.architecture, epoch=60, metadata=metadata)


def test_the_event_file_holds_scalars_and_histograms_of_a_run(
    bundle: CheckpointBundle, tmp_path: Path
) -> None:
    decision = analyze(bundle)
    outcome = PruningOutcome(
        idempotency_key=decision.idempotency_key, run_id="run", epoch=60, result="applied",
        accuracy_before=0.75, accuracy_masked=0.5, loss_before=0.5, loss_masked=0.75,
    )  # fmt: skip
    summaries = TensorBoardSummaries(tmp_path)
    summaries.on_checkpoint(bundle)
    summaries.on_outcome(decision, outcome)
    summaries.close()
    values = {v.tag: (e.step, v) for e in events(tmp_path) for v in e.summary.value}
    scalars = {tag: (step, v.simple_value) for tag, (step, v) in values.items()}
    assert scalars["checkpoint/accuracy"] == (60, 0.75)
    assert scalars["checkpoint/loss"] == (60, 0.5)
    assert scalars["removed/parameters"] == (60, 0.0)
    assert scalars["decision/accuracy_masked"] == (60, 0.5)
    assert scalars["decision/measured_loss_rise"] == (60, 0.25)
    name = next(iter(bundle.channels))
    step, value = values[f"taylor_importance/{name}"]
    assert step == 60
    assert value.histo.num == len(bundle.channels[name].taylor_importance)


def test_a_session_tells_its_observers(bundle: CheckpointBundle, tmp_path: Path) -> None:
    summaries = TensorBoardSummaries(tmp_path)
    # A bus that is away: training, and its summaries, go on.
    with Session("run", "redis://127.0.0.1:1/0", Settings(), observers=[summaries]) as session:
        session.publish(bundle)
        session.close(0.1)
    tags = {value.tag for event in events(tmp_path) for value in event.summary.value}
    assert "checkpoint/accuracy" in tags


def test_an_observer_that_fails_is_left_out_and_training_goes_on(
    bundle: CheckpointBundle, tmp_path: Path
) -> None:
    class Failing:
        called = 0

        def on_checkpoint(self, bundle: CheckpointBundle) -> None:
            self.called += 1
            raise OSError("disk full")

        def on_outcome(self, decision: object, outcome: object) -> None:
            self.called += 1

        def close(self) -> None:
            self.called += 1

    failing, summaries = Failing(), TensorBoardSummaries(tmp_path)
    observers = Observers([failing, summaries])
    for _ in range(2):
        observers.notify("on_checkpoint", bundle)
    observers.notify("close")
    assert failing.called == 1
    assert sum(len(event.summary.value) > 0 for event in events(tmp_path)) > 2
