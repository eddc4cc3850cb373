"""A slice of ``python -m tests.random_graphs``: decisions on random networks hold in every way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from random_cases import check

SLICES = (range(6), range(6, 40), range(40, 100))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "seeds",
    [
        SLICES[0],
        pytest.param(SLICES[1], marks=pytest.mark.slow),
        pytest.param(SLICES[2], marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_decisions_on_random_networks_hold_in_every_way(seeds: range) -> None:
    tallies = [check(seed) for seed in seeds]
    assert sum(tally.channels for tally in tallies) > len(seeds)
    if len(seeds) > len(SLICES[0]):
        assert sum(tally.heads for tally in tallies) > 0
    if len(seeds) > len(SLICES[1]):  # A layer that may go is rare among random ones.
        assert sum(tally.layers for tally in tallies) > 0
