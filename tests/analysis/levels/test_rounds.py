"""Choosing in rounds: the same plan's limits hold, whatever the network answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import joint_networks
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import bundle as channels_of
from networks import chain
from networks import settings as free_settings

from elesh.analysis import analyze, explain
from elesh.analysis.candidates import Candidates
from elesh.analysis.selection.removal_order import LogitGapOrder
from elesh.safety import Entry, LogitGaps, Measured, Proposal
from elesh.settings import Settings
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    Fallback,
    GateResult,
    Level,
    StructuralPruningDecision,
    encode,
)

ROWS = 48


@dataclass
class Linear:
    """A network whose margins move by fixed amounts, unit by unit: every prediction is exact.

    Finds ``kept`` of what is proposed safe; ``fails`` from so many measurements on.
    """

    bundle: CheckpointBundle
    seed: int = 0
    kept: int = 10_000
    fails: int = 10_000
    measured: int = 0
    masks: list[Sequence[Entry]] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.margins = rng.normal(-4, 2, ROWS).astype(np.float32)
        self.moves = {
            name: (rng.normal(1, 0.5, (ROWS, 1)) * gate.projections[:ROWS] / 8).astype(np.float32)
            for name, gate in self.bundle.gates.items()
        }

    def remeasure(
        self, masked: Sequence[Entry], halved: Sequence[Entry] = ()
    ) -> LogitGaps | Fallback:
        self.measured += 1
        self.masks.append(masked)
        if self.measured >= self.fails:
            return Fallback(rung="rounds_timeout", reason="test")
        gone = sum((self.moves[name][:, unit] for _, name, unit in masked), np.zeros(ROWS, "f4"))
        return LogitGaps(self.margins - gone, self.moves)

    def __call__(self, proposal: Proposal) -> Measured:
        self.proposals.append(proposal)
        kept = proposal.order[: self.kept]
        return Measured(kept, (GateResult(name="measured", passed=bool(kept)),))


def asked(rounds: int = 3, **channel_analysis: object) -> Settings:
    made = free_settings(**({"min_channels_per_layer": 4} | channel_analysis))
    verification = made.verification.model_copy(update={"rounds": rounds, "rounds_from": 0.0})
    return made.model_copy(update={"verification": verification})


def holds(checkpoint: CheckpointBundle, decision: StructuralPruningDecision, minimum: int) -> None:
    """Everything that any decision promises of its targets."""
    group, rows = checkpoint.architecture.group, explain(decision, checkpoint).units
    told = Counter((row.group, row.unit) for row in rows if row.verdict == "removed")
    assert set(told.values()) <= {1}
    assert set(told) == {(name, u) for name, own in decision.units.items() for u in own}
    for target in decision.channels:
        own, left = group[target.layer_name], target.channels_after
        assert own.size - len(target.indices) == left >= minimum
        assert left % own.unit_multiple == 0
        assert target.original_indices == tuple(own.origin[u] for u in target.indices)
        assert len(target.importance) == len(target.errors) == len(target.indices)
        assert not {unit.index for unit in target.spared} & set(target.indices)
    for head in decision.attention_heads:
        assert head.heads_after >= 2
        assert len(head.costs) == len(head.errors) == len(head.indices)


@given(
    sizes=st.lists(st.integers(8, 40), min_size=1, max_size=4),
    multiple=st.sampled_from([1, 1, 2, 4]),
    round_to=st.sampled_from([1, 1, 2, 8]),
    rounds=st.integers(2, 6),
    minimum=st.integers(1, 8),
    kept=st.sampled_from([0, 3, 10_000]),
    seed=st.integers(0, 10**6),
)
@pytest.mark.slow
def test_minimums_multiples_and_quota_hold(
    sizes: list[int],
    multiple: int,
    round_to: int,
    rounds: int,
    minimum: int,
    kept: int,
    seed: int,
) -> None:
    wide = [size * multiple for size in sizes]
    checkpoint = channels_of(
        chain(wide, multiples=[multiple] * len(wide)),
        epoch=119,
        seed=seed,
        parameters=AnalysisParameters(round_to=round_to),
    )
    network = Linear(checkpoint, seed, kept)
    decision = analyze(checkpoint, asked(rounds, min_channels_per_layer=minimum), verify=network)
    holds(checkpoint, decision, minimum)
    assert sum(map(len, decision.units.values())) <= decision.statistics.quota
    for target in decision.channels:
        assert target.channels_after % round_to == 0
    if network.proposals:
        assert len(network.proposals[0].order) <= decision.statistics.quota
        assert network.proposals[0].rounds <= rounds


def test_units_outside_the_first_proposal_are_taken_with_their_explanation() -> None:
    checkpoint = channels_of(chain((32, 48, 64)), epoch=119)
    network = Linear(checkpoint)
    once = analyze(checkpoint, asked(rounds=1), verify=network)
    decision = analyze(checkpoint, asked(), verify=network)
    before, after = ({e[1:] for e in p.order} for p in network.proposals)
    assert after - before
    assert decision.statistics.scorer == "margins"
    assert once.statistics.scorer == "output_projection"
    assert {(n, u) for n, units in decision.units.items() for u in units} == after
    gates = {gate.name for gate in decision.safety.gates}
    assert gates >= {gate.name for gate in once.safety.gates}
    holds(checkpoint, decision, 4)


def test_every_round_masks_what_the_rounds_before_took() -> None:
    checkpoint = channels_of(chain((32, 48, 64)), epoch=119)
    network = Linear(checkpoint)
    analyze(checkpoint, asked(rounds=3), verify=network)
    sizes = [len(mask) for mask in network.masks]
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3
    (proposal,) = network.proposals
    assert set(network.masks[-1]) == set(proposal.order[: sizes[-1]])
    assert proposal.rounds == 3


def test_channels_and_heads_are_merged_by_what_they_cost_in_rounds() -> None:
    checkpoint = joint_networks.checkpoint()
    network = Linear(checkpoint)
    chosen = asked()
    decision = analyze(checkpoint, chosen, verify=network)
    assert decision.approved_for_application, decision.rejection_reason
    (proposal,) = network.proposals
    levels = [entry[0] for entry in proposal.order if entry[0] is not Level.LAYER]
    assert {Level.CHANNEL, Level.HEAD} == set(levels)
    assert levels != sorted(levels), "one after the other"
    parts = {part.level: part.statistics for part in decision.levels if part.statistics}
    assert parts[Level.CHANNEL].scorer == parts[Level.HEAD].scorer == "margins"
    holds(checkpoint, decision, 4)


@pytest.mark.parametrize("fails", [1, 2, 9])
def test_a_network_that_cannot_be_measured_again_leaves_the_choice_made_at_once(
    fails: int,
) -> None:
    checkpoint = joint_networks.checkpoint()
    plain = analyze(checkpoint, asked(rounds=1), verify=Linear(checkpoint))
    decision = analyze(checkpoint, asked(), verify=Linear(checkpoint, fails=fails))
    assert decision.units == plain.units
    assert [taken.rung for taken in decision.fallbacks] == ["rounds_timeout"]


def test_what_is_small_or_ranked_otherwise_is_chosen_at_once() -> None:
    checkpoint = channels_of(chain((32, 48, 64)), epoch=119)
    magnitude = replace(checkpoint, parameters=AnalysisParameters(scorer="magnitude"))
    few = asked().verification.model_copy(update={"rounds_from": 0.5})
    cases = [
        (checkpoint, asked().model_copy(update={"verification": few})),
        (magnitude, asked()),
        (checkpoint, asked(rounds=1)),
    ]
    for each, chosen in cases:
        network = Linear(each)
        decision = analyze(each, chosen, verify=network)
        assert network.measured == 0
        assert not decision.fallbacks


def test_rounds_that_the_gates_refuse_leave_the_choice_made_at_once() -> None:
    checkpoint = channels_of(chain((32, 48, 64)), epoch=119)
    once = analyze(checkpoint, asked(rounds=1), verify=Linear(checkpoint))
    s = once.statistics
    limit = (s.predicted_shift or 0) + 2 * (s.predicted_shift_error or 0) + 1e-6
    decision = analyze(checkpoint, asked(max_predicted_shift=limit), verify=Linear(checkpoint))
    (taken,) = decision.fallbacks
    assert taken.rung == "rounds_refused"
    assert "predicted_shift" in taken.reason
    assert decision.units == once.units


def test_the_same_measurements_give_the_same_bytes() -> None:
    checkpoint = joint_networks.checkpoint()
    first, second = (
        encode(analyze(checkpoint, asked(), verify=Linear(checkpoint), threads=threads))
        for threads in (1, 3)
    )
    assert first == second


def test_prices_by_margins_add_up_to_what_all_of_them_cost() -> None:
    rng = np.random.default_rng(0)
    candidates = Candidates(("a", "b"), (700, 900), (600, 800), (1, 1))
    moves = {n: rng.normal(0, 0.05, (ROWS, s)).astype("f4") for n, s in (("a", 700), ("b", 900))}
    margins = rng.normal(-2, 2, ROWS).astype("f4")
    order = LogitGapOrder(candidates, moves, margins, gone=(3, 5))
    removal_order = order.pick(300, np.ones(candidates.count, dtype=np.bool_))
    assert len(set(removal_order.units)) == 300
    assert not {3, 5} & set(removal_order.units)
    row = np.concatenate([moves["a"], moves["b"]], 1).astype(float)
    after = margins - row[:, removal_order.units].sum(1)
    rise = (np.logaddexp(0, after) - np.logaddexp(0, margins.astype(float))).mean()
    assert sum(removal_order.marginal_costs) == pytest.approx(rise, abs=1e-4)
    chance = margins - row[:, rng.permutation(candidates.count)[:300]].sum(1)
    assert rise < (np.logaddexp(0, chance) - np.logaddexp(0, margins.astype(float))).mean()
