"""Which units a proof removes of each group: some, and nearly all.

Promises: drawn from a seed; a number of units is left that may be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leyline import PruningGroup

__all__ = ["around_a_run", "fitting", "some_of", "stays"]

_FEW_NORMED, _FEW = 8, 3
"""How many stay where nearly all are cut: behind a normalisation, and otherwise."""


def fitting(group: PruningGroup, count: int) -> int:
    """About so many units, so that a number is left that may be."""
    multiple = group.unit_multiple
    return group.size - max(multiple, (group.size - count) // multiple * multiple)


def around_a_run(size: int, count: int, rng: np.random.Generator) -> list[int]:
    """So many units, so that those which stay lie side by side, wherever: what is left of a weight
    need not be copied then."""
    first = int(rng.integers(count + 1))
    return [*range(first), *range(size - count + first, size)]


def some_of(groups: Sequence[PruningGroup], rng: np.random.Generator) -> dict[str, int]:
    """Of each group a number of units at random: another one than of the group of its size before
    it. A third at least, as what is left takes time and memory; and where there are enough, two
    stay at least, as a single one would be broadcast."""
    numbers: dict[int, list[int]] = {}
    found: dict[str, int] = {}
    for group in groups:
        size = group.size
        if size not in numbers:
            least, most = max(1, size // 3), size - 1 if size < 5 else size - 2
            numbers[size] = rng.permutation(np.arange(least, most + 1)).tolist()
        found[group.name] = count = numbers[size].pop(0)
        numbers[size].append(count)
    return found


def stays(group: PruningGroup) -> int:
    """How many units stay where nearly all are cut."""
    if group.norms and group.norms[0].width == 1:
        return _FEW_NORMED
    return _FEW if group.size > 2 * _FEW else 1
