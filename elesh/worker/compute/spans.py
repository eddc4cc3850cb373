"""What the compute child measures of its stages, for the supervisor to make spans of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stage", "Stopwatch"]

Stage = tuple[str, int, int, int]
"""Name, place of its parent among the stages (-1: none), begin and end in ns since 1970."""
_MOST = 256


class Stopwatch:
    """Measures the stages of one job; the first 256 are kept."""

    def __init__(self) -> None:
        self._stages: list[Stage] = []
        self._open: list[int] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure one stage; an observer for :func:`elesh.analysis.spans.observed`."""
        if len(self._stages) >= _MOST:
            yield
            return
        place, parent = len(self._stages), self._open[-1] if self._open else -1
        begun = time.time_ns()
        self._stages.append((name, parent, begun, begun))
        self._open.append(place)
        try:
            yield
        finally:
            self._open.pop()
            self._stages[place] = (name, parent, begun, max(begun, time.time_ns()))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What was measured, parents before their children."""
        return tuple(self._stages)
