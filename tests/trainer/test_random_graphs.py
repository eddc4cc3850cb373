"""A slice of ``python -m tests.random_graphs``: decisions on random networks hold in every way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from random_cases import check

CASES = 100


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_decisions_on_random_networks_hold_in_every_way() -> None:
    tallies = [check(seed) for seed in range(CASES)]
    assert sum(tally.channels for tally in tallies) > CASES
    assert sum(tally.heads for tally in tallies) > 0
    assert sum(tally.layers for tally in tallies) > 0
