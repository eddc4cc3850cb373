"""``analyze``: every decision holds its limits, says its reasons, and is the same bytes again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import bundle, chain, floats, gate, settings, vectors

from elesh import Settings, analyze
from elesh.safety import BreakerStatus, votes
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    Fallback,
    GateStatistics,
    IdentityMismatch,
    InvalidField,
    Level,
    NotFinite,
    Outcome,
    PerformanceRequirements,
    PrunedArchitecture,
    PruningGroup,
    StructuralPruningDecision,
    TensorSlice,
    encode,
)

SIZES = (32, 48, 64, 64)


def gate_names(decision: StructuralPruningDecision, *, passed: bool) -> set[str]:
    return {gate.name for gate in decision.safety.gates if gate.passed is passed}


def count(decision: StructuralPruningDecision) -> int:
    return sum(len(units) for units in decision.units.values())


def test_a_sound_checkpoint_is_approved_on_its_prediction() -> None:
    decision = analyze(bundle(chain(SIZES, skip=(1,)), epoch=120), settings())
    assert decision.approved_for_application
    assert decision.safety.outcome is Outcome.CONDITIONAL_GO
    assert not decision.safety.measured
    assert decision.statistics.scorer == "output_projection"
    assert count(decision) == decision.statistics.quota == int(0.18 * sum(SIZES))
    assert decision.settings_hash == settings().analysis_hash
    assert decision.elesh_version
    assert len(decision.safety.gates) == 11


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.slow
def test_one_and_four_threads_and_another_process_give_the_same_bytes(
    gates: bool, tmp_path: Path
) -> None:
    checkpoint = bundle(chain((350, 450, 64)), epoch=120, gates=gates)
    decision = encode(analyze(checkpoint, settings()))
    assert encode(analyze(checkpoint, settings(), threads=4)) == decision
    checkpoint.save(tmp_path)
    script = (
        "import hashlib, sys; from elesh import CheckpointBundle, Settings, analyze;"
        "from leyline import encode;"
        "s = Settings(structured_pruning={'channel_analysis': {'max_predicted_shift': 1e9}});"
        "d = analyze(CheckpointBundle.load(sys.argv[1]), s, threads=2);"
        "print(hashlib.sha256(encode(d)).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == hashlib.sha256(decision).hexdigest()


@st.composite
def architectures(draw: st.DrawFn) -> PrunedArchitecture:
    layers = draw(st.integers(1, 5))
    sizes = [draw(st.integers(1, 60)) for _ in range(layers)]
    return chain(
        sizes,
        skip=sorted(draw(st.sets(st.integers(0, layers - 1), max_size=2)) - {layers - 1}),
        multiples=[draw(st.sampled_from([1, 1, 4])) for _ in sizes],
        originals=[size + draw(st.integers(0, 5)) for size in sizes],
    )


@given(
    architecture=architectures(),
    epoch=st.integers(0, 130),
    seed=st.integers(0, 10**6),
    minimum=st.integers(1, 20),
    round_to=st.sampled_from([1, 1, 8]),
    scorer=st.sampled_from(["auto", "fisher", "multi_metric", "magnitude"]),
)
def test_every_decision_leaves_a_consistent_architecture_within_all_limits(
    architecture: PrunedArchitecture,
    epoch: int,
    seed: int,
    minimum: int,
    round_to: int,
    scorer: str,
) -> None:
    checkpoint = bundle(
        architecture,
        epoch=epoch,
        seed=seed,
        samples=32,
        parameters=AnalysisParameters(scorer=scorer, round_to=round_to),  # type: ignore[arg-type]
    )
    decision = analyze(checkpoint, settings(min_channels_per_layer=minimum))
    statistics = decision.statistics
    after = architecture.without(decision.units)  # raises unless consistent
    assert (after.parameters, after.macs) == (statistics.parameters_after, statistics.macs_after)
    assert all(0 not in tensor.shape for tensor in after.tensors)
    assert count(decision) <= statistics.quota
    assert statistics.channels_before - count(decision) == statistics.channels_after
    if count(decision):
        assert statistics.cumulative_ratio <= statistics.phase_limit
    for target in decision.channels:
        group = architecture.group[target.layer_name]
        assert target.channels_after >= minimum
        assert target.channels_after % group.unit_multiple == 0
        assert target.channels_after % round_to == 0
        assert not set(target.channel_indices) & {spared.index for spared in target.spared}
        assert len(target.spared) <= 16
    assert decision.approved_for_application == (
        count(decision) > 0 and not gate_names(decision, passed=False)
    )


def test_parameters_after_are_those_of_the_shrunken_tensors() -> None:
    decision = analyze(bundle(chain((32, 40)), epoch=120), settings())
    a, b = (32 - len(decision.units.get("g0", ())), 40 - len(decision.units.get("g1", ())))
    parameters = a * 3 * 9 + a + b * a * 9 + b + 10 * b * 4
    assert decision.statistics.parameters_after == parameters


@pytest.mark.parametrize(
    ("epoch", "words"), [(30, "preparation phase: telemetry only"), (121, "monitoring only")]
)
def test_preparation_and_validation_are_rejected_with_their_reason(epoch: int, words: str) -> None:
    decision = analyze(bundle(chain(SIZES), epoch=epoch), settings())
    assert not decision.approved_for_application
    assert words in decision.rejection_reason
    assert decision.channels == ()
    assert votes(decision) == {Level.CHANNEL: "success"}


def test_an_open_breaker_rejects_by_name_and_keeps_the_analysis() -> None:
    checkpoint = bundle(chain(SIZES), epoch=120)
    status = BreakerStatus("open", 3, "three analyses failed: disk on fire")
    decision = analyze(checkpoint, settings(), breakers={Level.CHANNEL: status})
    assert not decision.approved_for_application
    assert decision.safety.outcome is Outcome.NO_GO
    assert "breaker" in decision.rejection_reason
    assert "disk on fire" in decision.rejection_reason
    assert decision.channels == analyze(checkpoint, settings()).channels != ()
    again = analyze(checkpoint, settings(), breakers=BreakerStatus.of(decision))
    assert encode(again) == encode(decision)


def test_a_half_open_breaker_lets_its_trial_through() -> None:
    status = BreakerStatus("half_open", 3, "failed before")
    decision = analyze(
        bundle(chain(SIZES), epoch=120), settings(), breakers={Level.CHANNEL: status}
    )
    assert decision.approved_for_application
    assert BreakerStatus.of(decision) == {Level.CHANNEL: status}


def test_a_quota_of_zero_is_said() -> None:
    architecture = chain((40,), originals=(50,))
    decision = analyze(bundle(architecture, epoch=60), settings())
    assert "nothing to remove: quota 0 (10 of 50" in decision.rejection_reason


def test_a_request_over_the_limit_is_cut_to_the_limit_and_one_below_is_heeded() -> None:
    architecture = chain(SIZES)
    for ratio, share in ((0.5, 0.18), (0.05, 0.05)):
        checkpoint = bundle(
            architecture, epoch=120, parameters=AnalysisParameters(target_ratio=ratio)
        )
        assert count(analyze(checkpoint, settings())) == int(share * sum(SIZES))


def test_without_gates_the_documents_mix_ranks() -> None:
    decision = analyze(bundle(chain(SIZES), epoch=60, gates=False), settings())
    assert decision.approved_for_application
    assert decision.statistics.scorer == "multi_metric"
    assert decision.statistics.predicted_shift is None
    assert decision.fallbacks == ()


def test_unusable_taylor_vectors_fall_back_to_magnitude_with_less_confidence() -> None:
    checkpoint = bundle(chain(SIZES), epoch=120, gates=False)
    channels = {
        name: data.model_copy(update={"taylor_importance": np.zeros(data.size, np.float32)})
        for name, data in checkpoint.channels.items()
    }
    broken = analyze(replace(checkpoint, channels=channels), settings())
    assert broken.statistics.scorer == "magnitude"
    assert [fallback.rung for fallback in broken.fallbacks] == ["taylor_failure"]
    assert broken.safety.confidence < analyze(checkpoint, settings()).safety.confidence
    weakest = min(
        (float(m) / data.magnitude_importance.max(), name, unit)
        for name, data in channels.items()
        for unit, m in enumerate(data.magnitude_importance)
    )
    assert weakest[2] in broken.units[weakest[1]]


def test_zero_projections_fall_back_to_the_vectors() -> None:
    checkpoint = bundle(chain(SIZES), epoch=120)
    gates = {
        name: gate.model_copy(update={"projections": np.zeros_like(gate.projections)})
        for name, gate in checkpoint.gates.items()
    }
    decision = analyze(replace(checkpoint, gates=gates), settings())
    assert decision.statistics.scorer == "multi_metric"
    assert [fallback.rung for fallback in decision.fallbacks] == ["gate_failure"]


def test_fisher_information_ranks_where_it_is_asked_for_and_the_decision_says_so() -> None:
    asked = AnalysisParameters(scorer="fisher")
    checkpoint = bundle(chain(SIZES), epoch=120, parameters=asked)
    decision = analyze(checkpoint, settings(redundancy_threshold=1.0))
    assert (decision.statistics.scorer, decision.fallbacks) == ("fisher", ())
    assert decision.units == analyze(bundle(chain(SIZES), epoch=120), by_setting("fisher")).units
    max_cost = max(cost for target in decision.channels for cost in target.importance)
    for target in decision.channels:
        halves = checkpoint.gates[target.layer_name].second_order / 2
        assert target.importance == pytest.approx(halves[list(target.channel_indices)])
        stays = np.delete(halves, target.channel_indices)
        if target.channels_after > 16:
            assert stays.min() >= max_cost * (1 - 1e-4), "nothing cheaper stays"


def by_setting(scorer: str) -> Settings:
    return settings(redundancy_threshold=1.0, scorer=scorer)


def test_without_squared_gradients_fisher_information_falls_back_to_the_vectors() -> None:
    for gates in (False, True):
        checkpoint = bundle(chain(SIZES), epoch=120, gates=gates)
        blank = {
            name: gate.model_copy(update={"second_order": np.zeros_like(gate.second_order)})
            for name, gate in checkpoint.gates.items()
        }
        decision = analyze(replace(checkpoint, gates=blank), by_setting("fisher"))
        assert decision.statistics.scorer == "multi_metric"
        assert [fallback.rung for fallback in decision.fallbacks] == ["gate_failure"]


def test_a_caller_may_ask_for_a_simpler_scorer_and_record_why() -> None:
    taken = Fallback(rung="analysis_timeout", reason="300 s")
    decision = analyze(
        bundle(chain(SIZES), epoch=120), settings(), scorer="multi_metric", fallbacks=[taken]
    )
    assert decision.statistics.scorer == "multi_metric"
    assert decision.fallbacks == (taken,)
    assert decision.statistics.predicted_shift is not None  # the projections are there to predict


def test_planted_duplicates_go_first_and_name_their_partner() -> None:
    architecture = chain((64, 64))
    rng = np.random.default_rng(5)
    data = vectors("g0", 64, rng)
    assert data.channel_correlations is not None
    similar = data.channel_correlations.copy()
    similar[3, 7] = similar[7, 3] = 0.99
    projections = gate("g0", 64, rng).projections.copy()
    projections[:, 3] *= np.float32(0.05) / projections[:, 3].std()
    projections[:, 7] = projections[:, 3] / 2
    gates = {
        "g0": gate("g0", 64, rng).model_copy(update={"projections": projections}),
        "g1": gate("g1", 64, rng),
    }
    checkpoint = bundle(
        architecture,
        epoch=120,
        channels={
            "g0": data.model_copy(update={"channel_correlations": similar}),
            "g1": vectors("g1", 64, rng),
        },
    )
    for used in ({}, gates):
        target = analyze(replace(checkpoint, gates=used), settings()).channels[0]
        pair = target.redundancy_pairs[0]
        assert {pair.kept, pair.removed} == {3, 7}
        assert pair.removed in target.channel_indices
        assert pair.kept not in target.channel_indices
        assert pair.similarity == pytest.approx(0.99)


def test_ignored_and_unprunable_groups_are_left_alone_and_listed() -> None:
    plain = chain((32, 12, 48, 48))
    groups = list(plain.groups)
    groups[3] = groups[3].model_copy(update={"prunable": False, "reason": "feeds an unknown op"})
    architecture = PrunedArchitecture.build(plain.tensors, plain.layers, tuple(groups))
    checkpoint = bundle(
        architecture, epoch=120, parameters=AnalysisParameters(ignored_layers=("conv0",))
    )
    decision = analyze(checkpoint, settings())
    assert set(decision.units) == {"g2"}
    near = {
        name: reason for name, reason in decision.ignored if "than the most expensive" in reason
    }
    assert "g0" in near
    assert {name: reason.partition(";")[0] for name, reason in decision.ignored} == {
        "g0": "ignored by the request: conv0",
        "g1": "has 12 channels, must keep 16",
        "g3": "feeds an unknown op",
    }


def test_ignoring_what_does_not_exist_is_refused_by_name() -> None:
    checkpoint = bundle(chain(SIZES), parameters=AnalysisParameters(ignored_layers=("conv9",)))
    with pytest.raises(InvalidField, match=r"ignored_layers.*conv9"):
        analyze(checkpoint, settings())


def test_a_group_that_couples_host_and_seed_tensors_is_left_alone() -> None:
    plain = chain((32, 48))
    tensors = tuple(
        t.model_copy(update={"owner": "seed"}) if t.path == "conv1.weight" else t
        for t in plain.tensors
    )
    decision = analyze(
        bundle(PrunedArchitecture.build(tensors, plain.layers, plain.groups), epoch=120), settings()
    )
    assert decision.units == {}
    assert "gradient isolation" in dict(decision.ignored)["g0"]


def test_too_few_samples_are_a_failure() -> None:
    decision = analyze(bundle(chain(SIZES), epoch=120, samples=16), settings())
    assert "statistics" in decision.rejection_reason
    assert votes(decision) == {Level.CHANNEL: "failure"}


def test_a_cut_inside_the_noise_is_not_made() -> None:
    architecture = chain((200, 200))
    rng = np.random.default_rng(6)
    gates = {
        name: GateStatistics(
            layer_name=name,
            projections=floats(rng.standard_normal((64, 200))),
            first_order=np.zeros(200, np.float32),
            second_order=np.zeros(200, np.float32),
        )
        for name in ("g0", "g1")
    }
    decision = analyze(replace(bundle(architecture, epoch=120), gates=gates), settings())
    assert gate_names(decision, passed=False) == {"noise"}
    assert "noise" in decision.rejection_reason
    assert votes(decision) == {Level.CHANNEL: "success"}


def test_a_predicted_shift_over_the_limit_is_not_approved() -> None:
    checkpoint = bundle(chain(SIZES), epoch=120)
    shift = analyze(checkpoint, settings()).statistics.predicted_shift
    assert shift is not None
    assert shift > 0
    decision = analyze(checkpoint, settings(max_predicted_shift=shift / 2))
    assert gate_names(decision, passed=False) == {"predicted_shift"}


def test_a_requirement_that_cannot_be_held_rejects_with_figures() -> None:
    asked = PerformanceRequirements(max_predicted_loss_rise=1e-9, min_parameters_removed=0.9)
    decision = analyze(bundle(chain(SIZES), epoch=120, requirements=asked), settings())
    assert "max_predicted_loss_rise" in decision.rejection_reason
    assert "min_parameters_removed" in decision.rejection_reason
    unknown = analyze(bundle(chain(SIZES), epoch=60, gates=False, requirements=asked), settings())
    assert "not known without gate statistics" in unknown.rejection_reason


def test_a_network_without_channel_groups_has_nothing_to_remove() -> None:
    plain = chain((32,))
    empty = PrunedArchitecture.build(plain.tensors, plain.layers, ())
    decision = analyze(bundle(empty, epoch=120), settings())
    assert "nothing to remove: no group" in decision.rejection_reason
    assert votes(decision) == {Level.CHANNEL: "success"}


def test_groups_that_overlap_fail_the_structure_gate() -> None:
    plain = chain((32, 32))
    taken = TensorSlice(tensor="conv1.weight", dim=0)
    first = plain.groups[0].model_copy(update={"slices": (*plain.groups[0].slices, taken)})
    broken = PrunedArchitecture.build(plain.tensors, plain.layers, (first, plain.groups[1]))
    decision = analyze(bundle(broken, epoch=120), settings(min_channels_per_layer=1))
    assert set(decision.units) == {"g0", "g1"}
    assert "structure" in gate_names(decision, passed=False)
    assert votes(decision) == {Level.CHANNEL: "failure"}
    assert decision.statistics.parameters_after == decision.statistics.parameters_before


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(NotFinite, match="g0/taylor_importance"):
        vectors("g0", 4, np.random.default_rng(0)).model_validate(
            {
                "layer_name": "g0",
                "taylor_importance": floats([1, np.nan]),
                "magnitude_importance": floats([1, 1]),
                "activation_frequency": floats([1, 1]),
            }
        )


def test_a_level_that_is_not_analysed_is_refused() -> None:
    with pytest.raises(InvalidField, match="level"):
        analyze(bundle(chain(SIZES)), level=Level.PARAMETER)


def test_a_key_of_another_checkpoint_is_refused() -> None:
    checkpoint = bundle(chain(SIZES), epoch=60)
    other = replace(checkpoint, metadata=checkpoint.metadata.model_copy(update={"epoch": 61}))
    with pytest.raises(IdentityMismatch):
        analyze(checkpoint, key=other.key(Level.CHANNEL))


def test_indices_are_told_in_original_numbering() -> None:
    architecture = chain((64, 64)).without({"g0": range(10), "g1": [3]})
    decision = analyze(bundle(architecture, epoch=120), settings())
    for target in decision.channels:
        origin = architecture.group[target.layer_name].origin
        assert target.original_indices == tuple(origin[unit] for unit in target.channel_indices)
    assert decision.statistics.channels_original == 128
    assert count(decision) == int(0.18 * 128) - 11


def test_the_library_needs_no_torch_and_no_redis() -> None:
    script = (
        "import sys; from elesh import CheckpointBundle, Settings, analyze;"
        "print([m for m in ('torch', 'redis', 'rich', 'opentelemetry') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_default_settings_are_used_if_none_are_given() -> None:
    checkpoint: CheckpointBundle = bundle(chain(SIZES), epoch=120)
    assert encode(analyze(checkpoint)) == encode(analyze(checkpoint, Settings()))


def test_groups_of_other_levels_are_not_the_channel_levels_business() -> None:
    plain = chain((32, 48))
    heads: PruningGroup = plain.groups[1].model_copy(update={"level": Level.HEAD})
    architecture = PrunedArchitecture.build(plain.tensors, plain.layers, (plain.groups[0], heads))
    decision = analyze(bundle(architecture, epoch=120), settings())
    assert set(decision.units) <= {"g0"}
    assert decision.statistics.channels_original == 32
    assert decision.ignored == ()
