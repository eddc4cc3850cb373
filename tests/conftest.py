"""Fixtures for everybody: one real server a test process, a fresh partition a test."""

from __future__ import annotations

import os

# Test processes run side by side: each computes with one thread, unless the caller says otherwise.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
# Threads that wait for each other do not spin: where there are more of them than free cores,
# spinning takes seven times what the tests compute.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import gc
import itertools
import signal
import sys
from collections.abc import Generator, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from command import logging_kept
from hypothesis import HealthCheck, settings
from recorded import Recorded, recorded_run
from redis import Redis
from station import Station

from elesh.bus import embedded_server

_numbers = itertools.count(1)
# A machine that is slow or loaded fails nothing.
settings.register_profile("elesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("elesh"), max_examples=40)
settings.register_profile("quick", settings.get_profile("elesh"), max_examples=20)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What processes of this session leave behind goes here, not to the user's own folder."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["ELESH_STATE_DIR"] = str(folder)
    base = tmp_path_factory.getbasetemp()
    # Each xdist process has a folder in one of the whole run's.
    os.environ["ELESH_TEST_SHARED"] = str(
        base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    )
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


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A real demo run, made once for all test processes: for tests that only look at it."""
    with recorded_run(tmp_path_factory.mktemp("recorded")) as run:
        yield run


@pytest.fixture(scope="module", autouse=True)
def frozen_objects() -> None:
    """What imports and other modules left is not looked through again by every collection and every
    search for living optimizers: a test process has a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test depends on which others its process ran: what a process has one of is as it was.

    Logging and the number of threads are put back; else a test that leaves a change behind fails.
    """
    before = _process_wide()
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    with logging_kept():
        yield
    if torch:
        torch.set_num_threads(threads)
    after = _process_wide().items()
    left = {name: now for name, now in after if before[name] is not None and now != before[name]}
    assert not left, f"left behind, was { ({name: before[name] for name in left}) }: {left}"


def _process_wide() -> dict[str, object]:
    variables = {k: v for k, v in os.environ.items() if k.startswith(("ELESH_", "OTEL_", "OMP_"))}
    state: dict[str, object] = {
        "environment": variables,
        "folder": os.getcwd(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch": None,
    }
    if torch := sys.modules.get("torch"):
        deterministic = torch.are_deterministic_algorithms_enabled()
        state["torch"] = torch.get_default_dtype(), deterministic
    return state


def pytest_configure(config: pytest.Config) -> None:
    """The quicker the tier, the fewer examples are drawn.

    Nothing that is imported until all tests are known is garbage: to look for some in it again and
    again takes a second a process.
    """
    gc.disable()
    tiers = {"not slow": "quick", "not soak": "ci"}
    chosen = config.getoption("markexpr", "")
    settings.load_profile(next((tiers[kind] for kind in tiers if kind in chosen), "elesh"))


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One process more than cores: many tests wait, for a lease, an outage, or a browser."""
    cores = yield
    return cores + ("PYTEST_XDIST_AUTO_NUM_WORKERS" not in os.environ)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The quick tests do not import a file that is slow as a whole, nor the frameworks that it
    needs."""
    if "not slow" not in config.getoption("markexpr", "") or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text() or None


def pytest_collection_finish() -> None:
    """From here on, garbage is collected."""
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """What is left is looked through once: pytest would do so five times, a million objects."""
    gc.collect()
    gc.freeze()


IN_CI = 5
"""So many cases of a ``sampled`` test run in CI; the others in ``make soak``."""
LONG = ("system", "trainer", "worker", "pruning", "program")
"""Folders whose files take long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first; and of a test marked ``sampled``, the first case is quick, some drawn by
    their names are slow, and the others are soak tests."""
    watching = {item.path for item in items if "recorded" in getattr(item, "fixturenames", ())}

    def place(item: pytest.Item) -> int:
        if item.path in watching:  # The demo's own tests record it, while others need not wait.
            return -1 if item.path.name == "test_demo.py" else len(LONG)
        found = (n for n, folder in enumerate(LONG) if f"tests/{folder}/" in item.nodeid)
        return next(found, len(LONG) + 1)

    items.sort(key=place)
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        rest = sorted(cases[1:], key=lambda case: sha256(case.nodeid.encode()).digest())
        for number, case in enumerate(rest, 2):
            case.add_marker(pytest.mark.slow if number <= IN_CI else pytest.mark.soak)
