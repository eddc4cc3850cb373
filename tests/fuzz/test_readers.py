"""Hostile bytes are read or refused by name: nothing else, quickly, and the same each time."""

from __future__ import annotations

import pytest

from tests.fuzz.readers import readers
from tests.fuzz.run import fuzz


def test_sound_bytes_are_read_so_that_mutations_reach_deep() -> None:
    for name, (reader, sound) in readers().items():
        if name in ("message", "sketch", "tracker", "sealed") or name.endswith(("Data", "s")):
            for data in sound:
                reader(data)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.sampled
def test_hostile_bytes_are_read_or_refused_by_name(seed: int) -> None:
    results = fuzz(4000, seed)
    assert [result for result in results if result.code.startswith("!")] == []
    assert {"malformed", "invalid_field", "too_large"} <= {result.code for result in results}
    assert {result.reader for result in results} == readers().keys()
