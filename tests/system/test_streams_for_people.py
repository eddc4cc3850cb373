"""`elesh dead` and `elesh events`: what operators see of the streams, and what they can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import elesh
from redis import Redis
from station import Station, checkpoint

from leyline.streams import CHECKPOINTS, DEAD, OPERATIONS


class Line:
    """The command line on one partition."""

    def __init__(self, station: Station) -> None:
        self._environment = {
            "ELESH_REDIS_URL": station.url, "ELESH_BUS__PARTITION": station.partition,
        }  # fmt: skip

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = elesh(*arguments, environment=self._environment)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def objects(self, *arguments: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(*arguments, "--json").splitlines()]


@pytest.fixture
def line(station: Station) -> Line:
    return Line(station)


def test_a_letter_is_listed_shown_redriven_once_and_dropped(station: Station, line: Line) -> None:
    station.worker()
    with Redis.from_url(station.url) as redis:
        redis.xadd(CHECKPOINTS.key(station.partition), {"envelope": b"\xc1 nonsense"})
    station.wait_for(lambda: station.read(DEAD), "the dead letter")
    (facts,) = line.objects("dead", "list")
    dead_letter = facts["dead_letter"]
    assert "malformed" in line("dead", "list")
    shown = line("dead", "show", dead_letter)
    assert "checkpoints/" in shown
    assert "c1 20 6e 6f" in shown, "the original's bytes"
    assert "published again" in line("dead", "redrive", dead_letter, "--reason", "try")
    station.wait_for(lambda: len(station.read(DEAD)) == 2, "the original to fail again")
    assert "had been redriven already" in line("dead", "redrive", dead_letter)
    assert "published again" in line("dead", "redrive", "--all", "--code", "malformed")
    line("dead", "drop", dead_letter, "--reason", "nonsense")
    assert "expected the entry of a dead letter" in line("dead", "show", dead_letter, code=1)
    audit = line.objects("events", "--stream", "operations")
    assert [event["what"].split(": ")[1].split()[0] for event in audit] == [
        "redrive", "redrive", "drop",
    ]  # fmt: skip
    assert len(station.read(OPERATIONS)) == 3


def test_events_say_when_whose_and_what_and_can_be_narrowed(station: Station, line: Line) -> None:
    station.publish(checkpoint(epoch=41), checkpoint(epoch=42, number=2))
    with Redis.from_url(station.url) as redis:
        redis.xadd(CHECKPOINTS.key(station.partition), {"envelope": b"nonsense"})
    first, second, third = line("events", "--stream", "checkpoints").splitlines()
    for told, epoch in ((first, "41"), (second, "42")):
        words = told.split()
        begins = words.index("checkpoints")  # after the time, and the date where it is another
        assert words[begins : begins + 3] == ["checkpoints", "run", epoch]
        assert "checkpoint ck-" in told
    assert "unreadable: envelope: expected msgpack" in third
    events = line.objects("events", "--run", "run")
    assert [event["epoch"] for event in events] == [41, 42]
    assert line("events", "--run", "another") == ""
    assert "expected one of checkpoints" in line("events", "--stream", "nonsense", code=1)


def test_every_message_of_the_catalogue_can_be_told(tmp_path: Path) -> None:
    from contracts import examples
    from elesh.bus import Delivery
    from elesh.operate.events import format_event
    from leyline import encode, wrap
    from leyline.streams import REDELIVERIES, STREAMS

    for stream in STREAMS:
        for kind in stream.messages:
            message = examples.MESSAGES[kind.__name__]
            envelope = encode(wrap(message, source="test"))
            fields = {b"envelope": envelope}
            if stream is REDELIVERIES:
                own = next(s for s in STREAMS if kind in s.messages and s is not stream)
                fields[b"origin"] = f"{own.name}/1736856000000-0".encode()
            told = format_event(Delivery(stream, "1736856000250-0", fields, 0))
            assert told.kind == kind.__name__
            assert told.what
