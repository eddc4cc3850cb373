"""Redundant channels of one group: cosine similarity of their activations over a threshold.

Promises: every channel that is given up is more similar than the threshold to the one that is kept
for it. The channels given up for one form a star around it, not a connected component: similarity
is not transitive, and in a chain of neighbours the ends may be similar to none that stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from elesh.analysis.candidates import Bools, Candidates, Doubles, Floats
from elesh.analysis.spans import stage

__all__ = ["Pair", "pairs_of_groups", "redundant_pairs"]

_ROWS = 64
"""Rows read at a time: a block of a 2048 x 2048 matrix stays in the cache."""


@dataclass(frozen=True)
class Pair:
    """A redundant channel and the better one that is kept for it."""

    kept: int
    removed: int
    similarity: float


def redundant_pairs(correlations: Floats, scores: Doubles, threshold: float) -> tuple[Pair, ...]:
    """The stars of channels with cosine similarity above ``threshold``, best channel in the middle.

    From the highest score down (ties by index), a channel that was not given up yet is kept, and
    all that are alike to it and neither kept nor given up are given up for it. Opposite channels
    (similarity near -1) do not count as redundant (the design document's rule).

    Args:
        correlations: [C, C] cosine similarities, symmetric; the upper triangle is read once to
            find who has a partner at all, then one row for each channel kept.
        scores: [C], higher is better.

    Returns:
        Pairs in the order of ``removed``.
    """
    limit = np.float32(threshold)
    waiting = _with_partner(correlations, limit)
    pairs: list[Pair] = []
    for kept in np.argsort(-scores, kind="stable"):
        if not waiting[kept]:
            continue
        waiting[kept] = False
        row = correlations[kept]
        for removed in np.flatnonzero(waiting & (row > limit)):
            waiting[removed] = False
            pairs.append(Pair(int(kept), int(removed), float(row[removed])))
    return tuple(sorted(pairs, key=lambda pair: pair.removed))


@stage("redundancy")
def pairs_of_groups(
    candidates: Candidates, matrices: Mapping[str, Floats | None], scores: Doubles, threshold: float
) -> tuple[Pair, ...]:
    """The redundant pairs within each group, as places in the row of candidates.

    Args:
        matrices: [C, C] similarities by group, where known.
        scores: [C] of all candidates.
    """
    pairs: list[Pair] = []
    for group, name in enumerate(candidates.names):
        matrix, span = matrices.get(name), candidates.span(group)
        if matrix is not None:
            start = span.start
            found = redundant_pairs(matrix, scores[span], threshold)
            pairs += [Pair(p.kept + start, p.removed + start, p.similarity) for p in found]
    return tuple(pairs)


def _with_partner(correlations: Floats, limit: np.float32) -> Bools:
    """[C]: which channels are alike to any other, from one blocked pass."""
    count = len(correlations)
    found = np.zeros(count, dtype=np.bool_)
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        alike = correlations[start:stop, start:] > limit
        np.fill_diagonal(alike, False)
        if alike.any():
            found[start:stop] |= alike.any(axis=1)
            found[start:] |= alike.any(axis=0)
    return found
