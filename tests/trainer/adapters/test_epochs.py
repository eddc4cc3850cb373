"""What the callbacks do after an epoch: budget, reconstruction and accuracy reach the bus."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import decide
from torch import nn
from trainer_nets import batches, build

import elesh
from elesh.settings import Settings
from elesh.trainer import Evaluation, Recorder, Session, Surgeon
from elesh.trainer.adapters.epochs import EveryEpoch
from elesh.trainer.export import Exporter
from elesh.trainer.surgery import optimizers, unnamed
from elesh.trainer.time_share import TimeShare
from leyline import (
    CheckpointBundle,
    InvalidField,
    Level,
    Reconstructed,
    StructuralPruningDecision,
)

AWAY = "redis://127.0.0.1:1/0"

_LOSSES = count(0.1, 1e-9)
"""No two are the same: a mask moves real ones."""


class Kept(Session):
    """A session that keeps what it publishes and hears what it is told to."""

    def __init__(self, **given: Any) -> None:
        super().__init__("run", AWAY, **given)
        self.published: list[CheckpointBundle] = []
        self.answers: list[StructuralPruningDecision] = []

    def publish(self, bundle: CheckpointBundle) -> bool:
        self.published.append(self._with_accuracy(self._of_this_run(bundle)))
        return True

    def decisions(self) -> list[StructuralPruningDecision]:
        found, self.answers = self.answers, []
        return found


def running(session: Session, **given: Any) -> tuple[EveryEpoch, nn.Module]:
    torch.manual_seed(0)
    network, data = build("Vgg"), list(batches(2))
    epochs = EveryEpoch(session, data, data, every=1, **{"preflight": False} | given)
    epochs.begin(network, torch.optim.SGD(network.parameters(), 0.1))
    return epochs, network


def test_every_checkpoint_asks_for_what_is_missing_of_the_original_budget() -> None:
    session = Kept()
    epochs, _ = running(session, budget={"macs": 0.5})
    epochs.end_epoch(1)
    budget = session.published[0].parameters.budget
    assert budget is not None
    assert (budget.resource, budget.at_most) == ("macs", 0.5)
    surgeon = epochs.surgeon
    assert surgeon is not None
    session.answers = [decide(surgeon.architecture, units=8, groups=1)]
    epochs._evaluate = lambda *_: Evaluation(0.9, next(_LOSSES))
    (outcome,) = epochs.end_epoch(2)
    assert outcome.result == "applied"
    now = surgeon.architecture
    budget = session.published[1].parameters.budget
    assert budget is not None
    assert (budget.of, budget.at_most) == ("original", 0.5), "whatever was cut meanwhile"
    assert budget.original == now.original_macs > now.macs


def test_the_network_is_evaluated_once_for_all_that_happens_at_an_epoch() -> None:
    session = Kept()
    epochs, _ = running(session)
    surgeon, calls = epochs.surgeon, []

    def evaluate(*_: object) -> Evaluation:
        calls.append(next(_LOSSES))
        return Evaluation(0.9, calls[-1])

    assert surgeon is not None
    epochs._evaluate = evaluate
    session.answers = [decide(surgeon.architecture, units=8, groups=1)]
    (outcome,) = epochs.end_epoch(1)
    assert (outcome.result, len(calls)) == ("applied", 3), "as it is, masked, cut"
    assert session.published[0].metadata.loss == outcome.loss_after == calls[2]
    session.answers = [decide(surgeon.architecture, units=8, groups=1, number=2)]
    *_, outcome = epochs.end_epoch(2)
    assert (outcome.result, len(calls)) == ("applied", 6), "monitored, masked, cut"
    assert outcome.loss_before == calls[3]
    assert session.published[1].metadata.loss == calls[5]
    epochs.end_epoch(3)
    assert len(calls) == 7, "monitored, and that is the checkpoint's"
    assert session.published[2].metadata.loss == calls[6]
    session.answers = [decide(surgeon.architecture, units=8, groups=1, number=3)]
    *_, outcome = epochs.end_epoch(4, Evaluation(0.9, 7.0))
    assert (outcome.result, len(calls)) == ("applied", 9), "masked, cut; the loop knew the rest"
    assert outcome.loss_before == 7.0
    *_, outcome = epochs.end_epoch(5, Evaluation(0.1, 8.0))
    assert (outcome.result, outcome.accuracy_after) == ("rolled_back", 0.1)
    assert len(calls) == 10, "after a rollback the network is another one"
    assert session.published[4].metadata.loss == calls[9]


def test_derivatives_of_more_samples_are_taken_only_where_they_rank_what_may_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    phases = ("validation", "conservative", "moderate", "aggressive")
    schedule = dict.fromkeys((f"{name}_epochs" for name in phases), 1)
    settings = Settings.model_validate({"structured_pruning": {"safety_schedule": schedule}})
    taken: list[int | None] = []
    measure = Recorder.measure

    def measured(self: Recorder, given: Any, **options: Any) -> Any:
        taken.append(options["loss_samples"])
        return measure(self, given, **options)

    monkeypatch.setattr(Recorder, "measure", measured)

    def of(kind: str, *levels: Level) -> list[int | None]:
        taken.clear()
        session, network, data = Kept(settings=settings), build(kind), list(batches(2))
        epochs = EveryEpoch(
            session, data, data, every=1, levels=levels, held_out=data[0], preflight=False
        )
        epochs.begin(network, torch.optim.SGD(network.parameters(), 0.1))
        for epoch in range(1, 5):
            epochs.end_epoch(epoch)
        return list(taken)

    assert of("ResNet", Level.CHANNEL) == [32, 32, 32, 32]
    assert of("ResNet", *Level) == [32, 32, 32, 128], "whole layers go in the last phase alone"


def samples_measured(session: Session, width: int, positions: int, held_out: bool) -> int:
    """Of 600 samples with so many positions, at the second checkpoint of a small network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    shape = (100, positions)[: 1 if positions == 1 else 2]
    labels = torch.arange(100 * positions).reshape(shape) % 3
    data = [(torch.randn(*shape, 4), labels) for _ in range(6)]
    given = data[0] if held_out else None
    epochs = EveryEpoch(session, data, data, every=1, held_out=given, preflight=False)
    epochs.begin(network, torch.optim.SGD(network.parameters(), 0.1))
    for epoch in (1, 2):
        epochs.end_epoch(epoch)
    return int(session.published[-1].metadata.samples)  # type: ignore[attr-defined]


