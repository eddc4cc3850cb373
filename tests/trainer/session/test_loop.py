"""A name server that does not answer: the bus's thread ends all the same."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from elesh.trainer.session.bus_thread import new_loop


def test_a_look_up_that_hangs_is_not_waited_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, asked, ended = threading.Event(), threading.Event(), threading.Event()

    def hang(*_: Any) -> list[Any]:
        asked.set()
        answered.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)

    async def connect() -> None:
        opening = asyncio.create_task(asyncio.open_connection("redis.invalid", 6379))
        while not asked.is_set():  # noqa: ASYNC110 - another thread says so
            await asyncio.sleep(0.01)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)

    def serve() -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(connect())
        ended.set()

    threading.Thread(target=serve, daemon=True).start()
    assert ended.wait(60)
    answered.set()


def test_names_are_found_and_what_is_none_is_an_error() -> None:
    async def look() -> None:
        loop = asyncio.get_running_loop()
        (found, *_) = await loop.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
        assert found[4][0] in ("127.0.0.1", "::1")
        with pytest.raises(socket.gaierror):
            await loop.getaddrinfo("no such name", 80)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(look())
