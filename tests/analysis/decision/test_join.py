"""Levels become one decision: conflicts resolved, gates of all listed, gaps named."""

from __future__ import annotations

from dataclasses import replace

import joint_networks
import numpy as np
import pytest

from elesh import analyze
from elesh.analysis import JoinContext, analyze_level, join
from elesh.safety import BreakerStatus, Entry, Measured, Proposal, votes
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    GateResult,
    InvalidField,
    Level,
    LevelAnalysis,
    Outcome,
    PerformanceRequirements,
    StructuralPruningDecision,
    decode,
    encode,
)

ALL = (Level.CHANNEL, Level.HEAD, Level.LAYER)


def analyses(bundle: CheckpointBundle, settings: Settings) -> list[LevelAnalysis]:
    return [analyze_level(bundle, settings, level) for level in ALL]


@pytest.fixture(scope="module")
def bundle() -> CheckpointBundle:
    return joint_networks.checkpoint()


@pytest.fixture(scope="module")
def settings() -> Settings:
    return joint_networks.settings()


@pytest.fixture(scope="module")
def decision(bundle: CheckpointBundle, settings: Settings) -> StructuralPruningDecision:
    return join(bundle, analyses(bundle, settings), settings)


def test_several_levels_are_one_decision_with_a_joint_key(
    bundle: CheckpointBundle, settings: Settings, decision: StructuralPruningDecision
) -> None:
    assert decision.key == bundle.key(Level.JOINT)
    assert decision.approved_for_application, decision.rejection_reason
    assert decision.taken == ALL
    assert all((decision.channels, decision.attention_heads, decision.layers))
    assert encode(analyze(bundle, settings)) == encode(decision)
    assert encode(decode(StructuralPruningDecision, encode(decision))) == encode(decision)


def test_the_order_of_the_analyses_does_not_matter(
    bundle: CheckpointBundle, settings: Settings, decision: StructuralPruningDecision
) -> None:
    found = [decode(LevelAnalysis, encode(a)) for a in analyses(bundle, settings)]
    assert encode(join(bundle, found[::-1], settings)) == encode(decision)


def test_a_layer_that_goes_takes_its_own_targets_out(
    bundle: CheckpointBundle, settings: Settings, decision: StructuralPruningDecision
) -> None:
    (layer,) = [target.layer_name for target in decision.layers]
    own = joint_networks.groups_inside(layer)
    alone = analyze_level(bundle, settings, Level.CHANNEL).decision
    assert own & alone.units.keys(), "the channel level alone cuts inside the layer"
    assert not own & decision.units.keys()
    after = bundle.architecture.without(decision.units).without_layers([layer])
    assert decision.statistics.parameters_after == after.parameters
    assert decision.statistics.macs_after == after.macs
    part = decision.levels[0]
    assert "go with whole layers" in part.reason


def test_gates_of_every_level_are_listed_by_name(decision: StructuralPruningDecision) -> None:
    names = [gate.name for gate in decision.safety.gates]
    assert len(names) == len(set(names))
    for level in ALL:
        assert {f"{level}.breaker", f"{level}.phase", f"{level}.noise"} <= set(names)
    of_all = ["joint.structure", "joint.predicted_shift", "joint.requirements", "predicted_loss"]
    assert names[-4:] == of_all


def test_one_level_alone_keeps_its_own_key(bundle: CheckpointBundle, settings: Settings) -> None:
    for level in ALL:
        decision = join(bundle, [analyze_level(bundle, settings, level)], settings)
        assert decision.key == bundle.key(level)
        assert decision.levels == ()
        assert decision.safety.gates[0].name == "breaker"


def test_an_open_breaker_keeps_its_level_out_and_the_others_decide(
    bundle: CheckpointBundle, settings: Settings
) -> None:
    status = BreakerStatus("open", 3, "three in a row")
    decision = join(
        bundle, analyses(bundle, settings), settings, JoinContext(breakers={Level.HEAD: status})
    )
    assert decision.approved_for_application
    assert decision.attention_heads == ()
    assert decision.taken == (Level.CHANNEL, Level.LAYER)
    assert "three in a row" in decision.levels[1].reason
    assert BreakerStatus.of(decision)[Level.HEAD] == status
    assert votes(decision) == dict.fromkeys(ALL, "none")


def test_a_missing_level_is_named_and_the_others_decide(
    bundle: CheckpointBundle, settings: Settings
) -> None:
    found = analyses(bundle, settings)[:1]
    missing = [(Level.HEAD, "ran out of time"), (Level.LAYER, "the child died")]
    decision = join(bundle, found, settings, JoinContext(missing=missing))
    assert decision.approved_for_application
    assert decision.key.level is Level.JOINT
    parts = {part.level: (part.verdict, part.reason) for part in decision.levels}
    assert parts[Level.HEAD] == ("missing", "ran out of time")
    assert parts[Level.LAYER] == ("missing", "the child died")
    assert decision.units == found[0].decision.units


