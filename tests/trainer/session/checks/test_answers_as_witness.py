"""What a cut costs is told from how the network's answers move, where few samples' accuracy cannot:
without labels, and only where both evaluations showed the same samples."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import count

import pytest
import torch
from guarded import decide
from torch import Tensor, nn
from trained import digits, trained

from elesh.settings import RollbackTriggers
from elesh.trainer import Evaluation, Recorder, Surgeon
from elesh.trainer.recovery.evaluation import excess, likely_drop
from elesh.trainer.recovery.witnesses import Answers, Shown, moved
from elesh.trainer.session.apply import RefitData, check_and_cut

CLASSES = 6


def drawn(samples: int, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [S, C] before and after, three times as sure as they should be, and labels that are
    as likely as the outputs before say."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(samples, CLASSES, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    change = noise * torch.randn(samples, CLASSES, generator=generator)
    return 3 * logits, 3 * (logits + change), labels


def right(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def answers(logits: Tensor, shown: Tensor | None = None) -> Answers:
    return Answers(logits, (torch.arange(9.0) if shown is None else shown,))


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_a_hundred_samples_answers_tell_a_drop_that_their_accuracy_cannot(noise: float) -> None:
    before, after, labels = drawn(200_000, noise, 0)
    truth = right(before, labels) - right(after, labels)
    told, seen = [], []
    for rows in torch.arange(20_000).split(100):
        accuracy = right(before[rows], labels[rows])
        found = moved(answers(before[rows]), answers(after[rows]), accuracy)
        assert found is not None
        told.append(found.drop - truth)
        seen.append(accuracy - right(after[rows], labels[rows]) - truth)
    by_answers, by_accuracy = torch.tensor(told), torch.tensor(seen)
    assert abs(float(by_answers.mean())) < 0.15 * truth
    assert float(by_answers.std()) < float(by_accuracy.std()) / 3


def test_answers_that_stay_cost_nothing_and_answers_at_random_cost_much() -> None:
    before, _, labels = drawn(2000, 0.1, 1)
    accuracy = right(before, labels)
    found = moved(answers(before), answers(2 * before), accuracy)
    assert found is not None
    assert (found.drop, found.error, found.share) == pytest.approx((0, 0, 0), abs=1e-9)
    lost = moved(answers(before), answers(before.roll(7, 0)), accuracy)
    assert lost is not None
    assert lost.drop > (accuracy - 1 / CLASSES) / 2


def test_outputs_of_other_samples_are_not_compared() -> None:
    before, after, _ = drawn(50, 0.1, 2)
    other = answers(after, torch.arange(1.0, 10.0))
    assert moved(answers(before), other, 0.9) is None
    assert moved(answers(before), answers(after[:40]), 0.9) is None
    assert moved(None, answers(after), 0.9) is None


def test_a_cut_has_to_stay_below_the_limit_by_two_errors_as_far_as_it_can_be_shortened() -> None:
    before, after, _ = drawn(400, 0.1, 3)
    was = Evaluation(0.7, 0.9, answers(before))
    now = Evaluation(0.7, 0.9, answers(after))
    likely = likely_drop(was, now, 400)
    assert likely.bound is not None
    assert likely.combined < 0.005 < likely.bound
    found = excess(was, now, 400, 0.005)
    assert found.why.startswith("accuracy goes from 0.7000 to 0.7000 and the loss from 0.9 to 0.9,")
    assert not found.likely
    assert found.within is not None
    drop, error = likely.combined, likely.bound - likely.combined
    part = drop * found.within**1.5 + error * found.within**0.75
    assert part == pytest.approx(0.9 * 0.005), (
        "of a part of the cheapest units, just below the limit"
    )
    assert not excess(was, now, 400, 0.02).why
    unseen = excess(Evaluation(0.7, 0.9), Evaluation(0.7, 0.9), 400, 0.005)
    assert not unseen.why, "without answers few samples are not asked for a bound"


def test_of_many_samples_accuracy_decides() -> None:
    before, after, _ = drawn(400, 0.06, 3)
    was, now = Evaluation(0.7, 0.9, answers(before)), Evaluation(0.68, 0.9, answers(after))
    assert likely_drop(was, now, 10**6).combined == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("drop", "too_much"), [(0.001, False), (0.013, True)])
def test_what_accuracy_shows_by_itself_is_too_much_whatever_answers_say(
    drop: float, too_much: bool
) -> None:
    """The outputs of a network may not be worth what they say of its answers."""
    before, after, _ = drawn(1000, 0.04, 3)
    was, now = Evaluation(0.7, 0.9, answers(before)), Evaluation(0.7 - drop, 0.9, answers(after))
    likely = likely_drop(was, now, 1000)
    assert likely.combined < 0.005, "by answers, it costs little"
    assert likely.bound is not None
    assert bool(excess(was, now, 1000, 0.005).why) is too_much


@pytest.mark.parametrize(("noise", "accuracy"), [(0.02, 0.67), (0.5, 0.7)])
def test_an_accuracy_that_moves_otherwise_than_answers_is_not_of_these(
    noise: float, accuracy: float
) -> None:
    """As where every sample has several labels, or numbers are foretold."""
    before, after, _ = drawn(2000, noise, 3)
    was, now = Evaluation(0.7, 0.9, answers(before)), Evaluation(accuracy, 0.9, answers(after))
    without = likely_drop(Evaluation(0.7, 0.9), Evaluation(accuracy, 0.9), 2000)
    apart = likely_drop(was, now, 2000)
    assert replace(apart, unseen="") == replace(without, unseen="")
    assert "by the answers" in apart.unseen
    found = moved(was.answers, now.answers, 0.7)
    assert found is not None
    as_told = Evaluation(0.7 - found.drop, 0.9, answers(after))
    assert likely_drop(was, as_told, 2000).bound is not None


class Rows(nn.Module):
    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.linear = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(x))


def test_of_many_outputs_some_are_kept_evenly_spread() -> None:
    model, x = Rows(), torch.randn(10_000, 3)
    with Shown.by(model) as shown:
        for part in x.split(33):
            model(part)
    assert shown.count == 10_000
    assert shown.answers is not None
    assert torch.allclose(shown.answers.logits, model(x)[::4].detach(), atol=1e-6)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_copies_count_and_a_pickled_network_counts_for_itself() -> None:
    model = Rows()
    with Shown.by(model) as shown:
        copy.deepcopy(model)(torch.zeros(5, 3))
        pickle.loads(pickle.dumps(model))(torch.zeros(7, 3))
    assert shown.count == 5


@pytest.mark.parametrize("output", ["positions", "one", "infinite"])
def test_outputs_that_are_no_row_of_classes_are_none(output: str) -> None:
    model, x = Rows(1 if output == "one" else CLASSES), torch.zeros(4, 3)
    with torch.no_grad():
        model.linear.bias.fill_(torch.inf if output == "infinite" else 0)
    with Shown.by(model) as shown:
        model(x[None] if output == "positions" else x)
    assert shown.answers is None


@pytest.mark.slow
def test_a_cut_that_accuracy_does_not_see_is_shortened_by_what_answers_say() -> None:
    """Regression: of 100 samples half a point is none, and cuts that cost two went as a whole."""
    model, images, losses = trained(), digits().validation.images[:100], count(0.4, 1e-9)
    architecture = Recorder(model, images[:2]).architecture
    surgeon, decision = Surgeon(model, architecture), decide(architecture, units=4, groups=1)

    def evaluate() -> Evaluation:
        model(images)
        return Evaluation(0.9, next(losses))

    outcome, _ = check_and_cut(
        decision, surgeon, evaluate, RefitData(), RollbackTriggers(), cut_drop=0.005
    )
    assert outcome.accuracy_before == outcome.accuracy_masked
    assert outcome.shortened_to is not None or outcome.result == "refused"
    assert "by how answers move" in outcome.detail


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ("the same", ""),
        ("other samples", "shows other samples every time"),
        ("nothing", "did not show the network"),
        ("given", "answers before were not seen"),
    ],
)
def test_a_cut_that_was_judged_without_answers_says_so(
    shown: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, images, losses = trained(), digits().validation.images[:100], count(0.4, 1e-9)
    architecture = Recorder(model, images[:2]).architecture
    surgeon, decision = Surgeon(model, architecture), decide(architecture, units=1, groups=1)
    turns = count()

    def evaluate() -> Evaluation:
        if shown != "nothing":
            model(images.roll(next(turns), 0) if shown == "other samples" else images)
        return Evaluation(0.9, next(losses))

    outcome, _ = check_and_cut(
        decision,
        surgeon,
        evaluate,
        RefitData(),
        RollbackTriggers(),
        now=Evaluation(0.9, 0.4) if shown == "given" else None,
        cut_drop=0.5,
    )
    assert outcome.result == "applied"
    assert outcome.fallbacks == (("answers_not_compared",) if said else ())
    assert said in outcome.detail
    assert ("judged by accuracy and loss alone" in outcome.detail) is bool(said)
    assert ("answers_not_compared" in caplog.text) is bool(said)