def cutting(time_share: float) -> Kept:
    """A session of a run that cuts from its first epoch on."""
    phases = dict.fromkeys(("conservative_epochs", "moderate_epochs", "aggressive_epochs"), 4)
    schedule = {"structured_pruning": {"safety_schedule": {"validation_epochs": 0, **phases}}}
    return Kept(
        settings=Settings.model_validate({**schedule, "trainer": {"time_share": time_share}})
    )


def test_two_samples_for_every_unit_of_the_widest_group_are_measured_unless_the_loss_is_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def samples(time_share: float, width: int, held_out: bool = True) -> int:
        return samples_measured(cutting(time_share), width, 2, held_out)

    assert samples(0, 16) == 128
    assert samples(0, 100) == 200
    assert samples(0, 200) == 256
    assert samples(0, 300) == 300
    assert samples(0, 64, held_out=False) == 600
    monkeypatch.setattr(TimeShare, "trained", 0.0)
    assert samples(0.1, 64) == 128
    assert samples(0.1, 200) == 200
    assert samples(0.1, 64, held_out=False) == 256


def test_of_a_table_eight_rows_for_every_unit_are_measured_however_little_time_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert samples_measured(cutting(0), 16, 1, True) == 128
    assert samples_measured(cutting(0), 60, 1, True) == 480
    monkeypatch.setattr(TimeShare, "trained", 0.0)
    assert samples_measured(cutting(0.1), 60, 1, True) == 480
    assert samples_measured(cutting(0.1), 200, 1, True) == 600


def test_a_checkpoint_that_cuts_is_resumed_from_with_one_restore_point_before_and_one_after(
    tmp_path: Path,
) -> None:
    def begun() -> tuple[Kept, elesh.Pruning]:
        torch.manual_seed(0)
        network, data = build("Vgg"), list(batches(2))
        session = Kept(restore_dir=tmp_path)
        epochs = EveryEpoch(session, data, data, every=1, preflight=False)
        epochs._evaluate = lambda *_: Evaluation(0.9, next(_LOSSES))
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        return session, elesh.Pruning(session, epochs, network, optimizer, {})

    def points() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("run/points/0*"))

    session, pruning = begun()
    with pruning:
        before = points()
        pruning.step(1)
        assert len(points()) == len(before) + 1
        session.answers = [decide(pruning.architecture, units=8, groups=1)]
        (outcome,) = pruning.step(2)
        assert outcome.result == "applied"
        assert len(points()) == len(before) + 3
        cut = pruning.architecture
    session, again = begun()
    with again:
        assert (again.done, again.architecture.model_hash) == (2, cut.model_hash)