def test_without_any_analysis_there_is_no_decision(
    bundle: CheckpointBundle, settings: Settings
) -> None:
    twice = [analyze_level(bundle, settings, Level.CHANNEL)] * 2
    for found in ([], twice):
        with pytest.raises(InvalidField, match="one analysis a level"):
            join(bundle, found, settings, JoinContext(missing=[(Level.LAYER, "late")]))


def test_where_no_level_can_go_the_reasons_of_all_are_told(settings: Settings) -> None:
    bundle = joint_networks.checkpoint(epoch=10)
    decision = join(bundle, analyses(bundle, settings), settings)
    assert not decision.approved_for_application
    for level in ALL:
        assert (
            f"{level}: phase: " in decision.rejection_reason or level in decision.rejection_reason
        )


def test_levels_that_move_the_outputs_too_much_together_are_not_taken_together(
    bundle: CheckpointBundle,
) -> None:
    settings = joint_networks.settings()
    found = analyses(bundle, settings)
    shifts = [a.decision.statistics.predicted_shift or 0.0 for a in found]
    errors = [a.decision.statistics.predicted_shift_error or 0.0 for a in found]
    limit = max(s + 2 * e for s, e in zip(shifts, errors, strict=True)) * 1.01
    strict = joint_networks.settings(max_predicted_shift=limit)
    decision = join(bundle, [analyze_level(bundle, strict, level) for level in ALL], strict)
    assert decision.approved_for_application
    assert Level.CHANNEL in decision.taken
    refused = [part for part in decision.levels if part.verdict == "rejected"]
    assert refused
    assert all("joint.predicted_shift" in part.reason for part in refused)


def test_requirements_are_judged_for_the_whole_cut(settings: Settings) -> None:
    plain = joint_networks.checkpoint()
    whole = join(plain, analyses(plain, settings), settings).statistics
    share = 1 - whole.parameters_after / whole.parameters_before
    asked = replace(
        plain, requirements=PerformanceRequirements(min_parameters_removed=share * 0.99)
    )
    decision = join(asked, analyses(asked, settings), settings)
    assert not analyze(asked, settings, level=Level.HEAD).approved_for_application
    assert decision.approved_for_application, decision.rejection_reason
    more = replace(plain, requirements=PerformanceRequirements(min_parameters_removed=0.9))
    refused = join(more, analyses(more, settings), settings)
    assert "joint.requirements" in refused.rejection_reason


def keeps(count: int) -> tuple[list[Proposal], object]:
    """A verifier that finds the first ``count`` units safe, and what it was asked."""
    asked: list[Proposal] = []

    def verify(proposal: Proposal) -> Measured:
        asked.append(proposal)
        kept: tuple[Entry, ...] = proposal.order[:count]
        gate = GateResult(name="accuracy", passed=bool(kept))
        return Measured(kept, (gate,))

    return asked, verify


@pytest.mark.parametrize("count", [0, 1, 5, 10_000])
def test_a_verified_decision_holds_what_was_measured_as_safe(
    bundle: CheckpointBundle, settings: Settings, count: int
) -> None:
    asked, verify = keeps(count)
    decision = join(bundle, analyses(bundle, settings), settings, JoinContext(verify=verify))  # type: ignore[arg-type]
    (proposal,) = asked
    kept = {(name, index) for _, name, index in proposal.order[:count]}
    left = {(name, unit) for name, units in decision.units.items() for unit in units}
    left |= {(target.layer_name, 0) for target in decision.layers}
    assert left == kept
    assert decision.approved_for_application is bool(count)
    assert decision.safety.gates[-1].name == "accuracy"
    after = bundle.architecture.without(decision.units)
    after = after.without_layers([target.layer_name for target in decision.layers])
    assert decision.statistics.parameters_after == after.parameters
    channels = sum(len(target.indices) for target in decision.channels)
    s = decision.statistics
    assert s.channels_before - s.channels_after == channels
    if not count:
        assert decision.safety.outcome is Outcome.NO_GO


def test_channels_alone_are_predicted_alike_with_and_without_a_join() -> None:
    settings, plain = joint_networks.settings(), joint_networks.checkpoint()
    margins = np.random.default_rng(1).normal(-3, 2, joint_networks.SAMPLES).astype(np.float32)
    gates = {
        name: gate.model_copy(update={"margins": margins, "moves": gate.projections})
        for name, gate in plain.gates.items()
    }
    bundle = replace(plain, gates=gates)
    alone = analyze_level(bundle, settings, Level.CHANNEL)
    gone = [(Level.HEAD, "late"), (Level.LAYER, "late")]
    s = join(bundle, [alone], settings, JoinContext(missing=gone)).statistics
    own = alone.decision.statistics
    assert s.predicted_shift == pytest.approx(own.predicted_shift)
    assert s.predicted_shift_error == pytest.approx(own.predicted_shift_error)
