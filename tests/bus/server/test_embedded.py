from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis

from elesh.bus import (
    Bus,
    BusUnavailable,
    EmbeddedServer,
    embedded_server,
    server_url,
    shared_server,
)
from elesh.bus.server import embedded
from elesh.settings import BusSettings

OWNER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from elesh.bus import EmbeddedServer
    with EmbeddedServer(Path(sys.argv[1])) as server:
        print(server.url, server.pid, server.owned, flush=True)
        sys.stdin.read()
""")


@contextlib.contextmanager
def another_process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, int, bool]]:
    """A process that uses the folder's server until its input ends; URL, server's pid, owner."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url, pid, owned = process.stdout.readline().split()
        yield process, url, int(pid), owned == "True"
    finally:
        process.kill()
        process.wait()


def ended(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=120)
    return not psutil.pid_exists(pid)


@pytest.mark.slow
def test_the_server_is_found_by_a_second_process_and_ends_with_the_first(tmp_path):
    with (
        another_process(tmp_path) as (first, url, pid, first_owns),
        another_process(tmp_path) as (second, second_url, second_pid, second_owns),
    ):
        assert (second_url, second_pid) == (url, pid)
        assert (first_owns, second_owns) == (True, False)
        second.communicate()
        with Redis.from_url(url) as client:
            assert client.set("kept", "yes")
        first.communicate()
        assert ended(pid)
    with EmbeddedServer(tmp_path) as server, Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"


def test_the_server_ends_in_order_when_its_owner_is_killed(tmp_path):
    with another_process(tmp_path) as (owner, url, pid, _):
        with Redis.from_url(url) as client:
            client.set("kept", "yes")
        os.kill(owner.pid, signal.SIGKILL)
        # At once, while the old one may be just ending: never two on the same data.
        with EmbeddedServer(tmp_path) as server, Redis.from_url(server.url) as client:
            if server.owned:
                assert ended(pid)
                assert client.get("kept") == b"yes"
        assert ended(pid)
    assert "ready to exit" in (tmp_path / "redis" / "server.log").read_text()


def test_many_at_once_agree_on_one_server(tmp_path):
    servers = [EmbeddedServer(tmp_path) for _ in range(6)]
    barrier, hold = threading.Barrier(7), threading.Event()

    def use(server: EmbeddedServer) -> None:
        server.start()
        barrier.wait()
        hold.wait()  # the thread that started the server must outlive it

    threads = [threading.Thread(target=use, args=[server]) for server in servers]
    for thread in threads:
        thread.start()
    barrier.wait()
    try:
        assert len({server.url for server in servers}) == 1
        assert sum(server.owned for server in servers) == 1
    finally:
        for server in servers:
            server.stop()
        hold.set()
        for thread in threads:
            thread.join()


def test_a_server_that_was_killed_is_replaced_with_nothing_lost(tmp_path):
    with EmbeddedServer(tmp_path) as first:
        with Redis.from_url(first.url) as client:
            client.set("kept", "yes")
        os.kill(first.pid, signal.SIGKILL)
        first._process.wait()
        with EmbeddedServer(tmp_path) as second, Redis.from_url(second.url) as client:
            assert second.owned
            assert client.get("kept") == b"yes"


def test_a_server_other_than_the_file_says_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "b" / "redis"
    folder.mkdir(parents=True)
    with EmbeddedServer(tmp_path / "a") as other, (folder / "alive.lock").open("wb") as alive:
        monkeypatch.setattr(embedded, "_START_SECONDS", 0.1)
        fcntl.flock(alive, fcntl.LOCK_EX)
        described = (other.folder / "server.json").read_text()
        (folder / "server.json").write_text(described.replace(str(other.pid), "1"))
        with pytest.raises(BusUnavailable, match="holds the folder and does not answer"):
            EmbeddedServer(tmp_path / "b").start()
        (folder / "server.json").write_text(described)
        assert EmbeddedServer(tmp_path / "b").start() == other.url


