"""A figure that is no finite number is a failed check, wherever it comes up."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import Run, World, decide, outputs
from trainer_nets import example

from elesh.trainer import Evaluation, apply_decision
from elesh.trainer.network.calling import _EXAMPLES
from leyline import Reconstructed

GOOD = Evaluation(0.9, 0.1)
BAD = [
    Evaluation(0.9, math.nan),
    Evaluation(0.9, math.inf),
    Evaluation(0.9, -math.inf),
    Evaluation(math.nan, 0.1),
    Evaluation(math.inf, 0.1),
]


def saying(*evaluations: Evaluation) -> Any:
    left, calls = list(evaluations), count(1)

    def evaluate() -> Evaluation:
        found = left.pop(0) if len(left) > 1 else left[0]
        # No two are bit for bit the same: a mask moves real ones.
        return Evaluation(found.accuracy, found.loss + next(calls) * 1e-9)

    return evaluate


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("good", [1, 2], ids=["under the mask", "after the cut"])
@pytest.mark.sampled
def test_no_cut_stands_whose_figures_are_no_numbers(bad: Evaluation, good: int) -> None:
    run, world = Run(), World()
    run.resume(world.tracked)
    before, answers = world.digest(), outputs(world)
    decision = decide(world.original, layers=("blocks.2",))
    outcome = run.apply(decision, world.surgeon, saying(*[GOOD] * good, bad))
    assert outcome.result == "rolled_back"
    assert "nan" in outcome.detail or "inf" in outcome.detail
    assert world.digest() == before
    assert torch.equal(outputs(world), answers)


def test_a_look_at_what_else_is_alive_that_fails_refuses_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, world = Run(), World()
    run.resume(world.tracked)
    before = world.digest()

    def fails() -> str:
        raise TypeError("unhashable")

    monkeypatch.setattr(world.surgeon, "blocked", fails)
    decision = decide(world.original, layers=("blocks.2",))
    outcome = run.apply(decision, world.surgeon, saying(GOOD))
    assert (outcome.result, "unhashable" in outcome.detail) == ("refused", True)
    assert world.digest() == before


def test_a_measurement_that_fails_refuses_the_decision_and_raises_nothing() -> None:
    run, world = Run(), World()
    run.resume(world.tracked)
    before = world.digest()

    def measured() -> Any:
        raise MemoryError("no room")

    asked = Reconstructed(applied=True)
    decision = decide(world.original).model_copy(update={"reconstruction": asked})
    outcome = run.apply(decision, world.surgeon, saying(GOOD), reconstruct=measured)
    assert (outcome.result, world.digest()) == ("refused", before)
    assert "no room" in outcome.detail


def test_an_evaluation_may_pickle_the_network_that_it_judges(tmp_path: Path) -> None:
    """As scripts do that keep the best one whole."""
    run, world = Run(), World()
    run.resume(world.tracked)
    calls = count(1)

    def evaluate() -> Evaluation:
        torch.save(world.model, tmp_path / "best.pt")
        best = torch.load(tmp_path / "best.pt", weights_only=False)
        assert torch.equal(best(example()), world.model(example()))
        return Evaluation(0.9, 0.1 + next(calls) * 1e-9)

    outcome = run.apply(decide(world.original), world.surgeon, evaluate)
    assert outcome.result == "applied", outcome.detail
    assert torch.load(tmp_path / "best.pt", weights_only=False)(example()).isfinite().all()


def test_a_cut_says_what_a_call_took_before_and_after_it_and_changes_nothing_by_asking() -> None:
    run, world = Run(), World()
    run.resume(world.tracked)
    timed = run.apply(decide(world.original), world.surgeon, saying(GOOD))
    assert min(timed.latency_before or 0, timed.latency_after or 0) > 0
    before, untimed = world.digest(), World()
    _EXAMPLES.pop(untimed.model)  # what was measured in another process, for one
    (again := Run()).resume(untimed.tracked)
    outcome = again.apply(decide(untimed.original), untimed.surgeon, saying(GOOD))
    assert (outcome.latency_before, outcome.latency_after) == (None, None)
    assert untimed.digest() == before


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.sampled
def test_a_network_whose_own_figures_are_no_numbers_is_not_cut(bad: Evaluation) -> None:
    run, world = Run(), World()
    run.resume(world.tracked)
    outcome = run.apply(decide(world.original), world.surgeon, saying(bad, GOOD))
    assert (outcome.result, world.surgeon.architecture is world.original) == ("refused", True)
    assert "not checkable" in outcome.detail


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.sampled
def test_a_monitored_cut_after_which_figures_are_no_numbers_is_rolled_back(bad: Evaluation) -> None:
    run, world = Run(), World()
    run.resume(world.tracked)
    run.apply(decide(world.original), world.surgeon, saying(GOOD))
    (outcome,) = run.watch(61, saying(bad))
    assert outcome.result == "rolled_back"
    assert world.surgeon.architecture is not None
    assert world.surgeon.architecture.parameters == world.original.parameters


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.sampled
def test_without_a_session_and_without_a_restore_point_the_cut_is_taken_back_too(
    bad: Evaluation,
) -> None:
    world = World(restore_points=0)
    answers = outputs(world)
    decision = decide(world.original, layers=("blocks.2",))
    outcome = apply_decision(decision, world.surgeon, saying(GOOD, GOOD, bad))
    assert outcome.result == "rolled_back"
    assert torch.equal(outputs(world), answers)


def test_figures_may_be_tensors() -> None:
    evaluation = Evaluation(torch.tensor(0.5), torch.tensor(0.25))  # type: ignore[arg-type]
    assert (evaluation.accuracy, evaluation.loss) == (0.5, 0.25)
    assert type(evaluation.accuracy) is float