def test_nothing_is_asked_for_once_the_budget_is_reached() -> None:
    session = Kept()
    epochs, _ = running(session, budget={"parameters": 1.0})
    epochs.end_epoch(1)
    assert session.published == []


def rolled_back(epochs: EveryEpoch, session: Kept) -> Surgeon:
    """The surgeon, after a decision that its check rolled back in epoch 2, which is said."""
    surgeon, right = epochs.surgeon, iter([0.9, 0.5, 0.5, 0.5, 0.5])
    assert surgeon is not None
    epochs._evaluate = lambda *_: Evaluation(next(right, 0.9), next(_LOSSES))
    session.answers = [decide(surgeon.architecture, units=8, groups=1)]
    epochs.end_epoch(2)
    assert "the last decision was rolled back: accuracy 0.9000 fell to" in epochs.so_far()
    return surgeon


def test_the_last_epoch_judges_what_is_monitored_and_asks_for_nothing() -> None:
    session = Kept()
    epochs, _ = running(session)
    assert epochs.surgeon is not None
    session.answers = [decide(epochs.surgeon.architecture, units=8, groups=1)]
    epochs._evaluate = lambda *_: Evaluation(0.9, next(_LOSSES))
    epochs.last, limits = 2, epochs._time._limit
    epochs._time._limit = 1e-9  # beyond its share of time
    (outcome,) = epochs.end_epoch(1)
    assert (outcome.result, len(session.published)) == ("applied", 1)
    epochs._time._limit = limits
    epochs._evaluate = lambda *_: Evaluation(0.1, next(_LOSSES))
    (outcome,) = epochs.end_epoch(2)
    assert (outcome.result, len(session.published)) == ("rolled_back", 1)
    assert not session.wait(3600), "nothing can come: it returns at once"


def test_a_decision_that_was_rejected_is_reported_and_nothing_is_evaluated_for_it() -> None:
    session = Kept()
    epochs, _ = running(session)
    assert epochs.surgeon is not None
    epochs.every, calls = 5, []
    epochs._time._limit = 1e-9

    def evaluate(*_: object) -> Evaluation:
        calls.append(1)
        return Evaluation(0.9, next(_LOSSES))

    epochs._evaluate = evaluate
    session.answers = [decide(epochs.surgeon.architecture, units=8, groups=1)]
    epochs.end_epoch(1)
    assert len(calls) == 3
    rejected = decide(epochs.surgeon.architecture, units=8, groups=1, number=2)
    session.answers = [rejected.model_copy(update={"approved_for_application": False})]
    (outcome,) = epochs.end_epoch(2)
    assert (outcome.result, len(calls)) == ("rejected", 3)


def test_the_process_is_searched_once_at_an_epoch_that_judges_and_cuts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, searches, alive = Kept(), [], unnamed.alive
    epochs, _ = running(session)
    assert epochs.surgeon is not None

    def look(*bases: type, **more: Any) -> list[Any]:
        searches.append(1)
        return alive(*bases, **more)

    for module in (unnamed, optimizers):
        monkeypatch.setattr(module, "alive", look)
    epochs._evaluate = lambda *_: Evaluation(0.9, next(_LOSSES))
    for number in (1, 2):
        session.answers = [decide(epochs.surgeon.architecture, units=8, groups=1, number=number)]
        assert epochs.end_epoch(number)[-1].result == "applied"
        assert len(searches) == number
    epochs.end_epoch(3)
    assert len(searches) == 3


def test_the_second_decision_of_an_epoch_is_judged_by_answers_as_the_first_is() -> None:
    session = Kept(settings=Settings.model_validate({"trainer": {"cut_accuracy_drop": 0.9}}))
    epochs, network = running(session)
    surgeon, images = epochs.surgeon, batches(1)[0][0]
    assert surgeon is not None

    def evaluate(*_: object) -> Evaluation:
        network(images)
        return Evaluation(0.9, next(_LOSSES))

    epochs._evaluate = evaluate
    first, second = (
        decide(surgeon.architecture, units=2, groups=count, number=count) for count in (1, 2)
    )
    planned = second.statistics.model_copy(update={"channels_after": 0})
    session.answers = [first, second.model_copy(update={"statistics": planned})]
    found = epochs.end_epoch(1)
    assert [outcome.result for outcome in found] == ["applied", "applied"]
    assert not any("answers_not_compared" in outcome.fallbacks for outcome in found)
    session.answers = [decide(surgeon.architecture, units=2, groups=1, number=3)]
    *_, outcome = epochs.end_epoch(2, Evaluation(0.9, 7.0))
    assert "answers_not_compared" in outcome.fallbacks, "the loop gave a figure and no answers"


