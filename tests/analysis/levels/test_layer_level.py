"""The layer level: five conditions at their limits, the quota, the order, gates and reasons."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layer_networks import bundle, figures, network, residual

from elesh import Settings, analyze
from elesh.analysis import explain
from elesh.analysis.levels.layers import architecture_impact
from elesh.analysis.pruning_set.draft import loss_increase
from elesh.safety import BreakerStatus
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    InvalidField,
    Level,
    Outcome,
    PerformanceRequirements,
    PrunedArchitecture,
    StructuralPruningDecision,
    encode,
)

AGGRESSIVE = 100


def decide(checkpoint: CheckpointBundle, **kwargs: Any) -> StructuralPruningDecision:
    return analyze(checkpoint, level=Level.LAYER, **kwargs)


def chosen(decision: StructuralPruningDecision) -> list[str]:
    return [target.layer_name for target in decision.layers]


def test_a_layer_that_meets_all_conditions_goes_and_the_figures_are_exact() -> None:
    checkpoint = network()
    decision = decide(checkpoint)
    assert chosen(decision) == ["b4"]
    assert decision.approved_for_application
    assert decision.safety.outcome is Outcome.CONDITIONAL_GO
    assert decision.key.level is Level.LAYER
    (target,) = decision.layers
    assert target.importance == pytest.approx(0.0005)
    assert (target.skip_strategy, target.skip_potential) == ("residual", 0.95)
    assert target.architecture_impact == pytest.approx(0.4 * 0.25 + 0.4 * 0.5 + 0.2 * 0.1)
    s = decision.statistics
    assert (s.parameters_before, s.parameters_after) == (21 * 16, 19 * 16)
    assert (s.macs_before, s.macs_after) == (2 * 21 * 16, 2 * 19 * 16)
    assert (s.channels_before, s.channels_after, s.channels_original) == (10, 9, 10)
    assert s.predicted_loss_rise == pytest.approx(-0.0001 + 0.0002)
    assert s.samples == 64
    p = checkpoint.layers["b4"].projections.astype(np.float64)
    energies = [np.mean(x.projections.astype(np.float64) ** 2) for x in checkpoint.layers.values()]
    assert s.predicted_shift == pytest.approx(np.mean(p**2) / max(energies), rel=1e-6)
    assert {gate.name for gate in decision.safety.gates} == {
        "breaker", "phase", "statistics", "cumulative_limit", "minimum_layers", "structure",
        "gradient_isolation", "noise", "predicted_shift", "requirements", "predicted_loss",
    }  # fmt: skip


# Every limit itself does not pass, the next number does. float32: limits that it holds exactly.
@pytest.mark.parametrize(
    ("field", "limit", "inside", "told"),
    [
        ("taylor", 0.001, -1, "Taylor importance"),
        ("gradient_flow", 0.5, 1, "gradient flow"),
        ("similarity", 0.95, 1, "input/output similarity"),
    ],
)
def test_conditions_on_statistics_hold_strictly_at_their_limits(
    field: str, limit: float, inside: int, told: str
) -> None:
    at = float(np.float32(limit))
    analysis = {"taylor_threshold": 0.001, "similarity_threshold": 0.95}
    if field != "gradient_flow":
        analysis[f"{field}_threshold"] = at
    settings = Settings(structured_pruning={"layer_analysis": analysis})
    data = [figures(f"b{i}", taylor=0.5) for i in range(9)]
    better = float(np.nextafter(np.float32(at), np.float32(at + inside)))
    for value, goes in ((at, False), (better, True)):
        layer = figures("b9", 0.01, **{field: value})
        decision = decide(bundle(residual(10), [*data, layer]), settings=settings)
        assert (chosen(decision) == ["b9"]) is goes
        if not goes:
            reason = dict(decision.ignored)["b9"]
            assert reason.startswith(told)
            assert ";" not in reason


@pytest.mark.parametrize(("potential", "goes"), [(0.8, False), (0.8000001, True), (0.4, False)])
def test_the_skip_potential_must_be_above_its_limit(potential: float, goes: bool) -> None:
    data = [figures(f"b{i}", 0.01) for i in range(10)]
    decision = decide(bundle(residual(10, skip_potential=potential), data))
    assert bool(chosen(decision)) is goes


def test_the_architecture_impact_must_be_below_a_half() -> None:
    # Linear, one of ten groups: .2 + .02 + .4 depth; .7 depth makes it just one half.
    for depth, goes in ((0.7000001, False), (0.69, True)):
        data = [figures(f"b{i}", 0.01) for i in range(10)]
        decision = decide(bundle(residual(10, depth=depth), data))
        assert bool(chosen(decision)) is goes
        assert goes or "architecture impact" in dict(decision.ignored)["b0"]


@pytest.mark.parametrize(
    ("kind", "expected"), [("attention", 0.8), ("conv", 0.6), ("linear", 0.5), ("other", 0.3)]
)
def test_the_impact_is_the_documents_formula(kind: str, expected: float) -> None:
    architecture = residual(4, kind=kind, depth=0.5)
    assert architecture_impact(architecture)["b0"] == pytest.approx(
        0.4 * 0.5 + 0.4 * expected + 0.2 * 1 / 4
    )


def everything_goes(count: int, **more: Any) -> CheckpointBundle:
    data = [figures(f"b{i}", 0.001, taylor=0.0001 * (1 + i % 7)) for i in range(count)]
    return bundle(residual(count), data, **more)


@pytest.mark.parametrize(
    ("count", "quota"), [(2, 0), (3, 0), (4, 0), (5, 1), (9, 1), (10, 2), (14, 2), (15, 3)]
)
def test_at_most_a_fifth_of_the_layers_goes(count: int, quota: int) -> None:
    decision = decide(everything_goes(count))
    assert (len(decision.layers), decision.statistics.quota) == (quota, quota)
    beyond = [reason for _, reason in decision.ignored]
    assert len(beyond) == count - quota
    assert all(f"the quota is {quota}" in reason for reason in beyond)


def test_at_least_three_layers_are_left_whatever_the_share() -> None:
    settings = Settings(structured_pruning={"layer_analysis": {"max_layer_removal_ratio": 1.0}})
    for count, left in ((2, 2), (3, 3), (4, 3), (10, 3)):
        decision = decide(everything_goes(count), settings=settings)
        assert count - len(decision.layers) == left


def test_what_is_gone_counts_against_the_original_layers() -> None:
    architecture = residual(10).without_layers(["b0"])
    data = [figures(f"b{i}", 0.001) for i in range(1, 10)]
    decision = decide(bundle(architecture, data))
    assert len(decision.layers) == 1
    assert decision.statistics.cumulative_ratio == pytest.approx(0.2)
    assert "b0" not in dict(decision.ignored)
    full = architecture.without_layers(["b1"])
    decision = decide(bundle(full, data[1:]))
    assert not decision.layers
    assert "quota 0 (2 of 10 original layers" in decision.rejection_reason


def test_a_request_can_ask_for_less_and_ignore_layers() -> None:
    less = AnalysisParameters(target_ratio=0.1)
    assert len(decide(everything_goes(10, parameters=less)).layers) == 1
    ignoring = AnalysisParameters(ignored_layers=("b4", "b3.up"))
    decision = decide(network(cheap=(3, 4, 5), parameters=ignoring))
    assert chosen(decision) == ["b5"]
    assert "ignored by the request: b3.up" in dict(decision.ignored)["b3"]
    with pytest.raises(InvalidField, match="nowhere"):
        decide(network(parameters=AnalysisParameters(ignored_layers=("nowhere",))))


@pytest.mark.parametrize("epoch", [1, 30, 60, 90, 121])
def test_before_and_after_the_aggressive_phase_no_layer_goes(epoch: int) -> None:
    decision = decide(network(epoch=epoch))
    assert not decision.layers
    assert not decision.approved_for_application
    assert decision.rejection_reason.startswith("phase: ")
    assert "aggressive phase only" in dict(decision.ignored)["b4"]


@pytest.mark.parametrize("epoch", [91, 120])
def test_the_aggressive_phase_is_whole(epoch: int) -> None:
    assert chosen(decide(network(epoch=epoch))) == ["b4"]


def test_the_order_is_the_documents() -> None:
    data = [figures(f"b{i}", 0.001) for i in range(10)]
    data[7] = figures("b7", 0.001, similarity=0.999)
    data[2] = figures("b2", 0.001, taylor=0.0001)
    data[5] = figures("b5", 0.001, taylor=0.0009, similarity=0.9905)
    # .3 (1 - similarity) outweighs .3 taylor: b7, then b5 (-.00015 + .00012), then b2 (-.00012).
    settings = Settings(structured_pruning={"layer_analysis": {"max_layer_removal_ratio": 0.3}})
    checkpoint = bundle(residual(10), data)
    order = {x.layer_name: 0.3 * x.taylor[0] + 0.3 * (1 - x.similarity[0]) for x in data}
    assert chosen(decide(checkpoint, settings=settings)) == sorted(order, key=order.__getitem__)[:3]


@given(st.integers(0, 10**6), st.integers(5, 12))
def test_the_order_of_the_blocks_does_not_matter(seed: int, count: int) -> None:
    rng = random.Random(seed)
    data = [
        figures(
            f"b{i}",
            0.01,
            taylor=rng.choice([0.0001, 0.0005, 0.01]),
            similarity=rng.choice([0.96, 0.99, 0.5]),
        )
        for i in range(count)
    ]
    architecture = residual(count)
    decisions = []
    for _ in range(2):
        blocks = list(architecture.blocks)
        shuffled = PrunedArchitecture.build(
            architecture.tensors, architecture.layers, architecture.groups, blocks=tuple(blocks)
        )
        rng.shuffle(blocks)
        architecture = PrunedArchitecture.build(
            architecture.tensors, architecture.layers, architecture.groups, blocks=tuple(blocks)
        )
        decisions.append(decide(bundle(shuffled, data)))
        rng.shuffle(data)
    one, two = decisions
    assert one.layers == two.layers
    assert one.statistics == two.statistics
    assert dict(one.ignored) == dict(two.ignored)
    assert one.safety == two.safety
    low = [figures_ for figures_ in data if figures_.layer_name in chosen(one)]
    assert all(x.taylor[0] < 0.001 and x.similarity[0] > 0.95 for x in low)
    assert len(one.layers) <= count // 5


def gate(decision: StructuralPruningDecision, name: str) -> Any:
    return next(gate for gate in decision.safety.gates if gate.name == name)


def test_layers_that_move_the_outputs_together_are_rejected_together() -> None:
    # Alone each moves them by .09 of their mean square; in step, two by .36.
    data = [figures(f"b{i}", taylor=0.5) for i in range(8)]
    step = figures("b8", 0.3)
    data += [step, figures("b9", 0.3).model_copy(update={"projections": step.projections})]
    decision = decide(bundle(residual(10), data))
    assert chosen(decision) == ["b8", "b9"]
    assert not decision.approved_for_application
    assert "predicted_shift" in decision.rejection_reason
    assert gate(decision, "predicted_shift").measured > 0.2
    against = data[-1].model_copy(update={"projections": -step.projections})
    decision = decide(bundle(residual(10), [*data[:-1], against]))
    assert decision.statistics.predicted_shift == pytest.approx(0, abs=1e-9)
    assert decision.approved_for_application, decision.rejection_reason


def test_a_choice_that_chance_would_match_is_noise() -> None:
    decision = decide(everything_goes(10))
    assert not gate(decision, "noise").passed
    assert gate(decide(network()), "noise").passed


SHORTEN = AnalysisParameters(failing_gate="shorten")


def test_where_a_failing_gate_shortens_layers_go_by_what_they_move() -> None:
    """By the design's rank b7 goes first, which moves the outputs more than a layer at random."""
    data = [figures(f"b{i}", 0.5) for i in range(10)]
    data[7] = figures("b7", 0.7, similarity=0.999)
    data[2] = figures("b2", 0.001)
    settings = Settings(structured_pruning={"layer_analysis": {"max_layer_removal_ratio": 0.1}})
    refused = decide(bundle(residual(10), data), settings=settings)
    assert chosen(refused) == ["b7"]
    assert not gate(refused, "noise").passed
    decision = decide(bundle(residual(10), data, parameters=SHORTEN), settings=settings)
    assert chosen(decision) == ["b2"]
    assert decision.approved_for_application, decision.rejection_reason


