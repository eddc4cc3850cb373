"""What the bus hands out and takes in: deliveries, settlements, records. No Redis in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from leyline import DeadLetter, IdempotencyKey, Malformed, Message, read_envelope, unwrap
from leyline.errors import UnknownType, brief
from leyline.streams import Stream

__all__ = [
    "Delivery",
    "Pending",
    "Record",
    "Settlement",
    "Settling",
    "deliveries_of",
    "entry_fields",
    "read_letter",
]

_ENVELOPE = b"envelope"
_CONTEXT = ("traceparent", "tracestate")
_ORIGINAL = b"original."


@dataclass(frozen=True)
class Delivery:
    """One stream entry as a consumer got it; its bytes are nobody's promise yet."""

    stream: Stream
    entry_id: str
    fields: Mapping[bytes, bytes]
    deliveries: int
    """How often a group handed it out, 1 for the first time; 0 if it was read without a group."""

    @property
    def envelope(self) -> bytes:
        """The encoded EventEnvelope.

        Raises:
            Malformed: if the entry has no such field.
        """
        if _ENVELOPE not in self.fields:
            raise Malformed(
                f"{self.stream.name}/{self.entry_id}", "a field named envelope", sorted(self.fields)
            )
        return self.fields[_ENVELOPE]

    @property
    def carrier(self) -> dict[str, str]:
        """The W3C trace context that came along, possibly empty; unchecked."""
        found = {name: self.fields.get(name.encode()) for name in _CONTEXT}
        return {name: value.decode("ascii", "replace") for name, value in found.items() if value}


@dataclass(frozen=True)
class Settling:
    """One result to settle: the message is published once for its key, ever."""

    key: IdempotencyKey
    fingerprint: str
    """Digest of the content that the decision was made for, not of the decision."""
    message: Message
    carrier: Mapping[str, str]
    run_id: str = ""
    epoch: int | None = None


class Settlement(StrEnum):
    """What became of a result."""

    SETTLED = "settled"
    DUPLICATE = "duplicate"
    """The key has its decision already, for the same content."""
    CONFLICT = "conflict"
    """The key has its decision already, for other content; that one stays."""
    LOST = "lost"
    """The entry is no longer the consumer's; nothing was changed."""


@dataclass(frozen=True)
class Record:
    """The decision stored for a key."""

    fingerprint: str
    envelope: bytes
    decided_at: datetime


@dataclass(frozen=True)
class Pending:
    """What a group has to do in one stream."""

    pending: int
    """Delivered and not yet acknowledged."""
    oldest: str | None
    """Entry id of the oldest of these."""
    consumers: Mapping[str, int]
    """Pending entries by consumer."""
    waiting: int | None
    """Never delivered yet; None where the server cannot tell."""


def entry_fields(
    envelope: bytes, carrier: Mapping[str, str], original: Mapping[str, bytes] | None = None
) -> list[str | bytes]:
    """The flat list of an entry's fields: the envelope first, then the trace context."""
    fields: list[str | bytes] = [_ENVELOPE, envelope]
    for name in _CONTEXT:
        if carrier.get(name):
            fields += [name, carrier[name]]
    for field, value in (original or {}).items():
        fields += [_ORIGINAL + field.encode(), value]
    return fields


def deliveries_of(reply: Any, streams: Mapping[bytes, Stream], deliveries: int) -> list[Delivery]:
    """The entries of an XREAD reply: a list of pairs (RESP2), or a map whose values redis-py wraps
    in one more list (RESP3). Entries that were deleted have no fields and are left out."""
    if isinstance(reply, dict):
        pairs = [(key, entry) for key, parts in reply.items() for part in parts for entry in part]
    else:
        pairs = [(key, entry) for key, entries in reply or () for entry in entries or ()]
    return [
        Delivery(streams[key], entry_id.decode(), fields, deliveries)
        for key, (entry_id, fields) in pairs
        if fields is not None
    ]


def read_letter(delivery: Delivery) -> DeadLetter:
    """The dead letter of an entry, with its original bytes wherever they were put.

    Raises:
        ContractError: if the entry is not a dead letter.
    """
    message = unwrap(read_envelope(delivery.envelope))
    if not isinstance(message, DeadLetter):
        raise UnknownType("envelope.payload_type", "DeadLetter", brief(type(message).__name__))
    beside = {
        name.removeprefix(_ORIGINAL).decode("utf-8", "replace"): value
        for name, value in delivery.fields.items()
        if name.startswith(_ORIGINAL)
    }
    return message.model_copy(update={"original": beside}) if beside else message
