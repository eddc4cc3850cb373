"""The audit log on the bus: one hash chain with any number of writers.

Promises: entries are numbered without gaps and each names the digest of the one before, under any
number of concurrent writers. Everything in it is copied from other streams, exactly once: the
cursors move in the same step as the chain, and a writer that was overtaken changes nothing.
The stream is never trimmed. With a keyring every entry and the chain's end are signed. A chain
whose end was changed is continued, with an entry that says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import msgpack

from elesh.bus.scripts import Shared, Store
from elesh.bus.streams.records import ENTRY_ID, Delivery, deliveries_of, entry_fields
from leyline import GENESIS, AuditEntry, AuditEvent, ContractError, EventEnvelope, encode, wrap
from leyline.streams import AUDIT, DEAD, DECISIONS, OPERATIONS, OUTCOMES, TELEMETRY, Stream

COPIED: tuple[Stream, ...] = (DECISIONS, OUTCOMES, TELEMETRY, DEAD, OPERATIONS)
"""The streams whose messages become entries."""
_BATCH = 100
_CURSOR = "cursor."
_SIGNED = b"signed"
Translate = Callable[[Delivery], AuditEvent | None]


@dataclass(frozen=True)
class AuditHead:
    """Where the chain ends: the last entry's number and digest, and how far streams are copied."""

    number: int = 0
    digest: str = GENESIS
    cursors: Mapping[str, str] = field(default_factory=dict)
    doubt: str = ""
    """Why it need not be the end that an auditor wrote; empty where it is."""
    expected: str = ""
    """The digest as it stands there: who goes on has to have seen it."""


class AuditLog(Store):
    """The audit log of a partition."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._seen: AuditHead | None = None
        self._head = self._keys.named("audit", "head")

    async def head(self) -> AuditHead:
        """Where the chain ends now; one that is not signed, or not as it was, says so."""
        stored: Any = await self._client.hgetall(self._head)
        signed = stored.pop(_SIGNED, b"")
        texts = {_text(name): _text(value) for name, value in stored.items()}
        cursors = {
            name.removeprefix(_CURSOR): value
            for name, value in texts.items()
            if name.startswith(_CURSOR) and ENTRY_ID.fullmatch(value)
        }
        number, digest = texts.get("number", "0"), texts.get("digest", "")
        if not number.isdecimal() or len(number) > 15 or not re.fullmatch("[0-9a-f]{64}|", digest):
            return AuditHead(cursors=cursors, doubt="is no head of a chain", expected=digest)
        head = AuditHead(int(number), digest or GENESIS, cursors, expected=digest)
        return replace(head, doubt=self._doubt(head, signed)) if texts else head

    def _doubt(self, head: AuditHead, signed: bytes) -> str:
        """Why a head is not to be believed."""
        try:
            if self._guard.check(self._head, signed, may=(AUDIT,)).content != _facts(head):
                return "is not as it was written" if signed else ""
        except ContractError as error:
            return str(error)
        return ""

    async def copy(self, translate: Translate) -> int:
        """Write down what is new in the streams ``COPIED``; the number of entries written.

        ``translate`` says what a message is worth: None is passed over. If another writer is at
        it, this one leaves it to them.
        """
        # Mostly there is nothing new: then one read is enough to know.
        if self._seen is not None and not await self._unread(self._seen):
            return 0
        written = 0
        while True:
            self._seen = head = await self.head()
            found = await self._unread(head)
            events = [event for each in found if (event := translate(each)) is not None]
            if head.doubt and self._guard.signs:
                events.insert(0, _changed(head.doubt, await self._clock.now()))
            elif not found:
                return written
            entries = _chained(head, events)
            cursors = {**head.cursors, **{each.stream.name: each.entry_id for each in found}}
            if not await self._extend(head, entries, cursors):
                return written
            written += len(entries)

    async def _unread(self, head: AuditHead) -> list[Delivery]:
        keys = {self._keys.stream(stream): stream for stream in COPIED}
        wanted: Any = {key: head.cursors.get(stream.name, "0") for key, stream in keys.items()}
        reply: Any = await self._client.xread(wanted, _BATCH)
        named = [(keys[key.decode()], entries) for key, entries in reply or ()]
        found = deliveries_of(named, grouped=False)
        # What happened first is written first; the sort is stable, so a stream keeps its order.
        return sorted(found, key=lambda each: int(each.entry_id.split("-")[0]))

    async def _extend(
        self, head: AuditHead, entries: Sequence[AuditEntry], cursors: Mapping[str, str]
    ) -> bool:
        last = (entries[-1].number, entries[-1].digest) if entries else (head.number, head.digest)
        signed = self._guard.frame(self._head, _facts(AuditHead(*last, cursors)))
        fields: list[str | bytes] = [_SIGNED, signed]
        for name, at in cursors.items():
            fields += [_CURSOR + name, at]
        args: list[str | bytes | int] = [head.expected, *last, len(fields) // 2, *fields]
        for entry in entries:
            own = self._fields(entry)
            args += [len(own), *own]
        return bool(await self._scripts.run("audit", [self._keys.stream(AUDIT), self._head], args))

    def _fields(self, entry: AuditEntry) -> list[str | bytes]:
        return entry_fields(self._guard.frame(AUDIT, encode(audit_envelope(entry))), {})


def audit_envelope(entry: AuditEntry) -> EventEnvelope:
    """The envelope of an entry; every byte of it follows from the entry."""
    event = entry.event
    return wrap(
        entry,
        source="elesh",
        event_id=f"audit-{entry.number}",
        run_id=event.run_id,
        epoch=event.epoch,
        now=event.at,
    )


def _facts(head: AuditHead) -> bytes:
    """What of a head is under the signature of the auditor that wrote it."""
    facts: bytes = msgpack.packb([head.number, head.digest, sorted(head.cursors.items())])
    return facts


def _changed(doubt: str, at: datetime) -> AuditEvent:
    """The entry that says that the chain goes on from an end whose signature is wrong."""
    return AuditEvent(
        kind="operator",
        action="audit_head_changed",
        actor="unknown",
        at=at,
        subject="audit:head",
        reason=f"the end of the log was not signed by an auditor: {doubt}"[:8192],
    )


def _chained(head: AuditHead, events: Sequence[AuditEvent]) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    number, digest = head.number, head.digest
    for event in events:
        entries.append(AuditEntry(number=number + 1, previous=digest, event=event))
        number, digest = number + 1, entries[-1].digest
    return entries


def _text(stored: bytes) -> str:
    return stored.decode("utf-8", "replace")