def test_as_many_layers_go_as_the_gates_of_the_prediction_let_pass() -> None:
    data = [figures(f"b{i}", taylor=0.5) for i in range(8)]
    step = figures("b8", 0.3)
    data += [step, figures("b9", 0.31).model_copy(update={"projections": 1.01 * step.projections})]
    decision = decide(bundle(residual(10), data, parameters=SHORTEN))
    assert chosen(decision) == ["b8"]
    assert decision.approved_for_application, decision.rejection_reason
    assert decision.statistics.quota == 2
    assert "1 of the 2 layers that may go stay" in decision.statistics.shortfall
    assert "1 of the 2 layers" in dict(decision.ignored)["b9"]


def test_layers_of_which_none_is_better_than_chance_are_refused_whole() -> None:
    decision = decide(everything_goes(10, parameters=SHORTEN))
    assert len(decision.layers) == 2
    assert not decision.approved_for_application
    assert decision.rejection_reason.startswith("noise: ")


def test_what_chose_a_layer_does_not_also_judge_it() -> None:
    """Each half of the samples chooses another layer, which the other half shows to move more."""
    even = np.arange(64) % 2 == 0
    data = [figures(f"b{i}", taylor=0.5) for i in range(3)]
    data += [
        figures(f"b{i}").model_copy(
            update={"projections": np.where(even == first, 0.0, 1.0).astype(np.float32)}
        )
        for i, first in ((3, True), (4, False))
    ]
    decision = decide(bundle(residual(5), data, parameters=SHORTEN))
    assert len(decision.layers) == 1
    assert decision.statistics.predicted_shift == pytest.approx(1 / 1.0, rel=0.5)
    assert not decision.approved_for_application


