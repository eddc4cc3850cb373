"""OpenTelemetry settings that cannot be met: one line, no traceback, and an end within its time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import time
from elesh.observe import setup_logging, setup_tracing, shutdown_tracing, span
from elesh.observe.metrics import setup_metrics, shutdown_metrics
from elesh.settings import Settings
setup_logging()
setup_tracing("a", "b", Settings().observe)
setup_metrics("a", "b", prometheus=False)
with span("x"):
    pass
begun = time.monotonic()
shutdown_tracing()
shutdown_metrics()
print(time.monotonic() - begun)
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("OTEL_PROPAGATORS=b3", "OTEL_PROPAGATORS"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT=x", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        ("OTEL_PYTHON_TRACER_PROVIDER=x", "OTEL_PYTHON_TRACER_PROVIDER"),
        ("OTEL_PYTHON_CONTEXT=x", "OTEL_PYTHON_CONTEXT"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT=nonsense", "nonsense"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT=https://127.0.0.1:1 OTEL_EXPORTER_OTLP_CERTIFICATE=/no", ""),
    ],
)
@pytest.mark.sampled
def test_a_setting_that_cannot_be_met_is_a_line_and_no_traceback(
    variables: str, said: str, tmp_path: Path
) -> None:
    given = dict(pair.split("=", 1) for pair in variables.split())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=os.environ | given | {"ELESH_STATE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert float(done.stdout) < 25, "three seconds, and a slow machine"
