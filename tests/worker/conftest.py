"""A partition of the real server with worker processes that end with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from station import Station


@pytest.fixture
def station(redis_url: str, partition: str, tmp_path: Path) -> Iterator[Station]:
    """A fresh partition; its workers are ended afterwards."""
    made = Station(redis_url, partition, tmp_path)
    yield made
    for worker in made.workers:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()