def test_an_open_breaker_and_unmet_requirements_reject() -> None:
    broken = decide(network(), breakers={Level.LAYER: BreakerStatus("open", 3, "three in a row")})
    assert "breaker" in broken.rejection_reason
    asked = PerformanceRequirements(min_parameters_removed=0.5)
    assert "min_parameters_removed" in decide(network(requirements=asked)).rejection_reason


def test_without_statistics_nothing_goes_and_every_layer_says_so() -> None:
    decision = decide(bundle(residual(6), []))
    assert {reason for _, reason in decision.ignored} == {"no layer statistics"}
    assert "statistics" in decision.rejection_reason
    plain = PrunedArchitecture.build(
        *(getattr(residual(4), part) for part in ("tensors", "layers", "groups"))
    )
    assert "no layer of this network can be removed" in decide(bundle(plain, [])).rejection_reason


def test_a_layer_of_host_and_seed_tensors_stays() -> None:
    plain = residual(5)
    tensors = tuple(
        t.model_copy(update={"owner": "seed"}) if t.path == "b0.up.weight" else t
        for t in plain.tensors
    )
    mixed = PrunedArchitecture.build(tensors, plain.layers, plain.groups, blocks=plain.blocks)
    decision = decide(bundle(mixed, [figures(f"b{i}", 0.01) for i in range(5)]))
    assert chosen(decision) != ["b0"]
    assert "gradient isolation" in dict(decision.ignored)["b0"]


