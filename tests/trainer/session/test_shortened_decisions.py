"""A cut that costs too much at once is made smaller under the trainer's own check, or not made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guarded import Run, World, decide, told
from trainer_nets import example

from elesh.trainer import Evaluation


def trained(**trainer: Any) -> tuple[Run, World]:
    world, run = World(), Run(None, **trainer)
    run.resume(world.tracked)
    return run, world


def units(world: World) -> int:
    return sum(group.size for group in world.surgeon.architecture.groups if group.prunable)


def test_a_decision_that_costs_too_much_at_once_goes_in_part() -> None:
    run, world = trained()
    before, decision = units(world), decide(world.surgeon.architecture)
    outcome = run.apply(decision, world.surgeon, told(0.9, 0.885, 0.899))
    assert (outcome.result, outcome.shortened_to) == ("applied", 0.5)
    assert (outcome.accuracy_masked, outcome.accuracy_after) == (0.899, 0.899)
    assert "shortened to 2 of 4 units" in outcome.detail
    assert before - units(world) == 2


@pytest.mark.parametrize(
    ("masked", "result"), [(0.8, "rolled_back"), (0.89, "refused")], ids=["far", "near"]
)
def test_what_costs_too_much_in_every_part_changes_nothing(masked: float, result: str) -> None:
    run, world = trained()
    before = world.digest()
    outcome = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9, masked))
    assert (outcome.result, outcome.shortened_to) == (result, None)
    assert ("raise cut_accuracy_drop" in outcome.detail) is (result == "refused")
    assert world.digest() == before


def test_the_setting_allows_a_cut_to_cost_more() -> None:
    run, world = trained(cut_accuracy_drop=0.02)
    outcome = run.apply(decide(world.surgeon.architecture), world.surgeon, told(0.9, 0.885))
    assert (outcome.result, outcome.shortened_to) == ("applied", None)


def test_a_drop_that_the_loss_does_not_confirm_is_chance() -> None:
    run, world = trained()
    figures = iter((Evaluation(0.9, 0.4), Evaluation(0.885, 0.39), Evaluation(0.885, 0.39)))
    outcome = run.apply(decide(world.surgeon.architecture), world.surgeon, lambda: next(figures))
    assert (outcome.result, outcome.shortened_to) == ("applied", None)


@pytest.mark.parametrize(
    ("masked", "shortened_to"),
    [
        (Evaluation(0.89, 0.1), None),  # one of a hundred
        (Evaluation(0.881, 0.1), None),  # two of a hundred, and the loss is what it was
        (Evaluation(0.881, 0.12), 0.5),
        (Evaluation(0.9, 0.12), 0.5),  # errors rise by a fifth, and by chance none of these does
    ],
)
def test_what_few_samples_say_by_chance_is_told_from_what_a_cut_costs(
    masked: Evaluation, shortened_to: float | None
) -> None:
    """Where answers cannot be compared: samples are drawn anew for every evaluation."""
    run, world = trained()
    said = iter((Evaluation(0.9, 0.1), masked, *[Evaluation(0.9, 0.1001)] * 2))
    samples = iter(torch.rand(4, 100, *example().shape[1:]))

    def evaluate() -> Evaluation:
        world.model(next(samples))
        return next(said)

    outcome = run.apply(decide(world.surgeon.architecture), world.surgeon, evaluate)
    assert (outcome.result, outcome.shortened_to) == ("applied", shortened_to)


def test_a_single_unit_that_costs_too_much_stays() -> None:
    run, world = trained()
    before, one = world.digest(), decide(world.surgeon.architecture, units=1, groups=1)
    assert sum(len(target.channel_indices) for target in one.channels) == 1
    outcome = run.apply(one, world.surgeon, told(0.9, 0.89))
    assert (outcome.result, outcome.detail.count("with")) == ("refused", 1)
    assert world.digest() == before


def test_a_single_layer_is_judged_by_its_trigger() -> None:
    run, world = trained()
    layer = decide(world.surgeon.architecture, units=0, layers=("blocks.2",))
    assert run.apply(layer, world.surgeon, told(0.9, 0.87)).result == "applied"
