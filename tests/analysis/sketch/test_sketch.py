"""The sketch: never too low, the same everywhere, and as good as Apache DataSketches' own."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from datasketches import count_min_sketch
from hypothesis import given
from hypothesis import strategies as st

from elesh.analysis.sketch.count_min import MAX_BYTES, CountMinSketch, element_keys, splitmix64
from leyline import (
    ContractError,
    InvalidField,
    Malformed,
    NotFinite,
    ShapeMismatch,
    TooLarge,
    UnsupportedVersion,
)
from leyline.arrays import pack_arrays, unpack_arrays

Keys = npt.NDArray[np.uint64]

KEYS = st.integers(0, 2**64 - 1) | st.integers(0, 5)
VALUES = st.floats(0, 1e30) | st.floats(0, 1e-30) | st.sampled_from([0.0, 5e-324, 1e-17, 1.0])
STREAMS = st.lists(st.tuples(KEYS, VALUES), max_size=40)


def keys(*numbers: int) -> Keys:
    return np.array(numbers, dtype=np.uint64)


def filled(stream: list[tuple[int, float]], width: int = 3, depth: int = 2) -> CountMinSketch:
    sketch = CountMinSketch(width, depth)
    sketch.add(keys(*(k for k, _ in stream)), np.array([v for _, v in stream], dtype=np.float64))
    return sketch


def exact(stream: list[tuple[int, float]]) -> dict[int, Fraction]:
    sums: dict[int, Fraction] = {}
    for key, value in stream:
        sums[key] = sums.get(key, Fraction(0)) + Fraction(value)
    return sums


def assert_never_below(sketch: CountMinSketch, sums: dict[int, Fraction]) -> None:
    estimates = sketch.estimate(keys(*sums))
    assert all(Fraction(float(e)) >= s for e, s in zip(estimates, sums.values(), strict=True))


@given(st.lists(STREAMS, max_size=4))
def test_no_estimate_is_below_the_exact_sum_whatever_the_batches(
    batches: list[list[tuple[int, float]]],
) -> None:
    sketch = CountMinSketch(3, 2)
    for batch in batches:
        sketch.add(keys(*(k for k, _ in batch)), [v for _, v in batch])
    assert_never_below(sketch, exact([pair for batch in batches for pair in batch]))


@given(STREAMS, STREAMS)
def test_a_merged_sketch_is_never_below_both_streams_together(
    left: list[tuple[int, float]], right: list[tuple[int, float]]
) -> None:
    sketch, other = filled(left), filled(right)
    sketch.merge(other)
    assert_never_below(sketch, exact(left + right))
    assert sketch.total == pytest.approx(sum(v for _, v in left + right))


@given(STREAMS, st.lists(st.floats(1e-6, 1), max_size=5))
def test_decay_scales_sums_and_total_and_stays_on_the_safe_side(
    stream: list[tuple[int, float]], factors: list[float]
) -> None:
    sketch, kept = filled(stream), Fraction(1)
    for factor in factors:
        sketch.decay(factor)
        kept *= Fraction(factor)
    assert_never_below(sketch, {key: s * kept for key, s in exact(stream).items()})
    assert sketch.total == pytest.approx(sum(v for _, v in stream) * float(kept))


def test_a_sketch_with_room_is_exact_to_float32() -> None:
    rng = np.random.default_rng(0)
    many = splitmix64(np.arange(2_000, dtype=np.uint64))
    sketch, values = CountMinSketch(), rng.lognormal(size=(3, 2_000))
    for row in values:
        sketch.add(many, row)
        sketch.decay(0.9)
    truth = values[0] * 0.729 + values[1] * 0.81 + values[2] * 0.9
    assert sketch.estimate(many) == pytest.approx(truth, rel=2e-6)
    assert sketch.estimate(keys(1, 2, 3)).max() == 0


def test_merging_is_what_adding_everything_to_one_would_have_been() -> None:
    rng = np.random.default_rng(1)
    many = rng.integers(0, 2**64, 5_000, dtype=np.uint64)
    values = rng.lognormal(size=5_000)
    whole, left, right = (CountMinSketch(1_000, 5) for _ in range(3))
    whole.add(many, values)
    left.add(many[:2_000], values[:2_000])
    right.add(many[2_000:], values[2_000:])
    left.merge(right)
    assert left.estimate(many) == pytest.approx(whole.estimate(many), rel=1e-6)
    other_way = CountMinSketch(1_000, 5)
    other_way.merge(right)
    assert np.array_equal(other_way.estimate(many), right.estimate(many))


def test_at_most_a_share_delta_of_keys_exceeds_the_reported_bound() -> None:
    rng = np.random.default_rng(2)
    many = splitmix64(np.arange(50_000, dtype=np.uint64))
    values = rng.lognormal(sigma=2, size=50_000)
    sketch = CountMinSketch(500, 4)
    sketch.add(many, values)
    bound = sketch.bound
    assert (bound.epsilon, bound.delta) == (math.e / 500, math.exp(-4))
    assert bound.error == pytest.approx(math.e / 500 * values.sum())
    excess = sketch.estimate(many) - values
    assert excess.min() >= 0
    assert (excess > bound.error).mean() <= bound.delta
    assert excess.max() > bound.error / 10, "the bound is of the right order, not just huge"


@pytest.mark.parametrize(("width", "depth"), [(2_000, 5), (20_000, 7)])
def test_errors_are_those_of_apache_datasketches_on_the_same_stream(width: int, depth: int) -> None:
    rng = np.random.default_rng(3)
    drawn = np.minimum(rng.zipf(1.3, 40_000), 20_000).astype(np.uint64)
    values = rng.lognormal(size=40_000)
    ours, theirs = CountMinSketch(width, depth), count_min_sketch(depth, width)
    ours.add(drawn, values)
    for key, value in zip(drawn.tolist(), values.tolist(), strict=True):
        theirs.update(key, value)
    distinct, place = np.unique(drawn, return_inverse=True)
    truth = np.bincount(place, weights=values)
    our_excess = ours.estimate(distinct) - truth
    their_excess = np.array([theirs.get_estimate(key) for key in distinct.tolist()]) - truth
    assert our_excess.min() >= 0
    assert their_excess.min() >= -1e-9 * values.sum()
    assert ours.bound.epsilon == pytest.approx(theirs.get_relative_error())
    assert ours.total == pytest.approx(theirs.total_weight)
    smaller, larger = sorted((our_excess.mean(), their_excess.mean()))
    assert larger <= 2 * smaller + 1e-6 * truth.mean()
    assert np.quantile(our_excess, 0.99) <= 2 * np.quantile(their_excess, 0.99) + 1e-3


def test_the_hash_is_splitmix64_as_published() -> None:
    """The reference generator's first outputs from states 0 and 1234567."""
    gamma = 0x9E3779B97F4A7C15
    assert splitmix64(keys(0, gamma, 2 * gamma % 2**64)).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert splitmix64(keys(1234567)).tolist() == [6457827717110365317]


