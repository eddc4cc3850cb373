"""Explanations: everything that goes or was spared near the cut is a row with its reason."""

from __future__ import annotations

from networks import bundle, chain, settings

from elesh import analyze
from elesh.analysis import explain
from leyline import AnalysisParameters


def test_every_removed_and_spared_channel_is_a_row() -> None:
    checkpoint = bundle(chain((64, 64)), epoch=120)
    decision = analyze(checkpoint, settings())
    explanation = explain(decision)
    assert dict(explanation.figures)["outcome"] == decision.safety.outcome
    rows = explanation.units
    removed = {(row.group, row.unit) for row in rows if row.verdict == "removed"}
    assert removed == {(name, unit) for name, units in decision.units.items() for unit in units}
    spared = {(row.group, row.unit) for row in rows if row.verdict == "spared"}
    assert spared == {(t.layer_name, s.index) for t in decision.channels for s in t.spared}
    assert spared
    assert all(row.reason and row.single_removal is None for row in rows)


def test_with_the_bundle_each_row_shows_its_own_statistics() -> None:
    checkpoint = bundle(chain((64, 64)), epoch=120)
    row = explain(analyze(checkpoint, settings()), checkpoint).units[0]
    data, gate = checkpoint.channels[row.group], checkpoint.gates[row.group]
    assert row.taylor == float(data.taylor_importance[row.unit])
    assert row.magnitude == float(data.magnitude_importance[row.unit])
    assert row.frequency == float(data.activation_frequency[row.unit])
    rise = -float(gate.first_order[row.unit]) + float(gate.second_order[row.unit]) / 2
    assert row.single_removal == rise
    assert row.original == row.unit


def test_a_group_at_its_minimum_says_so() -> None:
    checkpoint = bundle(chain((17, 200)), epoch=120, gates=False)
    weak = checkpoint.channels["g0"]
    for name in ("taylor_importance", "magnitude_importance", "activation_frequency"):
        getattr(weak, name)[1:] *= 0.01
    rows = explain(analyze(checkpoint, settings())).units
    assert [row.verdict for row in rows if row.group == "g0"].count("removed") == 1
    reasons = {row.reason for row in rows if row.group == "g0" and row.verdict == "spared"}
    assert reasons == {"the group has reached the units it must keep"}


def test_what_was_asked_and_not_met_is_said() -> None:
    checkpoint = bundle(
        chain((64, 8)), epoch=10, parameters=AnalysisParameters(ignored_layers=("g0",))
    )
    explanation = explain(analyze(checkpoint, settings()))
    assert not explanation.approved
    assert "preparation" in explanation.reason
    assert [name for name, _ in explanation.ignored] == ["g0", "g1"]
    assert {gate.name for gate in explanation.gates if not gate.passed} == {"phase"}
    assert "outcome" not in dict(explanation.figures)  # what is rejected has a reason instead
