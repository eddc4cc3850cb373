"""Fixtures for everybody: one real server a test process, a fresh partition a test."""

from __future__ import annotations

import os

# Test processes run side by side: each computes with one thread, unless the caller says otherwise.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

import gc
import itertools
from collections.abc import Iterator
from hashlib import sha256
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

    ``ELESH_TEST_REDIS_URL`` names another one instead; its other partitions are left alone.
    """
    if url := os.environ.get("ELESH_TEST_REDIS_URL"):
        yield url
        return
    with embedded_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def partition(redis_url: str) -> Iterator[str]:
    """A partition that no other test of any process uses; its keys are deleted afterwards."""
    name = f"test-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{next(_numbers)}"
    yield name
    with Redis.from_url(redis_url) as client:
        if keys := list(client.scan_iter(f"elesh:{{{name}}}*", 1000)):
            client.unlink(*keys)


@pytest.fixture
def station(redis_url: str, partition: str, tmp_path: Path) -> Iterator[Station]:
    """A fresh partition with worker processes that end with the test."""
    made = Station(redis_url, partition, tmp_path)
    yield made
    for worker in made.workers:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


@pytest.fixture(scope="module", autouse=True)
def frozen_objects() -> None:
    """What imports and other modules left is not looked through again by every collection and every
    search for living optimizers: a test process has a million objects."""
    gc.collect()
    gc.freeze()


IN_CI = 5
"""So many cases of a ``sampled`` test run in CI; all of them in ``make soak``."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``sampled``, the first case is quick, some drawn by their names are slow,
    and the others are soak tests."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        rest = sorted(cases[1:], key=lambda case: sha256(case.nodeid.encode()).digest())
        for number, case in enumerate(rest, 2):
            case.add_marker(pytest.mark.slow if number <= IN_CI else pytest.mark.soak)
