"""The candidates' row: floors, rooms and places."""

from __future__ import annotations

import pytest
from networks import chain

from elesh.analysis.candidates import Candidates, floor_of


@pytest.mark.parametrize(
    ("multiple", "minimum", "round_to", "floor"),
    [(1, 16, 1, 16), (4, 17, 1, 20), (4, 16, 6, 24), (8, 0, 1, 8), (1, 0, 1, 1)],
)
def test_the_minimum_is_raised_to_the_next_common_multiple(
    multiple: int, minimum: int, round_to: int, floor: int
) -> None:
    group = chain((40,), multiples=(multiple,)).groups[0]
    assert floor_of(group, minimum, round_to) == floor
    assert Candidates.of([group], minimum, round_to).capacities == (40 - floor,)


def test_places_in_the_row_are_told_by_group_in_rising_order() -> None:
    candidates = Candidates.of(chain((3, 4, 2)).groups, 1)
    assert candidates.count == 9
    assert candidates.by_group([8, 4, 3, 0]) == {"g0": (0,), "g1": (0, 1), "g2": (1,)}
    assert [candidates.span(g).start for g in range(3)] == [0, 3, 7]
