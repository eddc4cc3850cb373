"""Fixtures for everybody: one real server a session, a fresh partition a test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from station import Station

from elesh.bus import embedded_server

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What processes of this session leave behind goes here, not to the user's own folder."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["ELESH_STATE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server, started for this test session and stopped at its end.

    ``ELESH_TEST_REDIS_URL`` names another one instead, whose data is lost.
    """
    if url := os.environ.get("ELESH_TEST_REDIS_URL"):
        yield url
        return
    with embedded_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def partition(redis_url: str) -> Iterator[str]:
    """A partition that no other test uses; the server is emptied afterwards."""
    yield f"test-{next(_numbers)}"
    with Redis.from_url(redis_url) as client:
        client.flushall()


@pytest.fixture
def station(redis_url: str, partition: str, tmp_path: Path) -> Iterator[Station]:
    """A fresh partition with worker processes that end with the test."""
    made = Station(redis_url, partition, tmp_path)
    yield made
    for worker in made.workers:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()
