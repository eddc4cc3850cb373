"""The envelope around every message on the bus."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from .base import Count, Duration, Epoch, Identifier, Label, Message, Moment, Name, WireEnum


class Priority(WireEnum):
    """Order of service and of shedding; emergency is never shed."""

    EMERGENCY = "emergency"
    CRITICAL = "critical"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


TTL = {
    Priority.EMERGENCY: timedelta(hours=2),
    Priority.CRITICAL: timedelta(hours=2),
    Priority.HIGH: timedelta(hours=1),
    Priority.NORMAL: timedelta(minutes=30),
    Priority.LOW: timedelta(minutes=5),
}
"""How long a message of each priority is worth serving."""

TimeToLive = Annotated[
    Duration,
    Field(gt=timedelta(0), le=timedelta(hours=2)),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 7200}),
]


class EventEnvelope(Message):
    """Who sends what, when, and until when it matters; ``payload`` is the encoded message."""

    schema_version: Annotated[int, Field(ge=1)] = 1
    """Read before anything else; newer ones are refused."""
    event_id: Identifier
    """The same when the same event is published again."""
    event_type: Name
    """Type of the message; the same as ``payload_type``."""
    source_subsystem: Name
    """Who sent it."""
    created_at: Moment
    processing_deadline: Moment | None = None
    """When an answer no longer matters."""
    ttl: TimeToLive = TTL[Priority.NORMAL]
    """Seconds from ``created_at`` in which it is worth serving."""
    payload: bytes
    """The encoded message."""
    payload_type: Name
    """Name of the message in the catalogue."""
    payload_encoding: Literal["msgpack"] = "msgpack"
    priority: Priority = Priority.NORMAL
    routing_keys: tuple[Name, ...] = ()
    correlation_id: Label = ""
    """What it answers to."""
    attempts: Count = 0
    """Earlier attempts of the sender."""
    training_run_id: Label = ""
    epoch: Epoch | None = None
    sequence: Count = 0
    """Order of the sender's events."""
