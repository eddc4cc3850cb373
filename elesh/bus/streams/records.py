"""The values that the bus gives and takes: deliveries, commits, records. No Redis here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from elesh.bus.guard import Checked, Guard, unframed
from leyline import (
    Attempt,
    DeadLetter,
    IdempotencyKey,
    InvalidField,
    Malformed,
    Message,
    read_envelope,
    unwrap,
)
from leyline.errors import UnknownType, brief
from leyline.streams import OPERATIONS, REDELIVERIES, STREAMS, Stream

_ENVELOPE = b"envelope"
_LATEST = datetime(9999, 1, 1, tzinfo=UTC)
_BY_NAME = {stream.name: stream for stream in STREAMS}
_ROUND = {stream.name for stream in STREAMS if stream.group and stream is not REDELIVERIES}
"""Streams whose entries may go round again."""
CONTEXT = ("traceparent", "tracestate")
"""Fields of the W3C trace context."""
_ORIGINAL = b"original."
_REDRIVEN = b"redriven"
ENTRY_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")
BUS_FIELDS = frozenset({b"origin", b"history", _REDRIVEN})
"""Fields that the bus adds to a requeued entry."""


@dataclass(frozen=True)
class DeliveryHistory:
    """Earlier deliveries of an entry that did not end it."""

    crashes: int = 0
    """Leases that ran out."""
    exceptions: int = 0
    """Failures that the worker outlived."""
    handovers: int = 0
    """Requeued by a worker that was drained before it began: no delivery that counts."""
    attempts: tuple[Attempt, ...] = ()
    """The last ones, oldest first."""

    def __str__(self) -> str:
        counts = (
            (self.crashes, "crash"),
            (self.exceptions, "exception"),
            (self.handovers, "handover"),
        )
        return ", ".join(f"{count} by {cause}" for count, cause in counts if count)

    @classmethod
    def read(cls, text: bytes) -> DeliveryHistory:
        """The history in an entry's field; a text that is not the bus's counts as no history."""
        try:
            stored = json.loads(text)
            attempts = [
                Attempt(
                    cause=cause,
                    worker_id=worker,
                    at=datetime.fromtimestamp(int(at) / 1000, UTC),
                    detail=detail,
                )
                for cause, worker, at, detail in stored.get("attempts", ())
            ]
            crashes, exceptions, handovers = (
                max(0, int(stored.get(cause, 0))) for cause in ("crash", "exception", "handover")
            )
        except (ValueError, TypeError, AttributeError, OverflowError, OSError, ValidationError):
            return cls()
        return cls(crashes, exceptions, handovers, tuple(attempts))


@dataclass(frozen=True)
class Delivery:
    """One stream entry as a consumer got it; nothing in it has been checked yet."""

    stream: Stream
    entry_id: str
    fields: Mapping[bytes, bytes]
    deliveries: int
    """How often a worker began it or died with it, 1 for the first time; 0 if it was read without a
    group. Handovers do not count."""
    stands_for: tuple[str, str] | None = None
    """The stream, by its short name, and the entry that it stands for, as a join does for its
    checkpoint."""
    history: DeliveryHistory = field(default_factory=DeliveryHistory)
    """What became of earlier deliveries."""

    @property
    def envelope(self) -> bytes:
        """The encoded EventEnvelope, out of its frame; whether it is genuine, :meth:`check` says.

        Raises:
            Malformed: if the entry has no such field.
        """
        return unframed(self.framed)

    @property
    def framed(self) -> bytes:
        """The field as it is: the envelope, in the frame of its signature if it is signed.

        Raises:
            Malformed: if the entry has no such field.
        """
        if _ENVELOPE not in self.fields:
            raise Malformed(
                f"{self.stream.name}/{self.entry_id}", "a field named envelope", sorted(self.fields)
            )
        return self.fields[_ENVELOPE]

    def check(self, guard: Guard) -> Checked:
        """The encoded EventEnvelope and who signed it; nothing is parsed before that is checked.

        Raises:
            Unsigned, BadSignature, NotAuthorized: if the entry, or an operator's word that it was
                sent again, is not by a key that may say so.
            InvalidField: if it goes round again and does not say where it was published.
        """
        if self.stream is REDELIVERIES and self.published_on is REDELIVERIES:
            wanted = "stream and entry that it was published as"
            raise InvalidField("origin", wanted, self.fields.get(b"origin", b"none"))
        checked = guard.check(self.published_on, self.framed)
        if _REDRIVEN in self.fields:
            place = guard.redrive_of(self.framed)
            guard.check(place, self.fields[_REDRIVEN], may=(OPERATIONS,))
        return checked

    @property
    def origin(self) -> tuple[str, str]:
        """The stream, by its short name, and the entry id under which it was published.

        Only an entry that goes round again stood somewhere else first, in a stream of work.
        """
        if self.stands_for is not None:
            return self.stands_for
        if self.stream is REDELIVERIES:
            place = self.fields.get(b"origin", b"").decode("utf-8", "replace")
            stream, _, entry = place.partition("/")
            if stream in _ROUND and ENTRY_ID.fullmatch(entry):
                return stream, entry
        return self.stream.name, self.entry_id

    @property
    def published_on(self) -> Stream:
        """The stream that it was published on; it may have gone round since."""
        return _BY_NAME.get(self.origin[0], self.stream)

    @property
    def original(self) -> dict[str, bytes]:
        """The fields as they were published."""
        return {
            name.decode("utf-8", "backslashreplace"): value
            for name, value in self.fields.items()
            if name not in BUS_FIELDS
        }

    @property
    def redriven(self) -> datetime | None:
        """When an operator sent it again (field ``redriven``, milliseconds since 1970), else None;
        its time to live counts from then."""
        if _REDRIVEN not in self.fields:
            return None
        text = unframed(self.fields[_REDRIVEN])
        known = text.isdigit() and len(text) < 15
        return datetime.fromtimestamp(int(text) / 1000, UTC) if known else None

    @property
    def carrier(self) -> dict[str, str]:
        """The W3C trace context that came along, possibly empty; unchecked."""
        found = {name: self.fields.get(name.encode()) for name in CONTEXT}
        return {name: value.decode("ascii", "replace") for name, value in found.items() if value}


@dataclass(frozen=True)
class Commit:
    """One result to commit: the message is published once for its key, ever."""

    key: IdempotencyKey
    fingerprint: str
    """Digest of the content that the decision was made for, not of the decision."""
    message: Message
    carrier: Mapping[str, str]
    run_id: str = ""
    epoch: int | None = None
    remember: bool = False
    """Whether it becomes the run's latest good decision of its level."""


