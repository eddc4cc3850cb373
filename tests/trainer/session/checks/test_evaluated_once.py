"""After a cut ``evaluate`` is spared where the cut network answers as the masked one did, and only
there: where a size is new to it, a copy goes along, or it does not run this network, it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from guarded import decide
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel
from trained import batches, digits, trained

from elesh.settings import RollbackTriggers
from elesh.trainer import Evaluation, Recorder, Surgeon, apply_decision
from leyline import PruningOutcome


class Run:
    """A trained network, unsure of its answers, whose ``evaluate`` is counted."""

    def __init__(self) -> None:
        self.model = trained()
        with torch.no_grad():
            for parameter in self.model.head.parameters():  # type: ignore[union-attr]
                parameter.mul_(0.01)
        self.surgeon = Surgeon(self.model, Recorder(self.model, batches()[0][0][:2]).architecture)
        self.number = self.calls = 0
        self.shown = self.model

    def evaluate(self) -> Evaluation:
        self.calls += 1
        data = digits().validation
        with torch.no_grad():
            output = self.shown(data.images)
        right = (output.argmax(1) == data.labels).float().mean()
        return Evaluation(float(right), float(cross_entropy(output, data.labels)))

    def cut(self, evaluate: Callable[[], Evaluation] | None = None) -> PruningOutcome:
        self.number += 1
        self.calls = 0
        decided = decide(self.surgeon.architecture, units=1, groups=2, number=self.number)
        own = evaluate or self.evaluate
        limits = RollbackTriggers(channel_accuracy_drop=0.5)
        return apply_decision(decided, self.surgeon, own, triggers=limits, batches=batches())


def test_a_cut_that_answers_as_its_mask_is_not_evaluated_again() -> None:
    run = Run()
    first = run.cut()
    assert (first.result, run.calls) == ("applied", 3), "its sizes are new to evaluate"
    second = run.cut()
    assert (second.result, run.calls) == ("applied", 2), "as it is, and masked"
    assert (second.accuracy_after, second.loss_after) == (
        second.accuracy_masked,
        second.loss_masked,
    )
    assert run.evaluate().accuracy == second.accuracy_after


def test_a_cut_that_answers_otherwise_is_evaluated_and_taken_back() -> None:
    run = Run()
    run.cut()
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    made = Surgeon.cut

    def spoiled(surgeon: Surgeon, *args: Any, **given: Any) -> Any:
        found = made(surgeon, *args, **given)
        with torch.no_grad():
            for parameter in surgeon.model.parameters():
                parameter.zero_()
        return found

    with patch.object(Surgeon, "cut", spoiled):
        outcome = run.cut()
    assert (outcome.result, run.calls) == ("rolled_back", 3)
    assert "after the cut" in outcome.detail
    assert all(torch.equal(x, before[name]) for name, x in run.model.state_dict().items())


def best_weights(run: Run) -> Callable[[], Evaluation]:
    """Evaluates other weights than the network has."""

    def evaluate() -> Evaluation:
        weight = next(p for p in run.model.parameters() if p.ndim > 1)
        kept = weight.detach().clone()
        weight.data.mul_(0.99)
        try:
            return run.evaluate()
        finally:
            weight.data.copy_(kept)

    return evaluate


def beside(run: Run) -> Callable[[], Evaluation]:
    """Evaluates the average that is cut along, too."""
    average = AveragedModel(run.model)
    run.surgeon.follow("ema", average)

    def evaluate() -> Evaluation:
        with torch.no_grad():
            average(digits().validation.images[:2])
        return run.evaluate()

    return evaluate


def made_up(run: Run) -> Callable[[], Evaluation]:
    """Runs nothing."""

    def evaluate() -> Evaluation:
        run.calls += 1
        return Evaluation(0.9, 0.1 + 1e-9 * run.calls)

    return evaluate


@pytest.mark.parametrize("kind", [best_weights, beside, made_up])
def test_an_evaluation_of_something_else_is_always_asked(kind: Any) -> None:
    run = Run()
    evaluate = kind(run)
    run.cut(evaluate)
    assert (run.cut(evaluate).result, run.calls) == ("applied", 3)


def test_who_draws_at_random_is_asked() -> None:
    run = Run()
    run.cut()
    model = run.model
    inner, count = type(model).forward, [0]

    def forward(self: Any, x: torch.Tensor) -> Any:
        count[0] += 1
        return inner(self, x) + 1e-5 * count[0] * torch.arange(10)

    with patch.object(type(model), "forward", forward):
        assert (run.cut().result, run.calls) == ("applied", 3)
