from __future__ import annotations

import asyncio
import logging
from urllib.parse import urlsplit

import pytest
from bus_messages import outcome, publish

from elesh.bus import Bus, BusUnavailable, EmbeddedServer, embedded_server, masked
from elesh.bus.server import embedded
from elesh.bus.server.embedded import _free_port
from elesh.settings import BusSettings
from elesh.settings.masking import masked_line
from leyline.streams import OUTCOMES


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:1/0", "redis://:***@host:1/0"),
        ("rediss://user:se:cret@host/0", "rediss://user:***@host/0"),
        ("redis://:se/c@ret@host/0", "redis://:***@host/0"),
        ("redis://host:1/0", "redis://host:1/0"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis+cluster://a:7000,b:7001", "redis+cluster://a:7000,b:7001"),
        ("redis://user:secret", "redis://user:***"),
        ("user:secret@host:1", "user:***@host:1"),
        ("redis://host/0?passwd=secret&db=1", "redis://host/0?passwd=***&db=1"),
        ("unix:///run/x.sock?db=1&password=secret", "unix:///run/x.sock?db=1&password=***"),
    ],
)
def test_passwords_are_masked(url, shown):
    assert masked(url) == shown


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("at redis://u:a b@h:1/0 now", "at redis://u:***@h:1/0 now"),
        ("url='redis://u:a'b\"c@h'", "url='redis://u:***@h'"),
        ("redis://u:p@h:1 and redis://v:q@i", "redis://u:***@h:1 and redis://v:***@i"),
        ("redis://h:6379/0 is away; ask x@y", "redis://h:6379/0 is away; ask x@y"),
    ],
)
def test_passwords_with_any_character_are_masked_in_lines(line, shown):
    assert masked_line(line) == shown


def test_a_bus_that_is_away_says_so_in_one_line_without_the_password():
    url = f"redis://:secret@127.0.0.1:{_free_port()}/0"
    with pytest.raises(BusUnavailable) as caught:
        asyncio.run(Bus.connect(url, BusSettings()))
    text = str(caught.value)
    assert "secret" not in text
    assert "\n" not in text
    assert masked(url) in text
    assert "is the server running?" in text


def test_a_wrong_password_and_a_wrong_url_are_named(tmp_path):
    with (
        embedded_server(tmp_path) as url,
        pytest.raises(BusUnavailable, match="check user and password"),
    ):
        asyncio.run(
            Bus.connect(url.replace(f":{urlsplit(url).password}@", ":wrong@"), BusSettings())
        )
    with pytest.raises(BusUnavailable, match="use redis://host:port/0"):
        asyncio.run(Bus.connect("http://host", BusSettings()))


def test_a_publish_whose_answer_was_lost_is_sent_once_and_can_be_repeated(redis_url, partition):
    """Through a proxy that hands one command on and hangs up."""
    host, port = "127.0.0.1", urlsplit(redis_url).port
    sent: list[bytes] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def hang_up_after_a_script(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        upstream_reader, upstream = await asyncio.open_connection(host, port)
        answers = asyncio.create_task(copy(upstream_reader, writer))
        while data := await reader.read(65536):
            if b"EVALSHA" in data:
                answers.cancel()
                await asyncio.wait([answers])
                upstream.write(data)
                sent.append(await upstream_reader.read(1))
                break
            upstream.write(data)
        upstream.close()
        writer.close()

    async def scenario() -> None:
        direct = await Bus.connect(redis_url, BusSettings(partition=partition))
        await direct.publish(OUTCOMES, outcome(), source="test")
        server = await asyncio.start_server(hang_up_after_a_script, host, 0)
        proxied = redis_url.replace(str(port), str(server.sockets[0].getsockname()[1]))
        bus = await Bus.connect(proxied, BusSettings(partition=partition))
        with pytest.raises(BusUnavailable):
            await bus.publish(OUTCOMES, outcome(), source="test", event_id="event")
        assert len(sent) == 1
        entry_id = await direct.publish(OUTCOMES, outcome(), source="test", event_id="event")
        assert [entry.entry_id for entry in await direct.read(OUTCOMES)][1:] == [entry_id]
        await bus.close()
        await direct.close()
        server.close()

    asyncio.run(scenario())


@pytest.fixture
def steady_url(monkeypatch):
    """The URL that every embedded server of the test has, as a server that restarts would."""
    port = _free_port()
    monkeypatch.setattr(embedded, "_free_port", lambda: port)
    monkeypatch.setattr(embedded.secrets, "token_urlsafe", lambda _: "password")
    return f"redis://:password@127.0.0.1:{port}/0"


def test_waiting_for_the_bus_ends_when_it_is_back_and_logs_one_line(tmp_path, caplog, steady_url):
    async def scenario() -> None:
        waiting = asyncio.create_task(Bus.connect_when_available(steady_url, BusSettings()))
        while not caplog.records:  # noqa: ASYNC110 - the log has no event to wait for
            await asyncio.sleep(0)
        with EmbeddedServer(tmp_path):
            bus = await waiting
            await publish(bus, 1)
            assert len(await bus.read(OUTCOMES)) == 1
            await bus.close()

    with caplog.at_level(logging.DEBUG, "elesh.bus"):
        asyncio.run(scenario())
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "password" not in caplog.text


def test_waiting_for_the_bus_ends_when_told_to_stop():
    async def scenario() -> None:
        stop = asyncio.Event()
        url = f"redis://127.0.0.1:{_free_port()}"
        waiting = asyncio.create_task(Bus.connect_when_available(url, BusSettings(), stop=stop))
        await asyncio.sleep(0)
        stop.set()
        assert await waiting is None

    asyncio.run(scenario())


def test_a_bus_that_comes_back_is_used_again_by_the_same_object(tmp_path, steady_url):
    async def scenario() -> None:
        with EmbeddedServer(tmp_path):
            bus = await Bus.connect(steady_url, BusSettings())
            await publish(bus, 1)
        with pytest.raises(BusUnavailable):
            await publish(bus, 2)
        with EmbeddedServer(tmp_path):
            assert await bus.when_available()
            assert len(await bus.read(OUTCOMES)) == 1
            await bus.close()

    asyncio.run(scenario())
