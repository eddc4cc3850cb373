"""Budgets: resources follow exactly from sizes, and the cut that fits them is cheap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import bundle, chain
from networks import settings as loose

from elesh import analyze
from elesh.analysis.budgets.knapsack import Curve, fit_budget, resource_model
from leyline import AnalysisParameters, Budget, InvalidField, LatencyTable, LayerLatency

COUNTED = ("parameters", "macs")


@given(sizes=st.lists(st.integers(2, 9), min_size=2, max_size=4), data=st.data())
def test_the_model_counts_what_the_architecture_counts(
    sizes: list[int], data: st.DataObject
) -> None:
    architecture = chain(sizes)
    lost = {
        group.name: data.draw(st.integers(0, group.size - 1), label=group.name)
        for group in architecture.groups
        if group.prunable
    }
    after = architecture.without({name: range(count) for name, count in lost.items()})
    for resource in COUNTED:
        model = resource_model(architecture, Budget(resource=resource, at_most=0.5))
        assert model.total({}) == getattr(architecture, resource)
        assert model.total(lost) == getattr(after, resource)
    name = next(iter(lost))
    ((_, saving),) = model.savings({**lost, name: 0}, name, [lost[name]])
    assert saving == model.total({**lost, name: 0}) - model.total(lost)


def test_a_weight_of_several_layers_counts_as_often_as_they_multiply_it() -> None:
    architecture = chain([4, 6, 5])
    shared = architecture.layers[1].model_copy(update={"name": "again", "positions": 7})
    architecture = architecture.model_copy(update={"layers": (*architecture.layers, shared)})
    model = resource_model(architecture, Budget(resource="macs", at_most=0.5))
    assert model.total({}) == architecture.macs
    lost = {next(group.name for group in architecture.groups if group.prunable): 1}
    after = architecture.without({name: range(count) for name, count in lost.items()})
    assert model.total(lost) == after.macs


def best(model, curves, target):  # type: ignore[no-untyped-def]
    """By trying everything: the least damage that fits."""
    found = float("inf")
    for counts in itertools.product(*(range(len(c.costs) + 1) for c in curves.values())):
        lost = dict(zip(curves, counts, strict=True))
        if model.total(lost) <= target:
            cost = sum(sum(c.costs[:n]) for c, n in zip(curves.values(), counts, strict=True))
            found = min(found, cost)
    return found


@given(seed=st.integers(0, 10**6), share=st.floats(0.5, 0.95))
def test_the_budget_is_met_where_it_can_be_and_near_the_best_cut(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    architecture = chain([6, 6, 6])
    names = [g.name for g in architecture.groups if g.prunable]
    curves = {n: Curve(sorted(random.random(5)), 6) for n in names}
    model = resource_model(architecture, Budget(resource="macs", at_most=share))
    target = share * model.total({})
    fit = fit_budget(model, curves, target)
    optimum = best(model, curves, target)
    if optimum == float("inf"):
        assert fit.lost == dict.fromkeys(curves, 5)
        return
    assert fit.after == model.total(fit.lost) <= target
    damage = sum(sum(curves[name].costs[:count]) for name, count in fit.lost.items())
    # Greedy overshoots by less than one step of the most expensive unit that it took.
    assert damage <= optimum + 2 * max(max(c.costs) for c in curves.values())


def test_steps_that_save_nothing_are_not_taken_and_stairs_are_climbed_whole() -> None:
    architecture = chain([32, 32])
    group = next(g for g in architecture.groups if g.prunable)
    layers = {x.name: x for x in architecture.layers if x.weight}
    name = next(n for n in layers if n in group.layers)
    size = architecture.tensor[layers[name].weight].shape[0]
    stairs = LayerLatency(
        layer=name, outputs=(size - 16, size - 9, size - 8, size), seconds=(1.0, 1.0, 2.0, 2.0)
    )
    table = LatencyTable(device="test", batch=1, total_seconds=3.0, layers=(stairs,))
    budget = Budget(resource="latency", at_most=0.7, latency=table)
    model = resource_model(architecture, budget)
    curves = {g.name: Curve([0.1] * 20, g.size) for g in architecture.groups if g.prunable}
    fit = fit_budget(model, curves, 0.7 * model.total({}))
    assert set(fit.lost) == {group.name}
    assert 9 <= fit.lost[group.name] <= 16
    assert fit.after == pytest.approx(2.0)
    assert set(fit.idle) == curves.keys()


@pytest.mark.parametrize("resource", COUNTED)
def test_a_decision_keeps_to_its_budget_and_says_how_far_it_got(resource: str) -> None:
    architecture = chain([64, 64, 64])
    asked = AnalysisParameters(budget=Budget(resource=resource, at_most=0.93))
    decision = analyze(bundle(architecture, epoch=120, parameters=asked), loose())
    after = architecture.without(decision.units)
    assert getattr(after, resource) <= 0.93 * getattr(architecture, resource)
    (gate,) = [g for g in decision.safety.gates if g.name == "budget"]
    assert gate.measured == getattr(after, resource) / getattr(architecture, resource)
    assert "reached" in gate.detail
    assert decision.statistics.channels_after < decision.statistics.channels_before
    free = analyze(bundle(architecture, epoch=120), loose())
    assert sum(map(len, decision.units.values())) < sum(map(len, free.units.values()))


def test_a_budget_out_of_reach_is_said() -> None:
    asked = AnalysisParameters(budget=Budget(resource="macs", at_most=0.1))
    decision = analyze(bundle(chain([64, 64]), epoch=120, parameters=asked), loose())
    (gate,) = [g for g in decision.safety.gates if g.name == "budget"]
    assert "not reached" in gate.detail


def test_a_table_of_another_network_is_refused_by_name() -> None:
    table = LatencyTable(
        device="x",
        batch=1,
        total_seconds=1,
        layers=(LayerLatency(layer="elsewhere", outputs=(1,), seconds=(1,)),),
    )
    asked = AnalysisParameters(budget=Budget(resource="latency", at_most=0.5, latency=table))
    with pytest.raises(InvalidField, match="elsewhere"):
        analyze(bundle(chain([64, 64]), epoch=120, parameters=asked), loose())
