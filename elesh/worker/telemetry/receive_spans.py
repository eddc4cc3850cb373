"""Spans for entries that a worker received; polls that brought nothing leave none."""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.trace import SpanKind

from elesh.bus import Delivery
from elesh.observe import messaging, span_from
from leyline.streams import WORKERS

__all__ = ["record_receipts"]


def record_receipts(
    deliveries: Sequence[Delivery], begun: int, server: tuple[str, int] | None = None
) -> None:
    """One span an entry, from when it was there and asked for until now.

    Args:
        begun: when it was asked for, in nanoseconds since 1970. What the poll waited before the
            entry was published is no part of the entry's story.
        server: that it came from.
    """
    now = time.time_ns()
    for delivery in deliveries:
        name = delivery.stream.name
        published = int(delivery.entry_id.partition("-")[0]) * 1_000_000
        waited = max(0, now - published) / 1e9
        with span_from(
            delivery.carrier,
            f"receive {name}",
            kind=SpanKind.CLIENT,
            attributes=messaging(
                "receive", name, entry_id=delivery.entry_id, group=WORKERS, server=server
            )
            | {"elesh.queued_seconds": waited},
            start=min(max(begun, published), now),
        ):
            pass
