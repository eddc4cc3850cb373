"""A real short run, recorded once: the pages are tested on it, not on invented figures."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from browser import Browser, browsing
from console_server import TOKEN, Site, serving_console
from redis import Redis

from elesh.bus import embedded_server
from elesh.settings import BusSettings, ConsoleSettings, Settings
from leyline import StructuralPruningDecision, read_envelope, unwrap

_DEMO = "demo --epochs 12 --every 1 --workers 1 --fail 1 --console"


@dataclass(frozen=True)
class Recorded:
    """A server on which ``elesh demo`` has run, with one checkpoint spoiled."""

    url: str
    run_id: str
    output: str
    """What the demo printed."""


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("ELESH_STATE_DIR")
    os.environ["ELESH_STATE_DIR"] = str(home)  # spans are looked for where the demo keeps them
    try:
        with embedded_server(tmp_path_factory.mktemp("recorded")) as url:
            done = subprocess.run(
                [sys.executable, "-m", "elesh.cli", *_DEMO.split()],
                env=os.environ | {"ELESH_REDIS_URL": url, "ELESH_CONSOLE__PORT": "0"},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=800,
            )
            with Redis.from_url(url) as client:
                [(_, fields)] = client.xrange("elesh:{main}:decisions", count=1)
            decision = unwrap(read_envelope(fields[b"envelope"]))
            assert isinstance(decision, StructuralPruningDecision)
            yield Recorded(url, decision.run_id, done.stdout)
    finally:
        if before is None:
            del os.environ["ELESH_STATE_DIR"]
        else:
            os.environ["ELESH_STATE_DIR"] = before


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def site(redis_url: str, partition: str) -> Iterator[Site]:
    """A console of the test's own partition, with a token."""
    settings = Settings(bus=BusSettings(partition=partition), console=ConsoleSettings(token=TOKEN))
    with serving_console(redis_url, settings) as made:
        yield made
