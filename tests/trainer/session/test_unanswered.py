"""What was published and not answered: looked for ever more rarely, answered once, ended in time;
and a mailbox that says the truth about what it takes."""

from __future__ import annotations

import os

import pytest
from trainer_nets import build, measured

from elesh.bus import BadAddress
from elesh.trainer import Session
from elesh.trainer.session.mailbox import Ended, Mailbox, Outgoing, Published, Unanswered
from leyline.streams import OUTCOMES


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def published(key: str) -> Published:
    return Published(key, None, 1, "event", "1-0", lives=100.0)  # type: ignore[arg-type]


def test_answers_are_looked_for_ever_more_rarely_and_soon_after_an_outage() -> None:
    clock = Clock()
    waiting = Unanswered(clock)
    waiting.add(published("a"))
    looks = []
    for second in range(301):
        clock.now = float(second)
        looks += [second for _ in waiting.due()]
    assert looks == [10, 30, 70, 150, 270]
    waiting.hurry()
    assert [each.key for each in waiting.due()] == ["a"]
    assert waiting.is_over(published("b")) or waiting.due() == []


def test_an_answer_counts_once_whichever_way_it_comes() -> None:
    waiting = Unanswered(Clock())
    waiting.add(published("a"))
    assert waiting.decided("a")
    assert not waiting.decided("a")
    assert waiting.decided("of a coordinator's request")
    waiting.add(published("a"))  # published again by a run that was killed
    assert waiting.due() == []


def test_that_nobody_answers_is_known_after_half_a_minute_and_until_the_first_decision() -> None:
    clock = Clock()
    waiting = Unanswered(clock)
    first, second = published("a"), published("b")
    waiting.add(first)
    waiting.add(second)
    clock.now = 29.0
    assert not waiting.nobody_answers(first)
    clock.now = 31.0
    assert waiting.nobody_answers(first)
    waiting.decided("b")
    assert not waiting.nobody_answers(first), "a slow worker is no missing one"


def outgoing() -> Outgoing:
    return Outgoing(OUTCOMES, None, {}, 1)  # type: ignore[arg-type]


def test_a_forked_process_and_a_closed_session_say_that_they_cannot_publish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mailbox = Mailbox()
    assert mailbox.post(outgoing())
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert not mailbox.post(outgoing())
    monkeypatch.undo()
    mailbox.close()
    assert not mailbox.post(outgoing())
    assert mailbox.missed == 2
    mailbox.deliver(Ended("key", "poison: it stopped every worker"))
    assert mailbox.received() == [Ended("key", "poison: it stopped every worker")]


def test_a_run_that_no_worker_answered_says_so_and_what_became_of_its_checkpoints() -> None:
    session = Session("run", "redis://127.0.0.1:1/0")
    assert session.unanswered == ""
    session.publish(measured(build("Vgg")))
    assert "none of 1 checkpoints was answered: a worker must run" in session.unanswered
    session._mailbox.deliver(Ended("key", "poison: it stopped every worker"))
    assert session.unanswered.endswith("was answered: poison: it stopped every worker")
    session.close()


def test_a_url_that_names_no_bus_is_refused_before_training_begins() -> None:
    with pytest.raises(BadAddress, match="database number"):
        Session("run", "redis://host/first")