class CommitOutcome(StrEnum):
    """What became of a result."""

    COMMITTED = "settled"
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
    outcomes: frozenset[str] = frozenset()
    """Event ids of the outcomes that were recorded for it."""


@dataclass(frozen=True)
class Pending:
    """A group's backlog in one stream."""

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
    for name in CONTEXT:
        if carrier.get(name):
            fields += [name, carrier[name]]
    for name, content in (original or {}).items():
        fields += [_ORIGINAL + name.encode(), content]
    return fields


def deliveries_of(found: Iterable[tuple[Stream, Any]], *, grouped: bool = True) -> list[Delivery]:
    """The entries that streams gave. Entries that were deleted have no fields and are left out."""
    deliveries = []
    for stream, entries in found:
        for entry_id, fields in entries or ():
            if fields:
                # Scripts return them as a flat list.
                flat = not isinstance(fields, dict)
                known = dict(zip(fields[::2], fields[1::2], strict=True)) if flat else fields
                # Of this group, with those before that count towards the limit.
                past = DeliveryHistory()
                if b"history" in known:
                    past = DeliveryHistory.read(known[b"history"])
                count = 1 + past.crashes + past.exceptions if grouped else 0
                deliveries.append(Delivery(stream, entry_id.decode(), known, count, history=past))
    return deliveries


def read_dead_letter(delivery: Delivery) -> DeadLetter:
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


def moment(milliseconds: float) -> datetime:
    """The time that an entry's id says. A writer may choose an entry's id: what is beyond
    all calendars is the last year."""
    try:
        return min(datetime.fromtimestamp(milliseconds / 1000, UTC), _LATEST)
    except (ValueError, OverflowError, OSError):
        return _LATEST
