"""Which messages are shed while too much waits: low priorities first, emergencies never. Pure."""

from __future__ import annotations

import math

from leyline import Priority
from leyline.streams import STREAMS, Stream

__all__ = ["SHED_FROM", "WORK", "shed_from"]

WORK = frozenset(stream for stream in STREAMS if stream.group)
"""Streams that a group works on; the others are trimmed instead."""
SHED_FROM = {
    Priority.LOW: 0.5,
    Priority.NORMAL: 0.75,
    Priority.HIGH: 0.85,
    Priority.CRITICAL: 0.95,
}
"""Share of ``stream_length`` that may wait before messages of a priority are shed."""


def shed_from(stream: Stream, priority: Priority, length: int) -> int:
    """The backlog from which a priority is shed of a stream that may hold ``length`` entries; 0
    for what is never shed."""
    share = SHED_FROM.get(priority, 0.0) if stream in WORK else 0.0
    return math.ceil(share * length)