def test_the_bytes_of_a_sketch_are_the_same_on_every_machine() -> None:
    sketch = CountMinSketch(1000, 3, seed=7)
    sketch.add(np.arange(500, dtype=np.uint64) ** np.uint64(3), np.arange(500) / 8)
    digest = hashlib.sha256(sketch.to_bytes()).hexdigest()
    assert digest == "de06db97eecc0dc7fc956a0f34875394c3f0afe08810e4196ba2952117fb9b1b"


def test_cells_are_found_as_whole_numbers_say() -> None:
    """The same in Python's integers: row seed r is the generator's output r from the seed."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mixed(state: int) -> int:
        z = (state + gamma) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    sketch = CountMinSketch(99_991, 4, seed=2**64 - 5)
    for key in (0, 1, 12345, 2**63, 2**64 - 1):
        for r, seed in enumerate(sketch._row_seeds):
            expected = mixed(key ^ mixed((2**64 - 5 + r * gamma) & mask))
            assert sketch._columns(keys(key), seed).tolist() == [(expected >> 32) * 99_991 >> 32]


def test_rows_and_seeds_collide_independently() -> None:
    many = np.arange(100_000, dtype=np.uint64)
    first, second = (CountMinSketch(1_000, 2, seed=seed) for seed in (0, 1))
    columns = [s._columns(many, seed) for s in (first, second) for seed in s._row_seeds]
    for column in columns:
        counts = np.bincount(column, minlength=1_000)
        assert ((counts - 100) ** 2 / 100).sum() < 1_200, "chi square of 999 degrees of freedom"
    for i in range(4):
        for j in range(i):
            assert (columns[i] == columns[j]).mean() == pytest.approx(0.001, abs=5e-4)


def test_element_keys_are_distinct_within_a_tensor_and_between_tensors() -> None:
    one, two = element_keys("00000000000000ff", range(300)), element_keys("f" * 16, range(200))
    assert one.dtype == np.uint64
    assert one[:2].tolist() == [255, 256]
    assert two[:2].tolist() == [2**64 - 1, 0], "sums wrap around"
    assert len(np.unique(one)) == 300


@pytest.mark.parametrize(
    ("parameters", "offline", "runtime"),
    [
        (0, 100_000, 10_000),
        (10_000_000, 100_000, 10_000),
        (10_000_001, 100_001, 10_001),
        (123_456_789, 1_234_568, 123_457),
    ],
)
def test_sizes_follow_the_documents_formulas(parameters: int, offline: int, runtime: int) -> None:
    worker, trainer = CountMinSketch.offline(parameters), CountMinSketch.runtime(parameters)
    assert (worker.width, worker.depth) == (offline, 10)
    assert (trainer.width, trainer.depth) == (runtime, 7)
    assert worker.nbytes == 40 * offline


def test_no_sketch_takes_more_than_500_megabytes() -> None:
    largest = CountMinSketch.offline(10**12)  # zeros that are never touched take no memory
    assert (largest.width, largest.nbytes) == (12_500_000, MAX_BYTES)
    with pytest.raises(TooLarge, match="500000000"):
        CountMinSketch(12_500_001, 10)


@given(STREAMS)
def test_a_blob_reads_back_as_the_sketch_that_wrote_it(stream: list[tuple[int, float]]) -> None:
    sketch = filled(stream)
    again = CountMinSketch.from_bytes(sketch.to_bytes())
    assert again.to_bytes() == sketch.to_bytes()
    assert (again.total, again.bound) == (sketch.total, sketch.bound)
    again.add(keys(9), [1.0])
    assert again.estimate(keys(9))[0] > 0


@pytest.mark.parametrize(
    ("metadata", "cells", "error", "names"),
    [
        ({"format": "other"}, None, Malformed, "format"),
        ({"version": "2"}, None, UnsupportedVersion, "version"),
        ({"seed": "-1"}, None, InvalidField, "seed"),
        ({"seed": "x"}, None, Malformed, "seed"),
        ({"total": "inf"}, None, NotFinite, "total"),
        ({"total": "-0x1p0"}, None, InvalidField, "total"),
        ({}, np.full((2, 3), -1, np.float32), InvalidField, "cells"),
        ({}, np.ones(3, np.float32), Malformed, "cells"),
        ({}, np.ones((2, 3), np.float16), ShapeMismatch, "cells"),
        ({}, np.ones((0, 3), np.float32), InvalidField, "depth"),
    ],
)
def test_a_blob_that_is_no_sketch_is_refused_by_name(
    metadata: dict[str, str],
    cells: npt.NDArray[np.float32] | None,
    error: type[ContractError],
    names: str,
) -> None:
    arrays, written = unpack_arrays(filled([(1, 1.0)]).to_bytes())
    blob = pack_arrays({"cells": arrays["cells"] if cells is None else cells}, written | metadata)
    with pytest.raises(error, match=names):
        CountMinSketch.from_bytes(blob)


@pytest.mark.parametrize(
    ("values", "error", "names"),
    [
        ([1.0, -1.0], InvalidField, r"values\[1\]"),
        ([1.0, math.nan], NotFinite, r"values\[1\]"),
        ([math.inf, 1.0], NotFinite, r"values\[0\]"),
        ([1.0], ShapeMismatch, "values"),
        ([1e38, 1e38], TooLarge, "total"),
        ([1.7e308, 1.7e308], TooLarge, "total"),
    ],
)
def test_values_that_cannot_be_summed_are_refused_and_change_nothing(
    values: list[float], error: type[ContractError], names: str
) -> None:
    sketch = filled([(1, 2.0)])
    before = sketch.to_bytes()
    with pytest.raises(error, match=names):
        sketch.add(keys(1, 2), values)
    assert sketch.to_bytes() == before


def test_what_does_not_fit_a_sketch_is_refused_by_name() -> None:
    sketch = CountMinSketch(10, 2)
    with pytest.raises(ShapeMismatch, match="uint64"):
        sketch.estimate(np.arange(3))  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch, match="2 x 11"):
        sketch.merge(CountMinSketch(11, 2))
    with pytest.raises(InvalidField, match="seed"):
        sketch.merge(CountMinSketch(10, 2, seed=1))
    for factor in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(InvalidField, match="decay"):
            sketch.decay(factor)
    for width, depth in ((0, 1), (1, 0)):
        with pytest.raises(InvalidField, match="width and depth"):
            CountMinSketch(width, depth)