def test_what_holds_a_budget_back_is_said_with_what_would_help() -> None:
    session = Kept()
    epochs, _ = running(session, budget={"macs": 0.5})
    assert "min_channels_per_layer is 16" in epochs.so_far()

    small = Settings.model_validate(
        {"structured_pruning": {"channel_analysis": {"min_channels_per_layer": 2}}}
    )
    session = Kept(settings=small)
    epochs, _ = running(session, budget={"macs": 0.1})
    assert "raise removed_at_most" in epochs.so_far(), "a fifth of the units is too little"

    epochs, _ = running(session, budget={"macs": 0.6}, removed_at_most=0.9)
    assert "100.0% of the macs left; the run is not over" in epochs.so_far()
    surgeon = rolled_back(epochs, session)

    epochs._evaluate = lambda *_: Evaluation(0.9, next(_LOSSES))
    session.answers = [decide(surgeon.architecture, units=8, groups=1, number=2)]
    assert [outcome.result for outcome in epochs.end_epoch(3)] == ["applied"]
    assert "the run is not over" in epochs.so_far()
    epochs._evaluate = lambda *_: Evaluation(0.6, next(_LOSSES))
    assert [outcome.result for outcome in epochs.end_epoch(4)] == ["rolled_back"]
    said = epochs.so_far()
    assert "the last decision was rolled back: accuracy 0.9000 fell to 0.6000" in said
    assert "right after the cut it was 0.9000" in said

    epochs, _ = running(session, budget={"macs": 1.0})
    assert epochs.so_far().startswith("budget reached (macs 100%)")


def test_phases_follow_a_short_run_where_a_budget_was_given_and_are_said_where_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    session = Kept()
    epochs, _ = running(session, budget={"macs": 0.5})
    epochs.ends_with(20)
    epochs.end_epoch(1)
    assert session.published[0].parameters.phases == (4, 5, 5, 4)
    assert session.published[0].network is None, "nothing may be cut yet"
    epochs.ends_with(120)
    epochs.end_epoch(2)
    assert session.published[1].parameters.phases is None, "long enough for the schedule"

    session = Kept()
    epochs, _ = running(session)
    epochs.ends_with(20)
    epochs.end_epoch(1)
    assert session.published[0].parameters.phases is None, "the document's schedule"
    assert "nothing will be cut in this run" in caplog.text
    epochs.ends_with(31)
    assert caplog.text.count("nothing will be cut in this run") == 1


@pytest.mark.parametrize(("epochs", "every"), [(8, 1), (20, 2), (49, 4), (50, 5), (300, 5)])
def test_a_short_run_has_a_checkpoint_every_tenth_unless_it_was_said_when(
    epochs: int, every: int
) -> None:
    data = list(batches(2))
    loop = EveryEpoch(Kept(), data, data)
    loop.ends_with(epochs)
    assert loop.every == every
    loop = EveryEpoch(Kept(), data, data, every=7)
    loop.ends_with(epochs)
    assert loop.every == 7


def test_a_decision_of_a_phase_without_cuts_says_when_cuts_are_made() -> None:
    small = {"structured_pruning": {"channel_analysis": {"min_channels_per_layer": 2}}}
    session = Kept(settings=Settings.model_validate(small))
    epochs, _ = running(session, removed_at_most=0.4)
    epochs.ends_with(40)
    assert epochs.surgeon is not None
    update = {"approved_for_application": False, "rejection_reason": "channel.phase"}
    session.answers = [decide(epochs.surgeon.architecture).model_copy(update=update)]  # of epoch 60
    (outcome,) = epochs.end_epoch(38)
    assert outcome.result == "rejected"
    assert "channel.phase; the schedule cuts from epoch 10 to 36" in epochs.so_far()


def test_what_held_the_budget_back_is_not_that_the_last_epochs_are_without_cuts() -> None:
    small = {"structured_pruning": {"channel_analysis": {"min_channels_per_layer": 2}}}
    epochs, _ = running(
        session := Kept(settings=Settings.model_validate(small)), removed_at_most=0.4
    )
    epochs.ends_with(40)
    assert epochs.surgeon is not None
    for epoch, gate in ((20, "channel.worst_class"), (38, "channel.phase")):
        decision = decide(epochs.surgeon.architecture, number=epoch)
        update = {"approved_for_application": False, "rejection_reason": gate, "epoch": epoch}
        update["idempotency_key"] = decision.idempotency_key.replace("60:", f"{epoch}:", 1)
        session.answers = [decision.model_copy(update=update)]
        assert [outcome.result for outcome in epochs.end_epoch(epoch)] == ["rejected"]
    assert "channel.worst_class; train longer between cuts" in epochs.so_far()


