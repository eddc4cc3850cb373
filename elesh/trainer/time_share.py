"""How much of a training's time Elesh takes, and what it postpones to stay within its share.

Promises: no check of a cut is left out; what is put off is said. On a processor the time is what
the training thread computed, so that waiting, and others on the machine, count for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class TimeShare:
    """Counts the training's time and Elesh's from :meth:`begin` on.

    Args:
        limit: the share of the training's time that Elesh may take; 0: any.
        clock: seconds; None: what suits the device.
        device: that the network is on.
    """

    def __init__(
        self,
        limit: float,
        clock: Callable[[], float] | None = None,
        device: torch.device | None = None,
    ) -> None:
        on_processor = device is None or device.type == "cpu"
        self._limit = limit
        self._clock = clock or (time.thread_time if on_processor else time.perf_counter)
        self._begun, self.taken = self._clock(), 0.0
        self._paused: float | None = None
        self._each: float | None = None

    @property
    def trained(self) -> float:
        """Seconds that were not Elesh's."""
        now = self._clock() if self._paused is None else self._paused
        return max(now - self._begun - self.taken, 0.0)

    @property
    def over(self) -> bool:
        """Whether Elesh has taken more than its share."""
        return self._limit > 0 and self.taken > self._limit * self.trained

    @contextmanager
    def taking(self) -> Iterator[None]:
        """What is done inside is Elesh's; until it ends, it counts for nothing."""
        begun = self._paused = self._clock()
        try:
            yield
        finally:
            self._paused = None
            self.taken += self._clock() - begun

    @contextmanager
    def measuring(self, samples: int) -> Iterator[None]:
        """What is done inside measures so many samples, which says what one of them costs."""
        begun = self._clock()
        yield
        self._each = (self._clock() - begun) / max(samples, 1)

    def samples(self, there_are: int, least: int) -> int:
        """How many calibration samples there is time for: all of them, a half, a quarter and so on,
        but no fewer than ``least``. All before the first of them was measured."""
        if self._limit <= 0 or self._each is None:
            return there_are
        left = self._limit * self.trained - self.taken
        count = there_are
        while count > least and count * self._each > left:
            count = max(count // 2, least)
        return count
