"""Dead letters for operators: list them, publish the originals again, drop them.

Promises: a dead letter is redriven once, with its original bytes, in the same atomic step that
marks it; a second redrive answers with the first one's entry. A dead letter is dropped in the same
step that says who did it. Elesh does none of this by itself: every change is an operator's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pydantic import ValidationError

from elesh.bus.scripts import Shared, Store
from leyline import ContractError, DeadLetter, InvalidField, OperatorAction, encode, wrap
from leyline.network.bundle import first_error
from leyline.streams import DEAD, OPERATIONS, STREAMS, Stream

from .records import BUS_FIELDS, Delivery, deliveries_of, entry_fields, read_dead_letter

_ENTRY = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")


@dataclass(frozen=True)
class DeadLetterEntry:
    """One entry of the dead letters' stream."""

    entry_id: str
    message: DeadLetter | None
    """None if the entry cannot be read; ``error`` then says why."""
    error: str = ""
    redriven_as: str = ""
    """The entry that the original was published again as; empty if it was not."""


@dataclass(frozen=True)
class Redriven:
    """Where a dead letter's original stands now."""

    stream: str
    entry_id: str
    again: bool
    """False if the dead letter had been redriven before: nothing was published this time."""


class DeadLetters(Store):
    """The dead letters of a partition."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        self._marks = self._keys.named("redriven")

    async def all(self) -> list[DeadLetterEntry]:
        """Every dead letter, oldest first."""
        return (await self.newest(None))[::-1]

    async def newest(self, count: int | None, *, before: str = "") -> list[DeadLetterEntry]:
        """The last ``count`` dead letters, newest first, every one if None; of those before an
        entry's id, if one is given.

        Raises:
            InvalidField: if ``before`` is no entry's id.
        """
        if before and not _ENTRY.fullmatch(before):
            raise InvalidField("before", "an entry id such as 1736856000250-0", before)
        last = f"({before}" if before else "+"
        found: Any = await self._client.xrevrange(self._keys.stream(DEAD), last, "-", count)
        entries = deliveries_of([(DEAD, found)], grouped=False)
        if not entries:
            return []
        marks: Any = await self._client.hmget(self._marks, [each.entry_id for each in entries])
        return [self._entry(entry, mark or b"") for entry, mark in zip(entries, marks, strict=True)]

    async def open(self) -> int:
        """How many dead letters were not redriven."""
        length: Any = await self._client.xlen(self._keys.stream(DEAD))
        redriven: Any = await self._client.hlen(self._marks)
        return max(0, int(length) - int(redriven))

    async def get(self, entry_id: str) -> DeadLetterEntry:
        """One dead letter.

        Raises:
            InvalidField: if there is no such dead letter (any more).
        """
        if not _ENTRY.fullmatch(entry_id):
            raise InvalidField("dead letter", "an entry id such as 1736856000250-0", entry_id)
        entries = await self._range(entry_id, entry_id)
        if not entries:
            raise _missing(entry_id)
        mark: Any = await self._client.hget(self._marks, entry_id)
        return self._entry(entries[0], mark or b"")

    async def redrive(self, entry_id: str, operator: str, reason: str = "") -> Redriven:
        """Publish a dead letter's original entry again on the stream that it stood in.

        Raises:
            InvalidField: if there is no such dead letter, it cannot be read, or it names no stream
                that workers serve.
        """
        dead_letter = await self.get(entry_id)
        if dead_letter.message is None:
            raise InvalidField(
                f"dead letter {entry_id}", "a readable dead letter", dead_letter.error
            )
        stream = _served(entry_id, dead_letter.message.stream)
        event = self._event("redrive", entry_id, operator, reason, f"on {stream.name}")
        # Its time to live counts from now: an operator waits for it.
        at = f"{(await self._clock.now()).timestamp() * 1000:.0f}"
        original = dead_letter.message.original
        redriven = self._guard.frame(
            self._guard.redrive_of(original.get("envelope", b"")), at.encode()
        )
        keys = (
            self._keys.stream(DEAD),
            self._marks,
            self._keys.stream(stream),
            self._keys.stream(OPERATIONS),
        )
        fields = [*_flat(original), "redriven", redriven]
        args = [entry_id, len(fields), *fields, *event]
        reply = await self._scripts.run("redrive", keys, args)
        if not reply:
            raise _missing(entry_id)
        return Redriven(stream.name, reply[0].decode(), bool(reply[1]))

    async def drop(self, entry_id: str, operator: str, reason: str = "") -> None:
        """Delete a dead letter for good; the operations stream keeps who did it and what it was.

        Raises:
            InvalidField: if there is no such dead letter.
        """
        dead_letter = await self.get(entry_id)
        was = dead_letter.message
        lost = f"{was.stream}/{was.entry_id}: {was.error_code}" if was else "unreadable"
        event = self._event("drop", entry_id, operator, reason, lost)
        keys = self._keys.stream(DEAD), self._marks, self._keys.stream(OPERATIONS)
        if not await self._scripts.run("drop", keys, [entry_id, *event]):
            raise _missing(entry_id)

    async def _range(self, start: str, end: str) -> list[Delivery]:
        key = self._keys.stream(DEAD)
        entries = await self._client.xrange(key, start, end)
        return deliveries_of([(DEAD, entries)], grouped=False)

    def _event(
        self,
        action: Literal["redrive", "drop"],
        subject: str,
        operator: str,
        reason: str,
        outcome: str,
    ) -> list[str | bytes]:
        message = operator_action(action, subject, operator, reason, self._clock.latest(), outcome)
        envelope = encode(wrap(message, source="operator", now=self._clock.latest()))
        return entry_fields(self._guard.frame(OPERATIONS, envelope), {})

    def _entry(self, entry: Delivery, mark: bytes) -> DeadLetterEntry:
        """A dead letter; one that is not signed by a key with that right cannot be read."""
        try:
            entry.check(self._guard)
            return DeadLetterEntry(
                entry.entry_id, read_dead_letter(entry), redriven_as=mark.decode()
            )
        except ContractError as error:
            return DeadLetterEntry(entry.entry_id, None, str(error), mark.decode())


def operator_action(
    action: Literal["redrive", "drop", "breaker_reset", "breaker_trip"],
    subject: str,
    operator: str,
    reason: str,
    at: datetime,
    outcome: str = "",
) -> OperatorAction:
    """What is published of something that a person does.

    Raises:
        InvalidField: if who, what or why is too long, or no text.
    """
    try:
        return OperatorAction(
            action=action, subject=subject, operator=operator, at=at, reason=reason, outcome=outcome
        )
    except ValidationError as error:
        raise first_error(error, action) from None


def _served(entry_id: str, name: str) -> Stream:
    served = {stream.name: stream for stream in STREAMS if stream.group}
    if name not in served:
        raise InvalidField(f"dead letter {entry_id}: stream", f"one of {', '.join(served)}", name)
    return served[name]


def _flat(original: dict[str, bytes]) -> Iterator[str | bytes]:
    for name, value in original.items():
        if name.encode() not in BUS_FIELDS:
            yield from (name, value)


def _missing(entry_id: str) -> InvalidField:
    return InvalidField(
        "dead letter", "the entry of a dead letter", entry_id, hint="see elesh dead list"
    )
