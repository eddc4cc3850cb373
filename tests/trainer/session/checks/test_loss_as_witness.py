"""A cut is judged by the loss as well as by accuracy: an accuracy that is constant or saturated, or
of few samples, does not let harm pass, and does not take chance for harm."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import pytest
import torch
from guarded import decide
from torch import Tensor, nn
from torch.nn import functional
from trained import accuracy, batches, digits, trained

from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from elesh.trainer.recovery.evaluation import failed_loss, likely_drop
from elesh.trainer.recovery.witnesses import OwnSamples
from leyline import PruningOutcome, StructuralPruningDecision

BEFORE = Evaluation(0.9, 0.4)


def decision(model: nn.Module, units: int) -> tuple[StructuralPruningDecision, Surgeon]:
    """Much or little of a trained network, whatever it does to it."""
    architecture = Recorder(model, batches()[0][0][:2]).architecture
    return decide(architecture, units=units, groups=9), Surgeon(model, architecture)


def apply(units: int, evaluate: Any, *, held_out: bool = True) -> tuple[PruningOutcome, nn.Module]:
    model = trained()
    decided, surgeon = decision(model, units)
    data = digits().held_out
    samples = [(data.images, data.labels)] if held_out else []
    outcome = apply_decision(
        decided, surgeon, lambda: evaluate(model), batches=batches(), held_out=samples
    )
    return outcome, model


MADE_UP = count(0.3, 1e-9)


@pytest.mark.parametrize("held_out", [True, False], ids=["held-out", "calibration"])
def test_harm_that_a_made_up_evaluation_does_not_see_is_taken_back(held_out: bool) -> None:
    before = accuracy(trained())
    made_up = lambda model: Evaluation(0.9, next(MADE_UP))  # noqa: E731
    outcome, model = apply(16, made_up, held_out=held_out)
    assert outcome.result == "rolled_back"
    assert "Elesh's own samples" in outcome.detail
    assert accuracy(model) == before


def test_harm_that_a_constant_accuracy_hides_is_seen_by_the_loss_beside_it() -> None:
    data = digits().validation

    def evaluate(model: nn.Module) -> Evaluation:
        with torch.no_grad():
            return Evaluation(1.0, float(functional.cross_entropy(model(data.images), data.labels)))

    model = trained()
    decided, surgeon = decision(model, 16)
    outcome = apply_decision(decided, surgeon, lambda: evaluate(model))
    assert outcome.result == "rolled_back"
    assert "more than twice" in outcome.detail


def test_labels_that_are_no_classes_are_no_witness() -> None:
    """Regression: the caller's own evaluation judges alone."""
    data = [(x, torch.rand(len(x))) for x, _ in batches()]
    model = trained()
    own = OwnSamples(model, data, 0.05)
    own.before()
    with torch.no_grad():
        model.head.weight.zero_()  # type: ignore[union-attr, operator]
    assert own.rose() == ""


def test_outputs_that_are_no_logits_are_no_witness() -> None:
    """An embedding of classes is trained by another loss; of labels that a network cannot give the
    loss is infinite."""
    rows, labels = torch.arange(64), torch.arange(64) % 4
    embedded = 9 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    for logits in (embedded, torch.eye(4)[labels.roll(1)].log()):
        model = Logits(logits)
        own = OwnSamples(model, [(rows, labels)], 0.05)
        own.before()
        with torch.no_grad():
            model.weight.mul_(1.5)
        assert own.rose() == ""


def test_own_samples_leave_the_network_and_random_states_as_they_were() -> None:
    model = trained().train()
    state, drawn = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    own = OwnSamples(model, batches(), 0.05)
    own.before()
    assert own.rose() == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(v, drawn[k]) for k, v in model.state_dict().items())


class Logits(nn.Module):
    """Answers with its weight, whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x]


@pytest.mark.parametrize("spread", [0.0, 40.0], ids=["all", "one of many"])
def test_a_rise_that_chance_explains_is_none(spread: float) -> None:
    """Of a few samples' loss: that all rise is harm, that one does is chance."""
    labels, rows = torch.zeros(64, dtype=torch.long), torch.arange(64)
    model = Logits(torch.tensor([[4.0, 0.0]]).repeat(64, 1))
    own = OwnSamples(model, [(rows, labels)], 0.05)
    own.before()
    with torch.no_grad():
        if spread:
            model.weight[0, 0] -= spread
        else:
            model.weight[:, 0] -= 2
    assert bool(own.rose()) is not bool(spread)


@pytest.mark.parametrize(
    ("before", "after", "fails"),
    [
        (0.02, 1.0, True),
        (0.4, 0.7, False),  # accuracy judges what less than doubles
        (0.001, 0.04, False),  # less than the limit
        (0.0, 0.0, False),  # none is measured
        (-5.0, -4.0, False),  # of another kind
    ],
)
def test_a_loss_fails_that_more_than_doubles_and_rises_by_more_than_the_limit(
    before: float, after: float, fails: bool
) -> None:
    failed = failed_loss(Evaluation(0.9, before), Evaluation(0.9, after), 0.05)
    assert bool(failed) is fails


def drop(before: Evaluation, now: Evaluation, samples: int) -> float:
    return likely_drop(before, now, samples).combined


def test_of_few_samples_the_loss_says_what_a_cut_costs_and_of_many_the_accuracy() -> None:
    unseen = Evaluation(0.9, 0.4 * 1.2)  # errors rise by a fifth: two points
    assert 0.012 < drop(BEFORE, unseen, 100) < 0.02
    assert drop(BEFORE, unseen, 10**6) < 1e-3
    chance = Evaluation(0.88, 0.4)
    assert drop(BEFORE, chance, 100) < 0.005
    assert drop(BEFORE, chance, 10**5) == pytest.approx(0.02, rel=0.1)
    assert drop(BEFORE, Evaluation(0.88, 0.48), 100) == pytest.approx(0.02, rel=0.01)
    assert drop(BEFORE, unseen, 0) == 0.0  # nobody knows of how many
    assert drop(Evaluation(0.9, 0.0), Evaluation(0.88, 0.0), 100) == pytest.approx(0.02)


def test_no_more_answers_turn_wrong_than_the_loss_has_room_for() -> None:
    """A saturated network's loss rises many times by little."""
    sure = Evaluation(0.99, 1e-4)
    assert drop(sure, Evaluation(0.99, 5e-3), 100) < 5e-3 / math.log(2) + 1e-9
