"""What is read from a worker and its bus at every scrape: gauges, by name.

The names without the prefix ``elesh`` are the design document's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from elesh.bus import Backlog, Bus, BusUnavailable
from elesh.bus.state.breakers import BreakerView, State
from elesh.observe.metrics import Reading, gauge
from leyline import Level
from leyline.streams import DEAD, STREAMS

from .status import Status

__all__ = ["FleetFigures", "register_fleet", "register_worker"]

_STATES: tuple[State, ...] = ("half_open", "open")
_BREAKER_LEVELS = (Level.CHANNEL, Level.HEAD, Level.LAYER)
_LOOKED_AT = frozenset({stream.name for stream in STREAMS if stream.group} | {DEAD.name})

_OF_WORKER: Mapping[str, tuple[str, Callable[[Status], float]]] = {
    "structured_analysis_completion_rate": (
        "Share of this worker's analyses that gave a result.",
        lambda status: status.completion_rate,
    ),
    "peak_memory_usage": (
        "Highest resident bytes of the compute child.",
        lambda status: status.peak_memory,
    ),
    "analysis_duration_p95": (
        "95th percentile of the seconds of the last thousand analyses.",
        lambda status: status.duration_p95,
    ),
    "elesh.ready": (
        "1 if the worker can take work, else 0.",
        lambda status: status.condition.ready,
    ),
}
_OF_STREAM: Mapping[str, tuple[str, Callable[[Backlog], float | None]]] = {
    "elesh.stream.length": (
        "Entries in the stream.",
        lambda backlog: backlog.length,
    ),
    "elesh.stream.lag": (
        "Entries that were never delivered to the workers' group.",
        lambda backlog: backlog.waiting,
    ),
    "elesh.stream.pending": (
        "Entries delivered and not yet acknowledged.",
        lambda backlog: backlog.pending,
    ),
    "elesh.stream.oldest_seconds": (
        "Age of the oldest entry that is not done; 0 if all are.",
        lambda backlog: backlog.oldest_seconds or 0.0,
    ),
    "elesh.stream.lease_age_seconds": (
        "The longest time since the lease of a pending entry was renewed; 0 without any.",
        lambda backlog: backlog.lease_seconds or 0.0,
    ),
}


@dataclass
class FleetFigures:
    """What the bus said last of its streams, breakers and shed messages."""

    backlog: Mapping[str, Backlog] = field(default_factory=dict)
    breakers: list[BreakerView] = field(default_factory=list)
    shed: Mapping[str, int] = field(default_factory=dict)

    async def refresh(self, bus: Bus) -> None:
        """Ask again; the old figures stay if the bus is away."""
        with contextlib.suppress(BusUnavailable):
            self.backlog = await bus.registry.backlog()
            self.breakers = await bus.breakers.show()
            self.shed = await bus.shed()

    def of_streams(self, read: Callable[[Backlog], float | None]) -> list[Reading]:
        """A figure of every stream that has a group, and of the dead letters."""
        found = {name: read(backlog) for name, backlog in self.backlog.items()}
        return [
            (value, {"stream": name})
            for name, value in found.items()
            if name in _LOOKED_AT and value is not None
        ]

    def of_breakers(self) -> list[Reading]:
        """How many breakers are not closed, by level and state; whose, ``elesh status`` says."""
        counts = Counter((view.level, view.state) for view in self.breakers)
        return [
            (counts[level, state], {"level": level.value, "state": state})
            for level in _BREAKER_LEVELS
            for state in _STATES
        ]

    def of_shed(self) -> list[Reading]:
        """Messages that were shed so far, by stream and priority."""
        parts = [(name.partition(":"), count) for name, count in self.shed.items()]
        return [
            (count, {"stream": stream, "priority": priority})
            for (stream, _, priority), count in parts
        ]


def register_worker(status: Status) -> None:
    """Have the figures of a worker read from here on."""

    def of_worker(read: Callable[[Status], float]) -> Callable[[], list[Reading]]:
        return lambda: [(read(status), {})]

    for name, (description, read) in _OF_WORKER.items():
        gauge(name, description, of_worker(read))
    gauge(
        "multi_level_accuracy",
        "By level, the share of approved cuts that the trainer's own check confirmed.",
        lambda: [(share, {"level": level}) for level, share in status.confirmed().items()],
    )


def register_fleet(figures: FleetFigures) -> None:
    """Have the figures of the bus read from here on, by its callers."""

    def of_stream(read: Callable[[Backlog], float | None]) -> Callable[[], list[Reading]]:
        return lambda: figures.of_streams(read)

    for name, (description, read_stream) in _OF_STREAM.items():
        gauge(name, description, of_stream(read_stream))
    gauge(
        "elesh.shed",
        "Messages that found no room, since the partition began; by stream and priority.",
        figures.of_shed,
    )
    gauge(
        "elesh.breakers",
        "Breakers of runs that are not closed; by level and state.",
        figures.of_breakers,
    )
