"""The simulated trainer's loop: an ordinary training script with a session beside it.

Read :meth:`Training.run` to see all that a training script has to do.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from elesh.analysis import counted_groups, phase_at
from elesh.analysis.pruning_set.draft import Cut as RemovedSet
from elesh.analysis.pruning_set.plans import Target
from elesh.observe import span
from elesh.pruning.latency import compared
from elesh.settings import SafetySchedule, Settings
from elesh.trainer import Evaluation, Recorder, Session, Surgeon
from elesh.trainer.export import Exporter, calibration_inputs, is_worth_exporting
from elesh.trainer.session.apply import refusal
from elesh.trainer.session.carry_over import present_form
from elesh.trainer.surgery.reconstruction.after_cut import InputCovariance
from leyline import (
    CheckpointBundle,
    Level,
    Phase,
    PrunedArchitecture,
    PruningOutcome,
    StructuralPruningDecision,
)

from .network import Digits, DigitsNet, Split

_BATCH, _BATCH_OF_LONG_RUNS = 128, 256
_LONG = 60
"""From so many epochs on, larger batches do: networks as small as this one pay by the step."""
_LEARNING_RATE = 0.1
_CLASSES = 10
_DROPPED = 0.3
_LEVELS = (Level.CHANNEL, Level.HEAD, Level.LAYER)
_LOSS_SAMPLES = 128
"""Samples whose loss's derivatives are taken: workers measure the loss themselves."""
_SHOWN_EVERY = 5
"""Epochs between two looks at held-out data, beside those at checkpoints."""


@dataclass(frozen=True)
class EpochFigures:
    """Where the run stands after an epoch."""

    epoch: int
    phase: str
    loss: float
    accuracy: float
    """When it was last looked at."""
    approved: int
    rejected: int
    channels: int
    checkpoint: bool
    """Whether a checkpoint was published after it."""


class Observer(Protocol):
    """Hears how a run goes."""

    def on_provoked(self, epoch: int) -> None:
        """Before an epoch that is trained on wrong labels."""

    def on_epoch(self, figures: EpochFigures) -> None:
        """After every epoch."""

    def on_wait(self) -> None:
        """Before a wait for the answer to a checkpoint."""

    def on_decision(self, decision: StructuralPruningDecision, outcome: PruningOutcome) -> None:
        """After every decision that was looked at."""


@dataclass(frozen=True)
class Cut:
    """What one cut was predicted to cost, and what worker and trainer measured under its mask.

    Worker and trainer measure on samples of their own, and the trainer some epochs later; what is
    predicted is of the trainer's samples, just before its mask.
    """

    epoch: int
    levels: tuple[Level, ...]
    """Those that lose something."""
    proposed: int
    kept: int
    predicted_loss_rise: float | None
    worker_loss_increase: float
    trainer_loss_increase: float | None
    worker_accuracy_drop: float
    low: float
    """Of the worker's interval for the drop on as many other samples."""
    high: float
    trainer_accuracy_drop: float | None

    @property
    def inside(self) -> bool:
        """Whether the trainer's drop lies in the worker's interval, as far as it measured one."""
        drop = self.trainer_accuracy_drop
        return drop is None or self.low - 1e-9 <= drop <= self.high + 1e-9

    @classmethod
    def of(
        cls, decision: StructuralPruningDecision, outcome: PruningOutcome, predicted: float | None
    ) -> Cut | None:
        """The cut of a decision, where a worker measured it and let some of it pass."""
        found = decision.safety.verification
        if found is None or not found.kept:
            return None
        return cls(
            epoch=decision.epoch,
            levels=_levels_of(decision),
            proposed=found.proposed,
            kept=found.kept,
            predicted_loss_rise=predicted,
            worker_loss_increase=found.loss_rise,
            trainer_loss_increase=_difference(outcome.loss_masked, outcome.loss_before),
            worker_accuracy_drop=found.accuracy_drop,
            low=found.accuracy_drop_interval.low,
            high=found.accuracy_drop_interval.high,
            trainer_accuracy_drop=_difference(outcome.accuracy_before, outcome.accuracy_masked),
        )