def test_the_same_bundle_gives_the_same_bytes_also_after_a_round_trip(tmp_path: Any) -> None:
    checkpoint = network()
    again = CheckpointBundle.load(checkpoint.save(tmp_path))
    assert again.architecture == checkpoint.architecture
    assert encode(decide(again)) == encode(decide(checkpoint))


def test_a_layers_loss_rise_has_the_error_bar_that_was_measured() -> None:
    told = figures("b4", 0.01, removal_rise=0.0003, removal_error=0.00004)
    others = [figures(f"b{i}", taylor=0.5) for i in range(10) if i != 4]
    decision = analyze(bundle(residual(10), [told, *others]), level=Level.LAYER)
    (target,) = decision.layers
    assert target.predicted_loss_rise == pytest.approx(0.0003)
    assert target.predicted_loss_rise_error == pytest.approx(0.00004)
    (row,) = explain(decision).targets
    assert row.loss_rise_error == target.predicted_loss_rise_error
    without = analyze(bundle(residual(10), [figures("b4", 0.01), *others]), level=Level.LAYER)
    assert without.layers[0].predicted_loss_rise == pytest.approx(-0.0001 + 0.0002)
    assert without.layers[0].predicted_loss_rise_error is None


def test_the_errors_of_layers_that_go_together_add_in_squares() -> None:
    errors = {"b2": 0.003, "b4": 0.004}
    data = [figures(name, 0.01, removal_rise=0.1, removal_error=e) for name, e in errors.items()]
    rise = loss_increase(bundle(residual(10), data), {}, list(errors))
    assert rise is not None
    assert rise.mean == pytest.approx(0.2)
    assert rise.error == pytest.approx(0.005)
