"""The auditor: writes what happened on the bus into the audit log, and the log into its file.

Promises: every decision, outcome, breaker transition and dead letter becomes one entry, whichever
workers die when, since the log follows the streams by cursors of its own. Several auditors are one
chain; whoever is overtaken leaves the rest to the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from elesh.bus import Bus, BusUnavailable, Delivery, audit_envelope, read_dead_letter
from elesh.observe import AuditFile, Link, audit_event, get_logger
from elesh.settings import AuditSettings
from leyline import AuditEntry, AuditEvent, ContractError, Message, encode, read_envelope, unwrap
from leyline.streams import AUDIT, DEAD

__all__ = ["audit_links", "auditing", "extend_file", "write_audit"]

_BATCH = 500
_log = get_logger(__name__)


@contextlib.asynccontextmanager
async def auditing(bus: Bus, settings: AuditSettings) -> AsyncIterator[None]:
    """Write the audit log meanwhile, and what is left of it at the end."""
    file = Path(settings.file) if settings.file else None
    task = asyncio.create_task(_keep(bus, settings.seconds, file))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        with contextlib.suppress(BusUnavailable):
            await write_audit(bus, file)


async def _keep(bus: Bus, seconds: float, file: Path | None) -> None:
    while True:
        # Spread over the fleet: auditors that started together do not race each other.
        await asyncio.sleep(seconds * random.uniform(0.5, 1.5))
        with contextlib.suppress(BusUnavailable):
            await write_audit(bus, file)


async def write_audit(bus: Bus, file: Path | None = None) -> int:
    """Write down what is new, into the file too if there is one; the number of new entries."""
    written = await bus.audit.copy(_event)
    if file is not None:
        try:
            await extend_file(bus, AuditFile(file))
        except (OSError, ValueError) as error:
            _log.error("audit file not written", reason=str(error))
    return written


async def extend_file(bus: Bus, file: AuditFile) -> list[AuditEntry]:
    """Append to a file what it has not got yet; the entries that this call appended.

    Raises:
        ValueError: if the file does not belong to this log, or the log cannot be read.
    """
    last, _ = file.last()
    head = await bus.audit.head()
    if head.number < last:
        raise ValueError(
            f"{file.path}: ends with entry {last}, the log on the bus with entry {head.number}: it "
            "is another one; keep this file and begin a new one"
        )
    if head.number == last:
        return []
    entries: list[AuditEntry] = []
    async for link in audit_links(bus, after=last):
        if link.entry is None:
            raise ValueError(f"{link.place} {link.problem}")
        entries.append(link.entry)
    return await asyncio.to_thread(file.extend, entries)


async def audit_links(bus: Bus, *, after: int = 0) -> AsyncIterator[Link]:
    """The entries of the stream, oldest first, from the one numbered ``after`` + 1."""
    start = await _place_of(bus, after) if after else "-"
    while True:
        found = await bus.read(AUDIT, start=start, count=_BATCH)
        for delivery in found:
            link = _link(delivery)
            if link.entry is None or link.entry.number > after:
                yield link
        if len(found) < _BATCH:
            return
        start = f"({found[-1].entry_id}"


async def _place_of(bus: Bus, number: int) -> str:
    """Where to read on: an entry that is not after the one with this ``number``."""
    head = await bus.audit.head()
    newest = await bus.newest(AUDIT, count=max(0, head.number - number) + 1)
    return newest[-1].entry_id if newest else "-"


def _link(delivery: Delivery) -> Link:
    place = f"{delivery.stream.name}/{delivery.entry_id}"
    try:
        entry = unwrap(read_envelope(delivery.envelope))
    except ContractError as error:
        return Link(place, None, f"cannot be read: {error}")
    if not isinstance(entry, AuditEntry):
        return Link(place, None, f"is a {type(entry).__name__}, not an AuditEntry")
    if encode(audit_envelope(entry)) != delivery.envelope:
        return Link(place, None, "was changed: its envelope is not the one it was written with")
    return Link(place, entry)


def _event(delivery: Delivery) -> AuditEvent | None:
    at = datetime.fromtimestamp(int(delivery.entry_id.split("-")[0]) / 1000, UTC)
    try:
        message: Message = (
            read_dead_letter(delivery)
            if delivery.stream is DEAD
            else unwrap(read_envelope(delivery.envelope))
        )
    except ContractError:
        return None  # refused by whoever serves the stream: then it is a dead letter
    return audit_event(message, source=f"{delivery.stream.name}/{delivery.entry_id}", at=at)
