"""A slice of ``python -m tests.random_graphs``: decisions on random networks hold in every way."""

from __future__ import annotations

import pytest
from random_cases import check

CASES, SLICES = 240, 4


@pytest.mark.parametrize("part", range(SLICES))
def test_decisions_on_random_networks_hold_in_every_way(part: int) -> None:
    tallies = [check(seed) for seed in range(part, CASES, SLICES)]
    assert sum(tally.channels for tally in tallies) > len(tallies)
    assert sum(tally.heads for tally in tallies) > 0
