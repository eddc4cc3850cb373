"""A slice of ``python -m tests.fuzz --worker``: a real worker under hostile messages and blobs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.fuzz.siege import besiege


@pytest.mark.slow
def test_hostile_messages_end_as_letters_or_decisions_and_the_worker_goes_on(
    redis_url: str, partition: str, tmp_path: Path
) -> None:
    found = asyncio.run(besiege(redis_url, partition, tmp_path, count=250, seed=7))
    assert found.violations == []
    assert found.entries == 250
    assert {"malformed", "invalid_field", "too_large", "decided"} <= found.ends.keys()
    assert sum(found.ends.values()) == 250
