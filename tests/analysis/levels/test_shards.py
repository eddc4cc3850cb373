"""Shards of a level are joined under one quota: one shard is no shard, and every limit holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import joint_networks
import numpy as np
import pytest
from head_networks import checkpoint as heads_checkpoint
from head_networks import transformer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from networks import bundle, chain, settings, vectors

from elesh import analyze
from elesh.analysis import analyze_level, join
from elesh.settings import Settings
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    InvalidField,
    Level,
    LevelAnalysis,
    StructuralPruningDecision,
    decode,
    encode,
)

SIZES = (40, 64, 24, 96, 17, 33)
NAMES = tuple(f"g{i}" for i in range(len(SIZES)))


def network(seed: int = 0, *, gates: bool = True, round_to: int = 1) -> CheckpointBundle:
    parameters = AnalysisParameters(round_to=round_to)
    return bundle(chain(SIZES), epoch=120, seed=seed, gates=gates, parameters=parameters)


def sharded(
    checkpoint: CheckpointBundle,
    shards: Sequence[Sequence[str]],
    free: Settings,
    level: Level = Level.CHANNEL,
) -> StructuralPruningDecision:
    """The decision of a level that was analysed in shards, which crossed the bus."""
    analyses = [analyze_level(checkpoint, free, level, shard=names) for names in shards]
    return join(checkpoint, [decode(LevelAnalysis, encode(a)) for a in analyses], free)


@pytest.mark.parametrize("gates", [True, False])
@given(seed=st.integers(0, 50), round_to=st.sampled_from((1, 4)))
@hypothesis_settings(max_examples=8, deadline=None)
def test_one_shard_of_everything_is_no_shard(gates: bool, seed: int, round_to: int) -> None:
    checkpoint, free = network(seed, gates=gates, round_to=round_to), settings()
    whole = analyze(checkpoint, free)
    assert encode(sharded(checkpoint, [NAMES], free)) == encode(whole)


def test_one_shard_of_all_heads_is_no_shard() -> None:
    checkpoint, free = heads_checkpoint(transformer(16, 8, 12)), settings()
    names = [f"layer{i}" for i in range(3)]
    whole = analyze(checkpoint, free, level=Level.HEAD)
    assert encode(sharded(checkpoint, [names], free, Level.HEAD)) == encode(whole)


def test_fixed_scores_choose_the_same_however_the_groups_are_split() -> None:
    checkpoint, free = network(gates=False), settings(redundancy_threshold=1.0)
    whole = analyze(checkpoint, free)
    for shards in ([NAMES[:3], NAMES[3:]], [[name] for name in NAMES]):
        assert sharded(checkpoint, shards, free).units == whole.units


@given(
    seed=st.integers(0, 50),
    places=st.lists(st.integers(0, 3), min_size=len(SIZES), max_size=len(SIZES)),
    round_to=st.sampled_from((1, 4)),
)
@hypothesis_settings(max_examples=8, deadline=None)
@pytest.mark.slow
def test_however_the_groups_are_split_every_limit_holds(
    seed: int, places: list[int], round_to: int
) -> None:
    checkpoint, free = network(seed, round_to=round_to), settings(redundancy_threshold=0.3)
    shards = [[n for n, p in zip(NAMES, places, strict=True) if p == k] for k in set(places)]
    decision = sharded(checkpoint, shards, free)
    assert encode(sharded(checkpoint, shards[::-1], free)) == encode(decision)
    gone = sum(map(len, decision.units.values()))
    assert gone <= decision.statistics.quota
    assert round_to > 1 or gone == decision.statistics.quota
    for target in decision.channels:
        assert target.channels_after >= 16
        assert target.channels_after % round_to == 0
        assert all(pair.removed in target.indices for pair in target.redundancy_pairs)
        assert not {unit.index for unit in target.spared} & set(target.indices)
    after = checkpoint.architecture.without(decision.units)
    assert decision.statistics.parameters_after == after.parameters
    assert decision.statistics.predicted_shift is not None


def test_a_group_that_no_shard_looked_at_is_named() -> None:
    checkpoint, free = network(), settings()
    decision = sharded(checkpoint, [NAMES[:2], NAMES[3:]], free)
    assert dict(decision.ignored)["g2"] == "no shard looked at it: its analysis is missing"
    assert "g2" not in decision.units


def test_a_shard_that_was_ranked_by_another_score_loses_nothing_and_says_so() -> None:
    checkpoint, free = network(), settings()
    first = analyze_level(checkpoint, free, shard=NAMES[:4])
    basic = analyze_level(checkpoint, free, shard=NAMES[4:], scorer="multi_metric")
    decision = join(checkpoint, [basic, first], free)
    assert decision.statistics.scorer == "output_projection"
    assert "ranked by multi_metric" in dict(decision.ignored)["g5"]
    assert decision.units.keys() <= set(NAMES[:4])


def test_shards_and_levels_are_joined_in_one_decision() -> None:
    checkpoint, free = joint_networks.checkpoint(), joint_networks.settings()
    names = [group.name for group in checkpoint.architecture.groups if group.level == "channel"]
    analyses = [analyze_level(checkpoint, free, shard=names[i::2]) for i in range(2)]
    analyses += [analyze_level(checkpoint, free, level) for level in (Level.HEAD, Level.LAYER)]
    decision = join(checkpoint, analyses, free)
    assert decision.taken == (Level.CHANNEL, Level.HEAD, Level.LAYER)
    whole = analyze(checkpoint, free)
    assert decision.attention_heads == whole.attention_heads
    assert decision.layers == whole.layers


def test_what_is_no_shard_is_refused_by_name() -> None:
    checkpoint, free = network(), settings()
    for wrong in ([], ["nobody"]):
        with pytest.raises(InvalidField, match="shard"):
            analyze_level(checkpoint, free, shard=wrong)
    with pytest.raises(InvalidField, match="analysed whole"):
        analyze_level(checkpoint, free, Level.LAYER, shard=NAMES)
    twice = [analyze_level(checkpoint, free, shard=NAMES[:n]) for n in (2, 3)]
    with pytest.raises(InvalidField, match="no group in common"):
        join(checkpoint, twice, free)
    data = {"g0": vectors("g0", SIZES[0], np.random.default_rng(0))}
    poor = replace(checkpoint, channels=data, gates={})
    assert analyze_level(poor, free, shard=["g1"]).decision.units == {}


def test_one_shard_is_no_shard_where_samples_count_by_their_margins() -> None:
    checkpoint, free = network(), settings()
    margins = np.random.default_rng(1).normal(-3, 2, 128).astype(np.float32)
    gates = {
        name: gate.model_copy(update={"margins": margins, "moves": gate.projections})
        for name, gate in checkpoint.gates.items()
    }
    known = replace(checkpoint, gates=gates)
    assert encode(sharded(known, [NAMES], free)) == encode(analyze(known, free))
