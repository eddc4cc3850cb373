"""Stages: named, nested, told to whoever listens, and without any effect on the decision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import networks

from elesh.analysis import analyze
from elesh.analysis.spans import observed
from leyline import encode


def test_an_analysis_tells_its_stages_and_decides_the_same() -> None:
    bundle = networks.bundle(networks.chain([40, 48, 32]), epoch=60)
    told: list[str] = []
    depth = 0

    @contextmanager
    def listen(name: str) -> Iterator[None]:
        nonlocal depth
        told.append("  " * depth + name)
        depth += 1
        yield
        depth -= 1

    with observed(listen):
        decision = analyze(bundle)
    assert told == ["score", "redundancy", "select", "gates", "join", "  verify"]
    assert encode(analyze(bundle)) == encode(decision)
    assert len(told) == 6
