"""The units that may be removed, as one array: groups side by side, in the given order.

Promises: a unit's place in the row never changes during a selection, and the capacity of a group
(how many units it may still lose) already holds its minimum and its multiple.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from leyline import PruningGroup

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Candidates:
    """G groups with C units altogether; unit ``u`` of group ``g`` lies at ``starts[g] + u``."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    capacities: tuple[int, ...]
    """How many units each group may lose, at most."""
    multiples: tuple[int, ...]
    """The number kept must be a multiple of this wherever a group loses anything."""

    @classmethod
    def of(cls, groups: Sequence[PruningGroup], minimum: int, round_to: int = 1) -> Candidates:
        """The candidates of ``groups`` (those of no capacity included: they lose nothing)."""
        floors = [floor_of(group, minimum, round_to) for group in groups]
        return cls(
            names=tuple(group.name for group in groups),
            sizes=tuple(group.size for group in groups),
            capacities=tuple(
                max(0, g.size - floor) for g, floor in zip(groups, floors, strict=True)
            ),
            multiples=tuple(multiple_of(group, round_to) for group in groups),
        )

    def limited(self, capacities: Mapping[str, int]) -> Candidates:
        """The same candidates where each group may lose at most so many, 0 if not named."""
        return replace(
            self,
            capacities=tuple(
                min(capacity, capacities.get(name, 0))
                for name, capacity in zip(self.names, self.capacities, strict=True)
            ),
        )

    @cached_property
    def count(self) -> int:
        """Number of units C."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> Ints:
        """[G + 1]: where each group begins; the last entry is C."""
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def group_of(self) -> Ints:
        """[C]: the number of the group of each unit."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def span(self, group: int) -> slice:
        """Where the units of a group lie."""
        return slice(int(self.starts[group]), int(self.starts[group + 1]))

    def split(self, row: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """A row of C values by the names of the groups."""
        return {name: row[self.span(g)] for g, name in enumerate(self.names)}

    def by_group(self, units: Sequence[int] | Ints) -> dict[str, tuple[int, ...]]:
        """Places in the row as rising unit numbers by group, groups that lose nothing left out."""
        places = np.sort(np.asarray(units, dtype=np.int64))
        own = (places - self.starts[self.group_of[places]]).tolist()
        ends = np.searchsorted(places, self.starts).tolist()
        return {
            name: tuple(own[start:end])
            for name, start, end in zip(self.names, ends[:-1], ends[1:], strict=True)
            if start < end
        }


def multiple_of(group: PruningGroup, round_to: int) -> int:
    """What the number of units kept must be a multiple of."""
    return math.lcm(group.unit_multiple, round_to)


def floor_of(group: PruningGroup, minimum: int, round_to: int = 1) -> int:
    """The fewest units that ``group`` may keep: the minimum, raised to the next multiple."""
    multiple = multiple_of(group, round_to)
    return -(-max(minimum, 1) // multiple) * multiple