def test_only_the_user_can_read_the_password_and_only_this_machine_can_connect(tmp_path):
    with EmbeddedServer(tmp_path) as server, Redis.from_url(server.url) as client:
        password = server.url.split(":")[2].split("@")[0]
        assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((server.folder / "server.json").stat().st_mode) == 0o600
        assert password not in " ".join(psutil.Process(server.pid).cmdline())
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.config_get("appendonly")["appendonly"] == "yes"
        assert client.config_get("appendfsync")["appendfsync"] == "everysec"
        with pytest.raises(BusUnavailable, match="check user and password"):
            asyncio.run(Bus.connect(server.url.replace(f":{password}@", ""), BusSettings()))


def test_an_interrupt_from_the_terminal_does_not_reach_the_server(tmp_path):
    with EmbeddedServer(tmp_path) as server:
        assert os.getsid(server.pid) == server.pid != os.getsid(0)


def test_a_taken_port_is_tried_again_with_another(tmp_path, redis_url, monkeypatch):
    taken = int(redis_url.rsplit(":", 1)[1].split("/")[0])
    free = embedded._free_port
    ports = iter([taken, taken])
    monkeypatch.setattr(embedded, "_free_port", lambda: next(ports, None) or free())
    with EmbeddedServer(tmp_path) as server:
        assert server.owned
        assert str(taken) not in server.url


def test_a_server_that_cannot_start_says_why(tmp_path):
    with EmbeddedServer(tmp_path) as server:
        aof = server.folder / "data" / "appendonlydir"
    manifest = next(aof.glob("*.manifest"))
    manifest.write_text("nonsense\n")
    with pytest.raises(BusUnavailable, match="AOF manifest"):
        EmbeddedServer(tmp_path).start()


def test_a_platform_without_a_server_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    with pytest.raises(BusUnavailable, match=r"pdp11.*--redis or ELESH_REDIS_URL"):
        EmbeddedServer(tmp_path).start()


def test_a_url_goes_before_the_environment_and_that_before_the_embedded_server(
    tmp_path, monkeypatch
):
    async def chosen(url: str = "") -> str:
        async with server_url(url) as found:
            return found

    monkeypatch.setenv("ELESH_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("ELESH_REDIS_URL", "redis://environment")
    assert asyncio.run(chosen("redis://argument")) == "redis://argument"
    assert asyncio.run(chosen()) == "redis://environment"
    monkeypatch.delenv("ELESH_REDIS_URL")
    assert asyncio.run(chosen()) == f"redis+embedded://{tmp_path}/redis"
    assert (tmp_path / "redis" / "server.json").exists()
    with embedded_server(tmp_path) as url, Redis.from_url(url) as client:
        assert client.ping()


@pytest.mark.slow
def test_a_demo_goes_on_when_the_one_that_started_its_server_ends(tmp_path, monkeypatch):
    async def answers(url: str) -> bool:
        bus = await Bus.connect(url, BusSettings())
        await bus.close()
        return True

    monkeypatch.setenv("ELESH_STATE_DIR", str(tmp_path))
    with another_process(tmp_path) as (owner, _, pid, owns), shared_server() as url:
        assert owns
        assert asyncio.run(answers(url))
        owner.communicate()
        assert ended(pid)
        assert asyncio.run(answers(url)), "started again by this process"
    with pytest.raises(BusUnavailable):
        asyncio.run(answers(url))


def test_a_server_that_ends_without_a_word_is_an_error_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedServer(tmp_path)
    mute = tmp_path / "mute"  # as on a full disk: its log is there, and empty
    mute.write_text(f"#!/bin/sh\n: > '{server.folder}/server.log'\nexit 1\n")
    mute.chmod(0o700)
    monkeypatch.setattr(server, "_binary", lambda: mute)
    with pytest.raises(BusUnavailable, match="ended at once and wrote no log"):
        server.start()
