"""Logs: one line an event, with the trace it belongs to, and no password in them."""

from __future__ import annotations

import json

import pytest
from opentelemetry.sdk.trace import TracerProvider

from elesh.observe import get_logger, setup_logging


def test_lines_carry_the_trace_that_they_belong_to(capsys: pytest.CaptureFixture[str]) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    log = get_logger("elesh.test")
    with tracer.start_as_current_span("work") as span:
        trace_id = format(span.get_span_context().trace_id, "032x")
        setup_logging("json")
        log.warning("fallback", rung="worker_crash")
        setup_logging("plain")
        log.warning("fallback", rung="worker_crash")
    log.info("idle")
    as_json, plain, outside = capsys.readouterr().err.splitlines()
    values = json.loads(as_json)
    assert (values["message"], values["level"]) == ("fallback", "warning")
    assert (values["rung"], values["trace_id"]) == ("worker_crash", trace_id)
    assert plain.endswith(f"fallback rung=worker_crash trace={trace_id[:8]}")
    assert "trace=" not in outside


@pytest.mark.parametrize("style", ["json", "plain"])
def test_a_password_is_never_in_a_line(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(style)  # type: ignore[arg-type]
    get_logger("elesh.test").error("bus away", url="redis://user:se-cret@host:6379/0")
    try:
        raise ValueError("redis://:se-cret@host")
    except ValueError:
        get_logger("elesh.test").exception("lost")
    printed = capsys.readouterr().err
    assert "user:***@host" in printed
    assert "se-cret" not in printed