def _levels_of(decision: StructuralPruningDecision) -> tuple[Level, ...]:
    loses = (decision.channels, decision.attention_heads, decision.layers)
    return tuple(level for level, targets in zip(_LEVELS, loses, strict=True) if targets)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


@dataclass
class Report:
    """The figures of a run; accuracies are shares of right answers on held-out data."""

    before: Evaluation
    after: Evaluation
    decisions: list[StructuralPruningDecision] = field(default_factory=list)
    outcomes: dict[str, PruningOutcome] = field(default_factory=dict)
    predicted: dict[str, float | None] = field(default_factory=dict)
    """By key, the increase of the loss of validation samples (:meth:`Training._predicted`)."""
    unanswered: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    missed: int = 0
    waited: float = 0.0
    """Seconds of the run in which training stood still for answers."""
    latency: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Seconds a call by the samples in it: of the network before its first cut, and as it is."""

    @property
    def applied(self) -> str:
        """Key of the last decision that was applied, to look closer at; empty if none was."""
        keys = [d.idempotency_key for d in self.decisions]
        return next((k for k in reversed(keys) if self.outcomes[k].result == "applied"), "")

    @property
    def cuts(self) -> list[Cut]:
        """The cuts that workers measured, in the order of their decisions."""
        keys = [d.idempotency_key for d in self.decisions]
        found = [
            Cut.of(decision, self.outcomes[key], self.predicted.get(key))
            for decision, key in zip(self.decisions, keys, strict=True)
        ]
        return [cut for cut in found if cut is not None]


class Training:
    """Trains a DigitsNet for ``epochs`` epochs under a session.

    Args:
        epochs: how many; the last learning rate is near zero (cosine).
        every: epochs between two checkpoints.
        seed: of weights, data split, batches and statistics.
        spoiled: so many first checkpoints are published with truncated statistics, to watch what
            failing analyses do.
        provoked: train one epoch on wrong labels while a cut of the moderate phase is monitored, to
            watch what a cut that turns out badly leads to.
        paced: no checkpoint is published, and the run does not end, before the last one has been
            answered, for at most ``answer_seconds`` of vain waiting in all. Training under Elesh
            never waits; a demo does, so that it shows the same on a busy machine.
        answer_seconds: for ``paced``, and otherwise of waiting after the last epoch.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        *,
        epochs: int,
        every: int,
        seed: int,
        spoiled: int = 0,
        provoked: bool = False,
        paced: bool = False,
        answer_seconds: float = 10.0,
    ) -> None:
        torch.manual_seed(seed)
        # A core is left to the workers: two OpenMP teams on too few cores spin against each other.
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
        self.session, self.settings = session, settings
        self.epochs, self.every, self.seed = epochs, every, seed
        self._to_spoil, self._to_provoke = spoiled, provoked
        self._paced, self._patience = paced, answer_seconds
        self._batch = _BATCH if epochs < _LONG else _BATCH_OF_LONG_RUNS
        self.data = Digits.load(seed)
        # Sixteen heads and six layers that can go: a fifth of each is at least one.
        self.model = DigitsNet(
            heads=8, blocks=(4, 1), layers=2, fine=False, identity=True, dropped=_DROPPED
        )
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._uncut = copy.deepcopy(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=_LEARNING_RATE, momentum=0.9, weight_decay=5e-4
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, partial(_rate, epochs=epochs)
        )
        self.recorder = Recorder(self.model, self.data.train.images[:2], seed=seed)
        self.surgeon = Surgeon(
            self.model,
            self.recorder.architecture,
            optimizer=self.optimizer,
            restore_points=0,  # the session keeps them
        )
        self.exporter = Exporter(self.model)
        self.original = self.surgeon.architecture
        self._before: Evaluation | None = None
        self._accuracy = 0.0
        self._published: list[str] = []
        self._report = Report(Evaluation(0, 0), Evaluation(0, 0))

    def run(self, observer: Observer) -> Report:
        """Train, publish checkpoints, apply what is decided."""
        self._observer = observer
        done = self.session.resume(self.surgeon, scheduler=self.scheduler)
        for epoch in range(done + 1, self.epochs + 1):
            loss = self._train_one_epoch(epoch)
            self._watch(epoch)
            self._apply_decisions()
            if epoch % self.every == 0:
                if self._paced:
                    self._await_answers()
                self._publish_checkpoint(epoch)
            observer.on_epoch(self._figures(epoch, loss))
        self._await_answers()
        return self._finish()

    def evaluate(self, split: Split) -> Evaluation:
        """Accuracy and mean loss on a split, in evaluation mode."""
        return evaluate(self.model, split)

    def _labels(self, epoch: int) -> Tensor:
        """The labels to train on: the right ones, but for the epoch that provokes a rollback."""
        labels, moderate = self.data.train.labels, phase_at(epoch, self._schedule) is Phase.MODERATE
        if not (self._to_provoke and moderate and self.session.monitored):
            return labels
        self._to_provoke = False
        self._observer.on_provoked(epoch)
        return (labels + 1) % _CLASSES

    def _train_one_epoch(self, epoch: int) -> float:
        self.model.train()
        labels = self._labels(epoch)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        train, total = self.data.train, 0.0
        order = torch.randperm(len(train), generator=generator)
        for start in range(0, len(train), self._batch):
            rows = order[start : start + self._batch]
            if len(rows) < 2:
                continue  # a batch of one has no batch statistics
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(train.images[rows]), labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += float(loss.detach()) * len(rows)
        self.scheduler.step()
        return total / len(train)

    def _publish_checkpoint(self, epoch: int) -> None:
        validation = self.evaluate(self.data.validation)
        with self.session.checkpoint(epoch):
            with span("measure"):
                bundle = self.recorder.measure(
                    self.data.calibration(),
                    epoch=epoch,
                    run_id=self.session.run_id,
                    batch_statistics=True,
                    loss_samples=_LOSS_SAMPLES,
                    accuracy=validation.accuracy,
                    loss=validation.loss,
                )
            bundle = replace(bundle, levels=_LEVELS)
            if is_worth_exporting(epoch, self._schedule):
                proof = self.data.proof
                with span("export"):
                    network = self.exporter.export(
                        bundle.architecture,
                        (proof.images, proof.labels),
                        calibration_inputs(self.data.calibration()),
                    )
                bundle = replace(bundle, network=network)
            if self._to_spoil:
                self._to_spoil -= 1
                fields = {name: each for name, each in vars(bundle).items() if name != "covariance"}
                sent: CheckpointBundle = SpoiledBundle(**fields)
            else:
                sent = bundle
            if self.session.publish(sent):
                self._published.append(str(sent.decision_key))

    def _watch(self, epoch: int) -> None:
        """Cuts of the last epochs stand this one's accuracy, or are rolled back."""
        decided = {decision.idempotency_key: decision for decision in self._report.decisions}
        for outcome in self.session.watch(epoch, lambda: self.evaluate(self.data.validation)):
            self._report.outcomes[outcome.idempotency_key] = outcome
            if outcome.result == "rolled_back":
                self.recorder.architecture = self.surgeon.architecture
                self._observer.on_decision(decided[outcome.idempotency_key], outcome)

    def _apply_decisions(self) -> None:
        for decision in self.session.decisions():
            if decision.approved_for_application and self._before is None:
                self._before = self.evaluate(self.data.held_out)
            predicted = self._predicted(decision)
            outcome = self.session.apply(
                decision,
                self.surgeon,
                lambda: self.evaluate(self.data.validation),
                reconstruct=partial(self._covariance, decision),
                batches=self.data.calibration(),
            )
            self._report.decisions.append(decision)
            self._report.predicted[decision.idempotency_key] = predicted
            self._report.outcomes[decision.idempotency_key] = outcome
            if outcome.result == "applied":
                self.recorder.architecture = self.surgeon.architecture
            self._observer.on_decision(decision, outcome)

    def _predicted(self, decision: StructuralPruningDecision) -> float | None:
        """By how much the decision is predicted to raise the loss of the samples that the trainer
        judges by, in nats. What it says itself is of training samples: the network knows those by
        heart, and next to nothing happens to their loss. None where nothing will be cut."""
        now = self.surgeon.architecture
        if refusal(decision, now) is not None:
            return None
        decision, _ = present_form(decision, now)
        validation = self.data.validation
        bundle = self.recorder.measure(
            [(validation.images, validation.labels)], epoch=decision.epoch
        )
        targets: list[Target] = [*decision.channels, *decision.attention_heads, *decision.layers]
        return RemovedSet.of(bundle, targets, decision.statistics.scorer).loss_increase

    def _covariance(self, decision: StructuralPruningDecision) -> InputCovariance:
        """For a decision that comes after another cut or a rollback."""
        return self.recorder.moments(self.data.calibration(), decision.units)

    def _await_answers(self) -> None:
        """Until all checkpoints are answered, or patience is at its end for this run."""
        if not self._open_keys() or not self.session.wait_connected(0):
            return  # where the bus was away all the time, there can be no answer
        self._observer.on_wait()
        begun, deadline = time.monotonic(), Deadline(self._patience)
        while self._open_keys() and not deadline.over:
            self.session.wait(min(0.2, deadline.left))
            self._apply_decisions()
        if self._open_keys():
            self._patience = 0.0
        self._report.waited += time.monotonic() - begun

    def _open_keys(self) -> list[str]:
        answered = self._report.outcomes.keys() | self.session.failed.keys()
        return [key for key in self._published if key not in answered]

    def _finish(self) -> Report:
        report = self._report
        report.after = self.evaluate(self.data.held_out)
        report.before = self._before or report.after
        report.unanswered = self._open_keys()
        report.failed = sorted(self.session.failed)
        images = self.data.held_out.images
        took = compared({"before": self._uncut, "after": self.model}, images)
        report.latency = {
            size: (seconds, took["after"][size]) for size, seconds in took["before"].items()
        }
        return report

    def _figures(self, epoch: int, loss: float) -> EpochFigures:
        decisions = self._report.decisions
        approved = sum(d.approved_for_application for d in decisions)
        checkpoint = epoch % self.every == 0
        if checkpoint or epoch % _SHOWN_EVERY == 0:
            self._accuracy = self.evaluate(self.data.held_out).accuracy
        return EpochFigures(
            epoch=epoch,
            phase=phase_at(epoch, self._schedule).value,
            loss=loss,
            accuracy=self._accuracy,
            approved=approved,
            rejected=len(decisions) - approved,
            channels=total_channels(self.surgeon.architecture),
            checkpoint=checkpoint,
        )

    @property
    def _schedule(self) -> SafetySchedule:
        return self.settings.structured_pruning.safety_schedule


def _rate(epoch: int, epochs: int) -> float:
    """The learning rate of an epoch as a share of the first; of no object, so that it is copied."""
    return max(0.01, 0.5 * (1 + math.cos(math.pi * epoch / epochs)))


class SpoiledBundle(CheckpointBundle):
    """A checkpoint whose statistics arrive cut short, as after a fault of the trainer."""

    def blobs(self) -> dict[str, bytes]:
        """The blobs, the statistics without their last four bytes."""
        found = super().blobs()
        return found | {"statistics": found["statistics"][:-4]}


class Deadline:
    """Seconds that are left of a span of time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether nothing is left."""
        return self.left == 0


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> Evaluation:
    """Accuracy and mean loss of ``model`` on ``split``; the training flag is left as it was."""
    training = model.training
    model.eval()
    logits = model(split.images)
    loss = float(functional.cross_entropy(logits, split.labels))
    accuracy = float((logits.argmax(1) == split.labels).float().mean())
    model.train(training)
    return Evaluation(accuracy, loss)


def total_channels(architecture: PrunedArchitecture) -> int:
    """Channels in all groups that can lose some."""
    return sum(group.size for group in counted_groups(architecture))
