"""A budget of the original network: the same amount at every checkpoint, no unit too many."""

from __future__ import annotations

import numpy as np
import pytest
from networks import chain

from elesh.analysis.budgets.fitting import (
    _after_equal_shares,
    amount_of,
    fit_all,
    likely_missed,
    out_of_reach,
)
from elesh.analysis.budgets.knapsack import Curve, resource_model
from leyline import Budget, PrunedArchitecture


def test_the_amount_does_not_depend_on_what_was_cut_before() -> None:
    whole = chain([8, 8, 8])
    groups = [group for group in whole.groups if group.prunable]
    cut = whole.without({groups[0].name: range(3)})
    for resource in ("macs", "parameters"):
        budget = Budget(resource=resource, at_most=0.5, of="original")
        for now in (whole, cut):
            assert amount_of(budget, now, resource_model(now, budget)) == getattr(whole, resource)
        given = budget.model_copy(update={"original": 1000.0})
        assert amount_of(given, cut, resource_model(cut, given)) == 1000.0
        present = Budget(resource=resource, at_most=0.5)
        assert amount_of(present, cut, resource_model(cut, present)) == getattr(cut, resource)


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_no_group_loses_a_unit_that_the_budget_does_not_need(seed: int, multiple: int) -> None:
    random = np.random.default_rng(seed)
    architecture = chain([12, 12, 12])
    names = [g.name for g in architecture.groups if g.prunable]
    curves = {n: Curve(sorted(random.random(10)), 12, multiple) for n in names}
    budget = Budget(resource="macs", at_most=float(random.uniform(0.4, 0.9)), of="original")
    model = resource_model(architecture, budget)
    target = budget.at_most * architecture.macs
    (fit,) = fit_all(architecture, [budget], curves)
    assert fit.after <= target
    assert all((12 - count) % multiple == 0 for count in fit.lost.values())
    for name, count in fit.lost.items():
        assert model.total({**fit.lost, name: count - multiple}) > target, name


def test_several_budgets_hold_together() -> None:
    architecture = chain([12, 12, 12])
    curves = {
        g.name: Curve([1.0, 2, 3, 4, 5, 6, 7, 8], 12) for g in architecture.groups if g.prunable
    }
    budgets = [
        Budget(resource="macs", at_most=0.8, of="original"),
        Budget(resource="parameters", at_most=0.5, of="original"),
    ]
    lost = fit_all(architecture, budgets, curves)[-1].lost
    after = architecture.without({name: range(count) for name, count in lost.items()})
    assert after.macs <= 0.8 * architecture.macs
    assert after.parameters <= 0.5 * architecture.parameters


@pytest.mark.parametrize("seed", [4, 23, 24, 26, 40, 47])
def test_no_group_loses_a_unit_that_several_budgets_together_do_not_need(seed: int) -> None:
    """What goes for the second saves some of the first, too."""
    random = np.random.default_rng(seed)
    architecture = chain([12, 40, 12, 30])
    groups = [group for group in architecture.groups if group.prunable]
    curves = {g.name: Curve(sorted(random.random() * random.random(10)), g.size) for g in groups}
    budgets = [
        Budget(resource=resource, at_most=float(random.uniform(0.6, 0.9)), of="original")
        for resource in ("macs", "parameters")
    ]
    lost = fit_all(architecture, budgets, curves)[-1].lost

    def met(lost: dict[str, int]) -> bool:
        after = architecture.without({name: range(count) for name, count in lost.items() if count})
        return all(
            getattr(after, b.resource) <= b.at_most * getattr(architecture, b.resource)
            for b in budgets
        )

    assert met(dict(lost))
    for name, count in lost.items():
        assert not met({**lost, name: count - 1}), name


def test_what_the_limits_cannot_reach_is_said_with_what_would_help() -> None:
    architecture = chain([12, 12, 12])
    groups = [g for g in architecture.groups if g.prunable]
    half = [Budget(resource="macs", at_most=0.5, of="original")]
    few = out_of_reach(architecture, half, groups, units=3, minimum=1)
    assert "macs 0.5 is out of reach" in few
    assert "raise removed_at_most" in few
    assert not out_of_reach(architecture, half, groups, units=30, minimum=1)
    wide = out_of_reach(architecture, half, groups, units=30, minimum=11)
    assert "groups keep their minimum" in wide


