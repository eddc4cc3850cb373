"""Redundancy: planted duplicates are found, and everyone given up is like the one kept for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import floats

from elesh.analysis.importance.scores import Pair, redundant_pairs


def cosine(activations: np.ndarray) -> np.ndarray:
    unit = activations / np.linalg.norm(activations, axis=1, keepdims=True)
    return floats(unit @ unit.T)


@pytest.mark.parametrize("seed", range(5))
def test_planted_duplicates_with_noise_and_scale_are_found_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    originals = rng.standard_normal((200, 512))
    parents = rng.choice(200, size=60, replace=False)
    noise = 0.1 * rng.standard_normal((60, 512))
    copies = (originals[parents] + noise) * rng.uniform(0.2, 5, size=(60, 1))
    scores = np.concatenate([np.full(200, 2.0), np.full(60, 1.0)])
    pairs = redundant_pairs(cosine(np.vstack([originals, copies])), scores, 0.95)
    planted = {(int(parent), 200 + i) for i, parent in enumerate(parents)}
    found = {(pair.kept, pair.removed) for pair in pairs}
    assert len(found & planted) >= 0.99 * len(found)
    assert len(found & planted) >= 0.99 * len(planted)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 90), threshold=st.sampled_from([0.5, 0.95]))
def test_the_stars_are_those_of_a_plain_search(seed: int, size: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    matrix = cosine(rng.standard_normal((size, 3)))
    scores = rng.integers(0, 4, size).astype(np.float64)
    waiting, wanted = set(range(size)), []
    for kept in sorted(range(size), key=lambda unit: (-scores[unit], unit)):
        if kept in waiting:
            waiting.remove(kept)
            alike = [u for u in sorted(waiting) if matrix[kept, u] > np.float32(threshold)]
            waiting -= set(alike)
            wanted += [Pair(kept, u, float(matrix[kept, u])) for u in alike]
    assert redundant_pairs(matrix, scores, threshold) == tuple(
        sorted(wanted, key=lambda pair: pair.removed)
    )


def test_a_chain_gives_up_only_who_is_like_the_kept_one() -> None:
    angles = np.array([0.0, 0.25, 0.5])  # neighbours are alike (.969), the ends are not (.878)
    matrix = floats(np.cos(angles[:, None] - angles[None, :]))
    best_at_the_end = redundant_pairs(matrix, np.array([3.0, 2.0, 1.0]), 0.95)
    assert [(p.kept, p.removed) for p in best_at_the_end] == [(0, 1)]
    best_in_the_middle = redundant_pairs(matrix, np.array([1.0, 3.0, 2.0]), 0.95)
    assert [(p.kept, p.removed) for p in best_in_the_middle] == [(1, 0), (1, 2)]


def test_opposite_and_threshold_similarities_are_not_redundant() -> None:
    matrix = floats([[1, -1, 0.95], [-1, 1, 0], [0.95, 0, 1]])
    assert redundant_pairs(matrix, np.zeros(3), 0.95) == ()
    at_the_threshold = floats([[1, 0.99, 0.95], [0.99, 1, 0], [0.95, 0, 1]])
    assert [p.removed for p in redundant_pairs(at_the_threshold, np.zeros(3), 0.95)] == [1]


def test_half_precision_matrices_are_read() -> None:
    matrix = np.array([[1, 0.99], [0.99, 1]], dtype=np.float16)
    assert len(redundant_pairs(matrix, np.array([1.0, 2.0]), 0.95)) == 1
