"""Heads are scored as the documents say, chosen like channels, and every step down is told."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from head_networks import checkpoint, patterns, transformer
from networks import floats

from elesh.analysis import analyze, explain
from elesh.analysis.levels.heads import EARLY, LATE, HeadWeights, head_weights_at, multi_factor
from elesh.settings import AttentionAnalysis, Settings
from leyline import CheckpointBundle, HeadImportanceData, Level, Phase, encode


def settings(**attention: Any) -> Settings:
    return Settings(
        structured_pruning={
            "channel_analysis": {"max_predicted_shift": 1e9},
            "attention_analysis": attention,
        }
    )


def removed(bundle: CheckpointBundle, **attention: Any) -> dict[str, tuple[int, ...]]:
    return analyze(bundle, settings(**attention), level=Level.HEAD).units


def test_the_mix_is_focus_diversity_and_gradients() -> None:
    data = patterns(
        "a",
        2,
        gradient_sensitivity=floats([1, 4]),
        entropy=floats([0.5, 1.5]),
        entropy_bound=floats([2, 2]),
        diversity=floats([0, math.log(2)]),
    )
    mixed = multi_factor([data], HeadWeights(0.2, 0.3, 0.5))
    assert np.allclose(mixed, [0.2 * 0.75 + 0.5 * 0.25, 0.2 * 0.25 + 0.3 + 0.5])


def test_a_focused_head_is_worth_more_than_a_diffuse_one() -> None:
    data = patterns("a", 4, entropy=floats([0.1, 1, 2, 2.7]), diversity=floats([0.1] * 4),
                    gradient_sensitivity=floats([1] * 4))  # fmt: skip
    assert (np.diff(multi_factor([data], LATE)) < 0).all()


def test_a_head_that_sees_one_key_only_is_not_called_focused() -> None:
    data = patterns("a", 2, entropy=floats([0, 0]), entropy_bound=floats([0, 0]),
                    diversity=floats([0, 0]))  # fmt: skip
    assert np.allclose(multi_factor([data], HeadWeights(1, 0, 0)), 0)


def test_weights_follow_the_phase() -> None:
    configured = AttentionAnalysis()
    assert EARLY == (0.2, 0.3, 0.5)
    assert LATE == (0.4, 0.4, 0.2)
    expected = {Phase.PREPARATION: EARLY, Phase.AGGRESSIVE: LATE, Phase.VALIDATION: LATE}
    for phase in Phase:
        weights = head_weights_at(phase, configured)
        assert weights == expected.get(phase, (0.3, 0.3, 0.4))
        assert math.isclose(sum(weights), 1)


def test_a_decision_at_head_level_is_whole_and_the_same_again() -> None:
    one = checkpoint(transformer(16, 16, 8))
    decision = analyze(one, settings(), level=Level.HEAD)
    assert decision.approved_for_application, decision.rejection_reason
    assert decision.key.level is Level.HEAD
    assert not decision.channels
    assert sum(map(len, decision.units.values())) == math.floor(0.2 * 0.85 * 40)
    assert decision.statistics.channels_original == 40
    for target in decision.attention_heads:
        gate_statistics = one.gates[target.layer_name]
        rise = -gate_statistics.first_order + gate_statistics.second_order / 2
        assert np.allclose(target.head_importance, rise)
        assert np.allclose(target.attention_entropy, one.heads[target.layer_name].entropy)
    names = [gate.name for gate in decision.safety.gates]
    assert "minimum_heads" in names
    assert len(names) == len(analyze(one, settings()).safety.gates)
    assert encode(decision) == encode(analyze(one, settings(), level=Level.HEAD, threads=2))


@pytest.mark.parametrize(
    ("epoch", "some"), [(30, 0), (60, 0), (61, 0), (90, 1), (120, 1), (121, 0)]
)
def test_heads_go_from_the_moderate_phase_on(epoch: int, some: int) -> None:
    decision = analyze(checkpoint(transformer(16, 16, 8), epoch), settings(), level=Level.HEAD)
    assert bool(decision.units) == bool(some)
    assert decision.approved_for_application == bool(some)
    assert decision.rejection_reason or some


def test_channels_may_go_where_heads_may_not() -> None:
    decision = analyze(checkpoint(transformer(16), 60), settings(), level=Level.HEAD)
    assert "quota 0" in decision.rejection_reason
    assert decision.statistics.phase_limit == 0


@pytest.mark.parametrize("gates", [True, False])
def test_every_attention_keeps_two_heads(gates: bool) -> None:
    for sizes in ((3, 40), (2, 40), (3, 3, 3, 3, 3)):
        found = removed(checkpoint(transformer(*sizes), gates=gates))
        assert found
        for name, heads in found.items():
            assert sizes[int(name[-1])] - len(heads) >= 2
    decision = analyze(checkpoint(transformer(2, 40)), settings(), level=Level.HEAD)
    assert ("layer0", "has 2 heads, must keep 2") in decision.ignored


def test_without_gates_the_mix_ranks() -> None:
    one = checkpoint(transformer(8, 8), gates=False)
    decision = analyze(one, settings(), level=Level.HEAD)
    assert decision.statistics.scorer == "multi_metric"
    scores = multi_factor([one.heads[f"layer{i}"] for i in range(2)], LATE)
    cheapest = sorted(np.argsort(scores)[:2].tolist())
    gone = [8 * int(name[-1]) + head for name, heads in decision.units.items() for head in heads]
    assert sorted(gone) == cheapest
    for target in decision.attention_heads:
        assert np.allclose(
            target.head_importance, multi_factor([one.heads[target.layer_name]], LATE)
        )


def test_of_heads_that_attend_alike_the_best_stays() -> None:
    alike = np.eye(8)
    alike[1, 5] = alike[5, 1] = 0.97
    weight = np.full(8, 0.5)
    weight[[1, 5]] = 0.9, 1.0
    data = patterns("layer0", 8, similarity=floats(alike), entropy=floats([1] * 8),
                    diversity=floats([0.3] * 8), gradient_sensitivity=floats(weight))  # fmt: skip
    one = checkpoint(transformer(8), gates=False, heads={"layer0": data})
    decision = analyze(one, settings(), level=Level.HEAD)
    (target,) = decision.attention_heads
    (pair,) = target.redundancy_pairs
    assert (target.head_indices, pair.kept, pair.removed) == ((1,), 5, 1)
    assert removed(one, similarity_threshold=0.98) != decision.units


def test_patterns_that_could_not_be_seen_are_told() -> None:
    blind = {
        f"layer{i}": HeadImportanceData(
            layer_name=f"layer{i}", gradient_sensitivity=floats(np.arange(8) + 1)
        )
        for i in range(2)
    }
    decision = analyze(checkpoint(transformer(8, 8), heads=blind), settings(), level=Level.HEAD)
    assert [taken.rung for taken in decision.fallbacks] == ["no_attention_patterns"]
    assert "layer0, layer1" in decision.fallbacks[0].reason
    assert decision.approved_for_application
    assert all(target.attention_entropy == () for target in decision.attention_heads)
    found = removed(checkpoint(transformer(8, 8), gates=False, heads=blind))
    assert found == {"layer0": (0,), "layer1": (0,)}


def test_scorers_that_heads_do_not_have_fall_back_and_say_so() -> None:
    one = checkpoint(transformer(16), scorer="magnitude")
    decision = analyze(one, settings(), level=Level.HEAD)
    assert [taken.rung for taken in decision.fallbacks] == ["no_head_magnitude"]
    wanted = checkpoint(transformer(16), gates=False, scorer="output_projection")
    decision = analyze(wanted, settings(), level=Level.HEAD)
    assert [taken.rung for taken in decision.fallbacks] == ["gate_failure"]
    assert decision.statistics.scorer == "multi_metric"


def test_heads_go_by_fisher_information_where_it_is_asked_for() -> None:
    one = checkpoint(transformer(16), scorer="fisher")
    decision = analyze(one, settings(), level=Level.HEAD)
    assert (decision.statistics.scorer, decision.fallbacks) == ("fisher", ())
    order = np.argsort(one.gates["layer0"].second_order)
    (target,) = decision.attention_heads
    assert set(target.head_indices) == set(order[: len(target.head_indices)].tolist())


def test_a_head_decision_explains_itself() -> None:
    one = checkpoint(transformer(16, 16))
    decision = analyze(one, settings(), level=Level.HEAD)
    told = explain(decision, one)
    gone = {(row.group, row.unit) for row in told.units if row.verdict == "removed"}
    assert gone == {(name, head) for name, heads in decision.units.items() for head in heads}
    assert any(row.verdict == "spared" for row in told.units)
    assert dict(told.figures)["heads"] == f"32 to {32 - len(gone)}"
