"""The Offline Cache's local half: trackers of the runs that were looked at last, within a size.

Promises: a tracker is the same whatever epochs arrived in which order; the least recently used run
goes first when the size is exceeded, and what is gone is only read again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from leyline import CheckpointBundle, Level

from .tracker import ImportanceTracker, channel_metrics

__all__ = ["TrackerCache", "measurements_of"]


def measurements_of(bundle: CheckpointBundle, history: int) -> ImportanceTracker:
    """A tracker that has observed this one checkpoint: what the history keeps of it.

    Channel groups with the three metrics of their statistics; other levels carry theirs in their
    own decisions.
    """
    tracker = ImportanceTracker(history)
    for name, data in bundle.channels.items():
        group = bundle.architecture.group[name]
        if group.level is Level.CHANNEL:
            tracker.observe(bundle.metadata.epoch, group, channel_metrics(data))
    return tracker


class TrackerCache:
    """Trackers by run, at most ``nbytes`` in all (``analysis_cache_size``)."""

    def __init__(self, nbytes: int, history: int) -> None:
        self._limit, self._history = nbytes, history
        self._runs: OrderedDict[str, ImportanceTracker] = OrderedDict()
        self._seen: dict[str, set[int]] = {}

    def missing(self, run_id: str, epochs: list[int]) -> list[int]:
        """Which of these epochs the cached tracker has not taken in yet."""
        return [epoch for epoch in epochs if epoch not in self._seen.get(run_id, ())]

    def take(self, run_id: str, blobs: Mapping[int, bytes]) -> ImportanceTracker:
        """The run's tracker with these epochs taken in; other runs may have to go.

        Raises:
            ContractError: if a blob is not what it should be, or contradicts what is known.
        """
        tracker = self._runs.pop(run_id, None) or ImportanceTracker(self._history)
        seen = self._seen.setdefault(run_id, set())
        for epoch, blob in sorted(blobs.items()):
            tracker.merge(ImportanceTracker.from_bytes(blob, field=f"history.{run_id}.{epoch}"))
            seen.add(epoch)
        self._runs[run_id] = tracker
        while len(self._runs) > 1 and self.nbytes > self._limit:
            gone, _ = self._runs.popitem(last=False)
            self._seen.pop(gone, None)
        return tracker

    @property
    def nbytes(self) -> int:
        """Bytes of all cached trackers."""
        return sum(tracker.nbytes for tracker in self._runs.values())