def test_budgets_that_each_but_not_all_together_are_within_reach_are_said() -> None:
    """Convolutions take the multiply-accumulates, the classifier the parameters."""
    architecture = chain([4, 60, 60, 4, 16], classes=400)
    groups = [g for g in architecture.groups if g.prunable]
    both = [Budget(resource=r, at_most=0.6, of="original") for r in ("macs", "parameters")]

    def least(budgets: list[Budget]) -> int:
        return next(
            n
            for n in range(100)
            if not out_of_reach(architecture, budgets, groups, units=n, minimum=1)
        )

    alone = max(least([budget]) for budget in both)
    why = out_of_reach(architecture, both, groups, units=alone, minimum=1)
    assert "macs 0.6 and parameters 0.6 are each within reach" in why
    assert "raise removed_at_most" in why
    assert least(both) > alone


def test_what_only_the_best_choice_of_units_reaches_is_said_to_be_unlikely() -> None:
    architecture = chain([12, 40, 40, 12])
    groups = [g for g in architecture.groups if g.prunable]
    half = [Budget(resource="macs", at_most=0.5, of="original")]
    sizes, least = sum(group.size for group in groups), 0
    while out_of_reach(architecture, half, groups, units=least, minimum=1):
        least += 1
    why = likely_missed(architecture, half, groups, units=least, minimum=1)
    assert f"the {least} units that the limit leaves" in why
    needed = int(why.split("some ")[1].split()[0])
    assert least < needed < sizes
    lost = {g.name: range(int(needed / sizes * g.size)) for g in groups}
    assert architecture.without(lost).macs <= 0.5 * architecture.macs, "so many are enough"
    assert not likely_missed(architecture, half, groups, units=needed, minimum=1)
    assert "no more units help" in likely_missed(architecture, half, groups, units=5, minimum=38)


def with_a_cheap_group(seed: int) -> tuple[PrunedArchitecture, dict[str, Curve]]:
    """The last group's units cost next to nothing, and save next to nothing."""
    random = np.random.default_rng(seed)
    architecture = chain([12, 40, 40, 12, 64])
    groups = [group for group in architecture.groups if group.prunable]
    curves = {g.name: Curve(sorted(random.random(g.size - 2)), g.size) for g in groups}
    last = groups[-1].name
    curves[last] = Curve([1e-4 * cost for cost in curves[last].costs], groups[-1].size)
    return architecture, curves


@pytest.mark.parametrize("seed", range(6))
def test_where_the_limit_leaves_few_units_those_go_that_save_enough(seed: int) -> None:
    architecture, curves = with_a_cheap_group(seed)
    budget = Budget(resource="macs", at_most=0.3, of="original")
    model, few = resource_model(architecture, budget), 40
    alike = _after_equal_shares(model, curves, few)
    assert alike > 0.3 * architecture.macs
    (thoughtless,) = fit_all(architecture, [budget], curves, few)
    (fit,) = fit_all(architecture, [budget], curves, few, in_all=few)
    assert sum(fit.lost.values()) <= few
    assert fit.after <= alike < thoughtless.after
    # A part of them now is a part of the same cut.
    (now,) = fit_all(architecture, [budget], curves, few // 4, in_all=few)
    assert 0 < sum(now.lost.values()) <= few // 4
    assert all(count <= fit.lost.get(name, 0) for name, count in now.lost.items())


@pytest.mark.parametrize("seed", range(6))
def test_units_that_are_just_enough_are_not_spent_on_what_saves_nothing(seed: int) -> None:
    architecture, curves = with_a_cheap_group(seed)
    budget, few = Budget(resource="macs", at_most=0.6, of="original"), 45
    equal = _after_equal_shares(resource_model(architecture, budget), curves, few)
    assert equal < 0.6 * architecture.macs
    (thoughtless,) = fit_all(architecture, [budget], curves, few)
    (fit,) = fit_all(architecture, [budget], curves, few, in_all=few)
    assert fit.after <= 0.6 * architecture.macs < thoughtless.after


def test_where_the_limit_leaves_enough_units_the_cheapest_go() -> None:
    architecture = chain([12, 40, 40, 12])
    groups = [group for group in architecture.groups if group.prunable]
    curves = {g.name: Curve([1.0 + n] * (g.size - 2), g.size) for n, g in enumerate(groups)}
    budgets = [Budget(resource="macs", at_most=0.9, of="original")]
    plain = fit_all(architecture, budgets, curves, 10)
    assert fit_all(architecture, budgets, curves, 10, in_all=60) == plain