def test_without_a_budget_it_is_said_how_much_of_what_may_go_is_gone_and_why_not_more() -> None:
    session = Kept()
    epochs, _ = running(session, removed_at_most=0.4)
    said = epochs.so_far()
    assert "(0.0%), at most 40% are allowed; safety_margin keeps 10% of them" in said
    assert "min_channels_per_layer is 16" in said

    small = Settings.model_validate(
        {"structured_pruning": {"channel_analysis": {"min_channels_per_layer": 2}}}
    )
    session = Kept(settings=small)
    epochs, _ = running(session, removed_at_most=0.4)
    assert "the run is not over" in epochs.so_far()
    surgeon = rolled_back(epochs, session)
    epochs._evaluate = lambda *_: Evaluation(0.9, next(_LOSSES))
    session.answers = [decide(surgeon.architecture, units=8, groups=1, number=2)]
    assert [outcome.result for outcome in epochs.end_epoch(3)] == ["applied"]
    assert "8 of " in epochs.so_far()


def test_a_budget_that_nobody_knows_is_refused_before_training() -> None:
    with pytest.raises(InvalidField, match="budget"):
        running(Kept(), budget={"speed": 0.5})


@pytest.mark.parametrize("asked", [True, None])
@pytest.mark.sampled
def test_cuts_are_reconstructed_where_the_callback_or_the_settings_say_so(
    tmp_path: Path, asked: bool | None
) -> None:
    file = tmp_path / "elesh.yaml"
    on = "elesh: {structured_pruning: {channel_analysis: {redistribute: true}}}"
    file.write_text(on if asked is None else "elesh: {}")
    weights = []
    for reconstruct in (asked, False):
        session = Kept(settings=file)
        epochs, network = running(session, reconstruct=reconstruct)
        epochs._evaluate = lambda *_: Evaluation(0.9, next(_LOSSES))
        assert epochs.surgeon is not None
        epochs.end_epoch(1)
        assert session.published[0].parameters.redistribute is (reconstruct is not False)
        made = decide(epochs.surgeon.architecture)
        if reconstruct is not False:
            made = made.model_copy(update={"reconstruction": Reconstructed(applied=True)})
        session.answers = [made]
        (outcome,) = epochs.end_epoch(2)
        assert outcome.result == "applied", outcome.detail
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert weights[0].shape == weights[1].shape
    assert not torch.equal(*weights)


def test_a_checkpoint_has_its_accuracy_by_itself() -> None:
    session = Kept()
    epochs, _ = running(session)
    epochs.end_epoch(1)
    accuracy = session.published[0].metadata.accuracy
    assert accuracy == epochs.evaluate().accuracy


def test_that_a_network_is_not_published_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: object) -> None:
        raise InvalidField("program", "a network that can be exported", "another")

    monkeypatch.setattr(Exporter, "export", refused)
    monkeypatch.setattr(EveryEpoch, "_may_cut", lambda epochs, epoch: True)
    epochs, _ = running(Kept(), held_out=next(iter(batches(1))))
    epochs.end_epoch(1)
    epochs.end_epoch(2)
    assert caplog.text.count("network not published") == 1


def test_of_one_epoch_ago_is_the_checkpoint_accuracy_where_time_is_over_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(share: float) -> tuple[list[int], list[CheckpointBundle]]:
        session, epoch, calls = cutting(share), 0, list[int]()
        epochs, _ = running(session)
        epochs.every = 2

        def evaluate(*_: object) -> Evaluation:
            calls.append(epoch)
            return Evaluation(0.9, next(_LOSSES))

        epochs._evaluate = evaluate
        assert epochs.surgeon is not None
        for epoch in range(1, 7):
            if epoch == 3:
                session.answers = [decide(epochs.surgeon.architecture, units=8, groups=1)]
            epochs.end_epoch(epoch)
        return calls, session.published

    monkeypatch.setattr(TimeShare, "trained", 0.0)
    calls, published = run(0.1)
    assert calls == [2, 3, 3, 3, 6], "at 4 it is known from 3; at 6 that is long ago"
    second = published[1].metadata
    assert (second.epoch, second.accuracy) == (4, 0.9)
    assert "accuracy and loss are those of epoch 3" in second.held_back
    assert "accuracy" not in published[0].metadata.held_back + published[2].metadata.held_back
    calls, published = run(0)
    assert calls == [2, 3, 3, 3, 4, 5, 6]
    assert not any(bundle.metadata.held_back for bundle in published)
