"""Logs: one line an event, with the trace it belongs to, and no password in them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider

from elesh.observe import get_logger, setup_logging
from elesh.observe.logs import _Writer


def test_lines_carry_the_trace_that_they_belong_to(capsys: pytest.CaptureFixture[str]) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    log = get_logger("elesh.test")
    with tracer.start_as_current_span("work") as span:
        trace_id = format(span.get_span_context().trace_id, "032x")
        setup_logging("json")
        log.warning("fallback", rung="worker_crash")
        logging.getLogger("elesh").handlers[0].flush()
        setup_logging("plain")
        log.warning("fallback", rung="worker_crash")
    logging.getLogger("elesh").handlers[0].flush()
    log.info("idle")
    logging.getLogger("elesh").handlers[0].flush()
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
    logging.getLogger("elesh").handlers[0].flush()
    printed = capsys.readouterr().err
    assert "user:***@host" in printed
    assert "se-cret" not in printed


STALLED = """
import logging, sys, time
from elesh.observe import get_logger, setup_logging
if len(sys.argv) > 1:
    setup_logging()
log, begun = get_logger("elesh.test"), time.monotonic()
for number in range(1500):
    log.warning("line", number=number, filling="x" * 100)
if len(sys.argv) > 1:
    logging.getLogger("some.library").error("of somebody else")
print(time.monotonic() - begun, flush=True)
"""


@pytest.mark.parametrize("reader", ["stalls", "is gone"])
@pytest.mark.parametrize("setup", [["ours"], []], ids=["our set-up", "a script without any"])
@pytest.mark.sampled
def test_a_log_reader_that_stalls_or_is_gone_holds_up_nothing(
    reader: str, setup: list[str]
) -> None:
    there, here = os.pipe()
    if reader == "is gone":
        os.close(there)
    with subprocess.Popen(
        [sys.executable, "-c", STALLED, *setup], stderr=here, stdout=subprocess.PIPE, text=True
    ) as process:
        os.close(here)
        assert process.stdout is not None
        assert float(process.stdout.readline()) < 20
        assert process.wait(timeout=120) == 0
    if reader == "stalls":
        os.close(there)


BARE = """
import logging, os, sys
from elesh.observe import get_logger
log = get_logger("elesh.test")
log.info("nothing to see")
log.warning("first", number=1)
if os.fork() == 0:
    log.warning("of a forked process")
    os._exit(0)
os.wait()
logging.basicConfig(format="root: %(message)s")
log.warning("second")
"""


def test_a_script_without_a_set_up_sees_warnings_once_and_its_own_set_up_goes_first() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BARE], capture_output=True, text=True, timeout=200
    )
    lines = done.stderr.splitlines()
    assert sorted(lines) == ["first number=1", "of a forked process", "root: second"]


def test_lines_that_found_no_reader_are_counted() -> None:
    there, here = os.pipe()
    with os.fdopen(here, "w") as stream:
        handler = _Writer(stream)
        for number in range(3000):
            handler.handle(logging.makeLogRecord({"msg": f"{number:0100d}"}))
        read: list[bytes] = []
        reading = threading.Thread(target=lambda: read.append(os.read(there, 1 << 20)))
        reading.start()
        reading.join()
        deadline = time.monotonic() + 20
        while handler._lines.full() and time.monotonic() < deadline:
            read.append(os.read(there, 1 << 20))
        handler.handle(logging.makeLogRecord({"msg": "the last"}))
        while b"the last" not in read[-1] and time.monotonic() < deadline:
            read.append(os.read(there, 1 << 20))
    assert b"log lines found no reader)\n" in b"".join(read)
    os.close(there)
