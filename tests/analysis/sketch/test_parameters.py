"""Parameter masks: never a live element, packed as the contract says, checked against samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elesh.analysis import CountMinSketch, element_keys
from elesh.analysis.sketch.parameter_masks import (
    Marking,
    allotted,
    analyze_parameters,
    expected_recall,
    sampled_indices,
)
from leyline import IdempotencyKey, InvalidField, Level, ParameterIdentifier, PruningMasks

KEY = IdempotencyKey(40, "0123456789abcdef", "rq-1", Level.PARAMETER)


def tensor(path: str, *shape: int) -> ParameterIdentifier:
    return ParameterIdentifier(path=path, shape=shape, dtype="float32")


def sketch_of(values: dict[ParameterIdentifier, np.ndarray], width: int, depth: int = 10):  # type: ignore[no-untyped-def]
    sketch = CountMinSketch(width, depth)
    for parameter, exact in values.items():
        sketch.add(element_keys(parameter.identifier, np.arange(exact.size)), exact.ravel())
    return sketch


def marked(masks: PruningMasks, parameter: ParameterIdentifier) -> np.ndarray:  # type: ignore[type-arg]
    size = math.prod(parameter.shape)
    for mask in masks.masks:
        if mask.parameter == parameter:
            bits = np.unpackbits(np.frombuffer(mask.bits, np.uint8))
            assert not bits[size:].any()
            return bits[:size] == 0
    return np.zeros(size, bool)


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    dead=st.floats(0, 1),
    width=st.integers(1, 4000),
    depth=st.integers(1, 10),
    ranks=st.integers(1, 3),
)
def test_no_live_element_is_ever_marked(
    seed: int, sizes: list[int], dead: float, width: int, depth: int, ranks: int
) -> None:
    random = np.random.default_rng(seed)
    values = {}
    for number, size in enumerate(sizes):
        exact = random.lognormal(-10, 6, size)
        exact[random.random(size) < dead] = 0
        values[tensor(f"t{number}", size)] = exact
    merged = CountMinSketch(width, depth)
    for _ in range(ranks):
        merged.merge(sketch_of({p: v / ranks for p, v in values.items()}, width, depth))
    masks, report = analyze_parameters(KEY, list(values), merged, {}, Marking(1e-6, 0.0))
    for parameter, exact in values.items():
        assert not (marked(masks, parameter) & (exact >= 1e-6)).any()
    assert report.marked == sum(mask.marked for mask in masks.masks)


def test_recall_is_what_was_expected() -> None:
    parameter = tensor("w", 400, 500)
    exact = np.where(np.random.default_rng(1).random(200_000) < 0.7, 0.0, 1.0)
    sketch = sketch_of({parameter: exact}, 60_000)
    masks, report = analyze_parameters(KEY, [parameter], sketch, {}, Marking())
    recall = (marked(masks, parameter) & (exact == 0)).sum() / (exact == 0).sum()
    assert report.expected_recall == expected_recall(sketch, 1e-8)
    assert abs(recall - report.expected_recall) < 0.01
    assert recall > 0.5


def test_threads_do_not_change_the_masks() -> None:
    parameter = tensor("w", 3, 1 << 20)
    exact = np.random.default_rng(2).lognormal(-18, 3, 3 << 20)
    sketch = sketch_of({parameter: exact}, 1_000_000, 4)
    one, _ = analyze_parameters(KEY, [parameter], sketch, {}, Marking())
    four, _ = analyze_parameters(KEY, [parameter], sketch, {}, Marking(), threads=4)
    assert one == four
    assert one.masks[0].marked > 0


def test_samples_give_a_confidence_and_too_little_gives_no_masks() -> None:
    parameter = tensor("w", 2000)
    exact = np.zeros(2000)
    sketch = sketch_of({parameter: exact}, 5000)

    def confidence(count: int) -> tuple[float, int]:
        samples = {parameter.identifier: exact[sampled_indices(parameter, count)]}
        masks, report = analyze_parameters(KEY, [parameter], sketch, samples, Marking())
        return report.confidence, len(masks.masks)

    many, few = confidence(1000), confidence(20)
    assert many[0] == pytest.approx(0.05 ** (1 / 1000))
    assert many[1] == 1
    assert few[0] == pytest.approx(0.05 ** (1 / 20))
    assert few[1] == 0


def test_a_sketch_below_a_known_element_is_refused_by_name() -> None:
    parameter = tensor("layer.weight", 100)
    exact = np.ones(100)
    damaged = sketch_of({parameter: exact / 2}, 5000)
    samples = {parameter.identifier: exact[sampled_indices(parameter, 50)]}
    with pytest.raises(InvalidField, match=r"layer\.weight"):
        analyze_parameters(KEY, [parameter], damaged, samples, Marking())


def test_a_tensor_that_is_dead_altogether_is_named() -> None:
    parameter = tensor("unused.weight", 64)
    sketch = sketch_of({parameter: np.zeros(64)}, 1000)
    _, report = analyze_parameters(KEY, [parameter], sketch, {}, Marking())
    assert any("unused.weight" in text for text in report.recommendations)


@given(size=st.integers(1, 100_000), count=st.integers(1, 300), name=st.text("abc", min_size=1))
def test_sampled_indices_rise_and_lie_in_the_tensor(size: int, count: int, name: str) -> None:
    parameter = tensor(name, size)
    indices = sampled_indices(parameter, min(size, count))
    assert (np.diff(indices) > 0).all()
    assert indices[0] >= 0
    assert indices[-1] < size


@given(sizes=st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_samples_are_allotted_by_size_and_reach_every_tensor(sizes: list[int]) -> None:
    parameters = [tensor(f"t{i}", size) for i, size in enumerate(sizes)]
    given_out = allotted(parameters, 10_000)
    assert all(1 <= given_out[p.identifier] <= p.shape[0] for p in parameters if p.shape[0])
    assert sum(given_out.values()) <= 10_000 + len(sizes)
