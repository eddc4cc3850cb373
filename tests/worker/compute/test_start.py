"""A worker starts quickly: neither process loads what only the other one needs.

While a fleet has lost a worker, what its successor loads is time in which work waits.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest


@cache
def loaded_by(module: str) -> frozenset[str]:
    """What a fresh interpreter has loaded once ``module`` is imported."""
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return frozenset(ended.stdout.split())


@pytest.mark.parametrize("needless", ["redis", "opentelemetry", "starlette", "elesh.bus", "scipy"])
def test_the_compute_child_starts_without(needless: str) -> None:
    assert needless not in loaded_by("elesh.worker.compute.child")


@pytest.mark.parametrize("needless", ["scipy", "torch", "elesh.analysis", "elesh.program"])
def test_the_supervisor_starts_without(needless: str) -> None:
    assert needless not in loaded_by("elesh.worker.supervisor")
