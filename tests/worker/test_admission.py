"""Admission is a function of the entry and the time: what comes too late is refused by name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from contracts.examples import MESSAGES
from elesh.bus.admission import Work, admit, fingerprint, read
from leyline import (
    CheckpointReady,
    Expired,
    Message,
    PreflightCheck,
    StructuralAnalysisRequest,
    encode,
    wrap,
)

NOW = datetime(2025, 1, 14, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
BOTH = [MESSAGES["CheckpointReady"], MESSAGES["StructuralAnalysisRequest"]]


def admitted(
    message: Message,
    at: datetime,
    *,
    deadline: datetime | None = None,
    redriven: datetime | None = None,
    window: float = 60,
) -> Work:
    """What is admitted at that time of a message of ``NOW`` that lives for ten minutes."""
    envelope = wrap(message, source="test", now=NOW, ttl=10 * MINUTE, deadline=deadline)
    work = admit(read(encode(envelope)), window=window, now=at, redriven=redriven)
    assert isinstance(work, Work)
    return work


@pytest.mark.parametrize("message", BOTH, ids=lambda message: type(message).__name__)
def test_time_to_live_and_deadline_both_hold_and_the_earlier_one_counts(message: Message) -> None:
    assert admitted(message, NOW + 10 * MINUTE).received == NOW + 10 * MINUTE
    with pytest.raises(Expired, match="12:10:00"):
        admitted(message, NOW + 11 * MINUTE)
    soon, late = NOW + 5 * MINUTE, NOW + 60 * MINUTE
    assert admitted(message, soon, deadline=soon)
    with pytest.raises(Expired, match="12:05:00"):
        admitted(message, NOW + 6 * MINUTE, deadline=soon)
    with pytest.raises(Expired, match="12:10:00"):
        admitted(message, NOW + 11 * MINUTE, deadline=late)


@pytest.mark.parametrize("message", BOTH, ids=lambda message: type(message).__name__)
def test_who_sends_it_again_wants_it_whatever_the_deadline_was(message: Message) -> None:
    again = NOW + 120 * MINUTE
    assert admitted(message, again + 9 * MINUTE, deadline=NOW + MINUTE, redriven=again)
    with pytest.raises(Expired, match="14:10:00"):
        admitted(message, again + 11 * MINUTE, deadline=NOW + MINUTE, redriven=again)


def test_a_request_has_the_shorter_of_its_own_time_and_the_workers_window() -> None:
    ready, request = BOTH
    assert isinstance(request, StructuralAnalysisRequest)
    short = request.model_copy(update={"timeout": timedelta(seconds=7)})
    assert admitted(short, NOW, window=60).window == 7
    assert admitted(short, NOW, window=5).window == 5
    assert admitted(ready, NOW, window=60).window == 60


def test_a_run_that_begins_anew_publishes_the_same_content_whatever_its_preflight_took() -> None:
    ready = BOTH[0]
    assert isinstance(ready, CheckpointReady)

    def of(accuracy: float, *seconds: float) -> str:
        checks = tuple(PreflightCheck(name="mask", result="ok", seconds=each) for each in seconds)
        told = {"preflight": checks or None, "accuracy": accuracy}
        metadata = ready.metadata.model_copy(update=told)
        return fingerprint(ready.model_copy(update={"metadata": metadata}))

    assert of(0.5, 0.1) == of(0.5, 0.2) == of(0.5)
    assert of(0.5, 0.1) != of(0.6, 0.1)
