"""Data-parallel ranks: however samples are shared out, the merged bundle is that of all samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from trainer_nets import build, example

from elesh.trainer import MeasuredCheckpoint, Recorder, merge_ranks
from elesh.trainer.calibration.ranks import RULES
from leyline import (
    ChannelImportanceData,
    CheckpointBundle,
    GateStatistics,
    HeadImportanceData,
    IdentityMismatch,
    InvalidField,
    LayerStatistics,
)

SAMPLES = 24
_EXAMPLE = example()[..., :8, :8]
"""Maps of 64 positions are read whole; of larger ones each rank draws its positions."""


def square(output: Any, labels: Tensor) -> Tensor:
    """A loss that needs no sampled labels, so that ranks do not differ by what they draw."""
    return (output - nn.functional.one_hot(labels, output.shape[1])).square().sum(1)


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder(build("ResNet"), _EXAMPLE, loss=square)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, *_EXAMPLE.shape[1:], generator=generator)
    return x, torch.randint(0, 5, (SAMPLES,), generator=generator)


def measured(recorder: Recorder, data: tuple[Tensor, Tensor], part: slice) -> CheckpointBundle:
    return recorder.measure([(data[0][part], data[1][part])], epoch=3, redistribute=True)


def agree(ours: Any, theirs: Any, name: str) -> None:
    found, expected = getattr(ours, name), getattr(theirs, name)
    assert (found is None) == (expected is None), name
    if found is not None:
        largest = float(np.abs(expected).max(initial=1e-6))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * largest, err_msg=name)


_DRAWN = {"projections", "input_slopes"}
"""Random directions are each rank's own."""


@given(cuts=st.sets(st.integers(1, SAMPLES - 1), max_size=4))
@hypothesis_settings(max_examples=8, deadline=None)
@pytest.mark.slow
def test_any_split_over_ranks_merges_to_what_one_rank_measures(
    recorder: Recorder, data: tuple[Tensor, Tensor], cuts: set[int]
) -> None:
    edges = [0, *sorted(cuts), SAMPLES]
    ranks = [measured(recorder, data, slice(a, b)) for a, b in pairwise(edges)]
    merged, whole = merge_ranks(ranks), measured(recorder, data, slice(0, SAMPLES))
    assert merged.metadata == whole.metadata
    for name, expected in whole.channels.items():
        for field in set(type(expected).model_fields) - {"layer_name"}:
            agree(merged.channels[name], expected, field)
    for name, gate in whole.gates.items():
        for field in set(type(gate).model_fields) - {"layer_name"} - _DRAWN:
            agree(merged.gates[name], gate, field)
        assert gate.input_means is not None
        slopes = [rank.gates[name].input_slopes for rank in ranks]
        counts = np.diff(edges) / SAMPLES
        mean = sum(c * s for c, s in zip(counts, slopes, strict=True))
        np.testing.assert_allclose(merged.gates[name].input_slopes, mean, rtol=1e-4, atol=1e-7)
        rows = np.concatenate([rank.gates[name].projections for rank in ranks])
        assert np.array_equal(merged.gates[name].projections, rows)
    assert isinstance(merged, MeasuredCheckpoint)
    assert isinstance(whole, MeasuredCheckpoint)
    assert merged.covariance is not None
    assert whole.covariance is not None
    assert merged.covariance.rows == whole.covariance.rows
    for axis, squares in whole.covariance.squares.items():
        torch.testing.assert_close(merged.covariance.squares[axis], squares, rtol=1e-5, atol=1e-6)
    for name, layer in whole.layers.items():
        for field in ("taylor", "similarity", "first_order", "second_order"):
            agree(merged.layers[name], layer, field)


def test_merging_in_steps_is_merging_at_once(
    recorder: Recorder, data: tuple[Tensor, Tensor]
) -> None:
    ranks = [measured(recorder, data, slice(i, i + 6)) for i in range(0, SAMPLES, 6)]
    at_once = merge_ranks(ranks)
    in_steps = merge_ranks([merge_ranks(ranks[:3]), ranks[3]])
    for name, gate in at_once.gates.items():
        assert np.array_equal(in_steps.gates[name].projections, gate.projections)
        agree(in_steps.gates[name], gate, "first_order")
        agree(in_steps.channels[name], at_once.channels[name], "channel_correlations")


def test_one_rank_is_itself(recorder: Recorder, data: tuple[Tensor, Tensor]) -> None:
    one = measured(recorder, data, slice(0, 8))
    merged = merge_ranks([one])
    assert merged.blobs().get("gates") == one.blobs().get("gates")
    assert merged.blobs().get("layers") == one.blobs().get("layers")


def test_every_field_of_the_statistics_has_its_rule() -> None:
    kinds = (ChannelImportanceData, GateStatistics, LayerStatistics, HeadImportanceData)
    fields = {name for kind in kinds for name in kind.model_fields} - {"layer_name"}
    assert fields <= RULES.keys()


def test_ranks_that_do_not_belong_together_are_refused_by_name(
    recorder: Recorder, data: tuple[Tensor, Tensor]
) -> None:
    one = measured(recorder, data, slice(0, 8))
    later = replace(one, metadata=one.metadata.model_copy(update={"epoch": 4}))
    with pytest.raises(IdentityMismatch, match=r"metadata\.epoch"):
        merge_ranks([one, later])
    poorer = replace(one, layers=dict(list(one.layers.items())[1:]))
    with pytest.raises(InvalidField, match=r"layers.*same layers"):
        merge_ranks([one, poorer])
    with pytest.raises(InvalidField, match="at least one"):
        merge_ranks([])


def test_what_the_samples_of_one_rank_do_not_reach_is_left_alone(
    recorder: Recorder, data: tuple[Tensor, Tensor]
) -> None:
    one = measured(recorder, data, slice(0, 8))
    name = next(iter(one.gates))
    fewer = {key: gate for key, gate in one.gates.items() if key != name}
    merged = merge_ranks([one, replace(one, gates=fewer)])
    assert merged.gates.keys() == fewer.keys()
