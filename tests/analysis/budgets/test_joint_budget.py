"""A budget over several levels: what they cut together is what it takes, and no more."""

from __future__ import annotations

from dataclasses import replace

import head_networks
import joint_networks
import pytest
from networks import settings as loose

from elesh import analyze
from leyline import (
    AnalysisParameters,
    Budget,
    CheckpointBundle,
    GateResult,
    InvalidField,
    LatencyTable,
    LayerLatency,
    Level,
    StructuralPruningDecision,
)

BOTH = (Level.CHANNEL, Level.HEAD)


def asked(
    budget: Budget, levels: tuple[Level, ...], **replaced: object
) -> tuple[CheckpointBundle, StructuralPruningDecision]:
    bundle = joint_networks.checkpoint(
        levels=levels, parameters=AnalysisParameters(budget=budget), **replaced
    )
    return bundle, analyze(bundle, joint_networks.settings())


def gate_of(decision: StructuralPruningDecision, name: str) -> GateResult:
    (found,) = [gate for gate in decision.safety.gates if gate.name == name]
    return found


@pytest.mark.parametrize("resource", ["parameters", "macs"])
def test_heads_alone_keep_to_a_budget(resource: str) -> None:
    architecture = joint_networks.architecture()
    _, decision = asked(Budget(resource=resource, at_most=0.95), (Level.HEAD,))
    after = architecture.without(decision.units)
    before = getattr(architecture, resource)
    assert decision.attention_heads
    assert not decision.channels
    assert getattr(after, resource) <= 0.95 * before
    assert gate_of(decision, "budget").measured == getattr(after, resource) / before
    free = analyze(joint_networks.checkpoint(levels=(Level.HEAD,)), joint_networks.settings())
    assert 0 < sum(map(len, decision.units.values())) < sum(map(len, free.units.values()))


@pytest.mark.parametrize("gates", [True, False], ids=["one kind of costs", "two kinds"])
def test_channels_and_heads_share_one_budget(gates: bool) -> None:
    more = {} if gates else {"gates": {}}
    bundle, decision = asked(Budget(resource="parameters", at_most=0.9), BOTH, **more)
    free = analyze(joint_networks.checkpoint(levels=BOTH, **more), joint_networks.settings())
    assert decision.approved_for_application, decision.rejection_reason
    before = bundle.architecture.parameters
    after = bundle.architecture.without(decision.units).parameters
    assert after <= 0.9 * before < after + _dearest_unit(), "met, and not by a unit too many"
    assert gate_of(decision, "joint.budget").measured == after / before
    assert decision.statistics.parameters_after == after
    for name, units in decision.units.items():
        assert set(units) <= set(free.units.get(name, ())) or not gates
    assert any("the budget is met without them" in part.reason for part in decision.levels)
    spared = [s.reason for t in (*decision.channels, *decision.attention_heads) for s in t.spared]
    assert "budget" in spared or not gates


def _dearest_unit() -> int:
    """Parameters of the largest unit: a head."""
    return 4 * joint_networks.WIDTH * 16


def test_what_a_whole_layer_saves_counts_towards_the_budget() -> None:
    levels = (*BOTH, Level.LAYER)
    bundle, decision = asked(Budget(resource="macs", at_most=0.98), levels)
    assert [target.layer_name for target in decision.layers] == ["b4"]
    assert not decision.units, "the layer alone saves more than a fiftieth"
    before = bundle.architecture.macs
    assert decision.statistics.macs_after <= 0.98 * before
    assert gate_of(decision, "joint.budget").measured == decision.statistics.macs_after / before


def test_latencies_of_a_layer_that_goes_are_not_counted() -> None:
    architecture = joint_networks.architecture()
    rows = tuple(
        LayerLatency(layer=f"b{i}.up", outputs=(1, joint_networks.HIDDEN), seconds=(0.1, 1.0))
        for i in range(joint_networks.BLOCKS)
    )
    table = LatencyTable(device="test", batch=1, total_seconds=12.0, layers=rows)
    budget = Budget(resource="latency", at_most=0.9, latency=table)
    _, decision = asked(budget, (*BOTH, Level.LAYER))
    hidden = joint_networks.HIDDEN
    left = sum(
        0.1 + 0.9 * (hidden - len(decision.units.get(f"b{i}.up", ())) - 1) / (hidden - 1)
        for i in range(joint_networks.BLOCKS)
        if f"b{i}" not in {target.layer_name for target in decision.layers}
    )
    assert gate_of(decision, "joint.budget").measured == pytest.approx((left + 2.0) / 12.0)
    assert not any(architecture.group[name].level is Level.HEAD for name in decision.units)


def test_a_budget_for_layers_alone_is_refused_by_name() -> None:
    with pytest.raises(InvalidField, match=r"parameters\.budget: expected a level that can be"):
        asked(Budget(resource="macs", at_most=0.9), (Level.LAYER,))


def test_a_head_shard_with_a_budget_is_refused_by_name() -> None:
    from elesh.analysis import analyze_level

    bundle = head_networks.checkpoint(head_networks.transformer(8, 8))
    wanted = AnalysisParameters(budget=Budget(resource="macs", at_most=0.9))
    with pytest.raises(InvalidField, match="shard: expected none with a budget"):
        analyze_level(replace(bundle, parameters=wanted), loose(), Level.HEAD, shard=["layer0"])
