"""The auditor: writes events of the bus into the audit log, and the log into its file.

Promises: every decision, outcome, breaker transition and dead letter becomes one entry, whichever
workers die when, since the log follows the streams by cursors of its own. Several auditors write
one chain; one that is overtaken leaves the rest to the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from elesh.bus import Bus, BusUnavailable, Delivery, audit_envelope, moment, repeatedly
from elesh.bus.admission import hear, read
from elesh.observe import AuditFile, Link, audit_event, get_logger
from elesh.settings import AuditSettings
from leyline import AuditEntry, AuditEvent, BreakerTransition, ContractError, UnknownType, encode
from leyline.streams import AUDIT, DEAD, DECISIONS, OPERATIONS, TELEMETRY, Stream

_BATCH = 500
SECONDS = 5.0
"""Between two looks at what is new: nothing waits for an entry."""
_log = get_logger(__name__)


@contextlib.asynccontextmanager
async def auditing(bus: Bus, settings: AuditSettings) -> AsyncIterator[None]:
    """Write the audit log meanwhile, and what is left of it at the end."""
    file = Path(settings.file) if settings.file else None
    task = asyncio.create_task(_keep(bus, file))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        with contextlib.suppress(BusUnavailable):
            await write_audit(bus, file)


async def _keep(bus: Bus, file: Path | None) -> None:
    async def step() -> float:
        await write_audit(bus, file)
        return pause()

    def pause() -> float:
        # Spread over the fleet: auditors that started together do not race each other.
        return SECONDS * random.uniform(0.5, 1.5)

    await repeatedly("writing the audit log", step, bus.outage, after=pause())


async def write_audit(bus: Bus, file: Path | None = None) -> int:
    """Write down what is new, into the file too if there is one; the number of new entries."""
    written = await bus.audit.copy(partial(_event, bus))
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
        if link.entry is None or link.doubt:
            raise ValueError(f"{link.place} {link.problem or link.doubt}")
        entries.append(link.entry)
    return await asyncio.to_thread(file.extend, entries)


async def audit_links(bus: Bus, *, after: int = 0) -> AsyncIterator[Link]:
    """The entries of the stream, oldest first, from the one numbered ``after`` + 1."""
    start = await _place_of(bus, after) if after else "-"
    while True:
        found = await bus.read(AUDIT, start=start, count=_BATCH)
        for delivery in found:
            link = _link(bus, delivery)
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


def _link(bus: Bus, delivery: Delivery) -> Link:
    place, doubt = f"{delivery.stream.name}/{delivery.entry_id}", ""
    try:
        entry = read(delivery.envelope).message
    except ContractError as error:
        return Link(place, None, f"cannot be read: {error}")
    if not isinstance(entry, AuditEntry):
        return Link(place, None, f"is a {type(entry).__name__}, not an AuditEntry")
    if encode(audit_envelope(entry)) != delivery.envelope:
        return Link(place, None, "was changed: its envelope is not the one it was written with")
    try:
        # By a key that was valid then: a log outlives its keys, and the signed end covers it.
        bus.guard.check(AUDIT, delivery.framed, at=entry.event.at)
    except ContractError as error:
        doubt = str(error)
    return Link(place, entry, doubt=doubt)


_KINDS: Mapping[Stream, Literal["decision", "breaker", "dead_letter", "operator"]] = {
    DECISIONS: "decision",
    TELEMETRY: "breaker",
    DEAD: "dead_letter",
    OPERATIONS: "operator",
}


def _is_recorded(delivery: Delivery, error: ContractError) -> bool:
    """Whether a message that is not to be believed is recorded as one.

    An outcome becomes a dead letter, which is recorded; of telemetry only breakers ever are, and
    what does not belong there.
    """
    if delivery.stream is TELEMETRY:
        wanted = BreakerTransition.__name__.encode()
        return isinstance(error, UnknownType) or wanted in delivery.framed
    return delivery.stream in _KINDS


def _event(bus: Bus, delivery: Delivery) -> AuditEvent | None:
    """What an entry is to the audit log. One whose signer had no right to write it, or that
    cannot be read, is recorded as that."""
    at = moment(int(delivery.entry_id.split("-")[0]))
    source = f"{delivery.stream.name}/{delivery.entry_id}"
    try:
        return audit_event(hear(delivery, bus.guard).message, source=source, at=at)
    except ContractError as error:
        if not _is_recorded(delivery, error):
            return None
        return AuditEvent(
            kind=_KINDS[delivery.stream],
            action=error.code,
            actor="unknown",
            at=at,
            subject=source,
            reason=str(error)[:8192],
            source=source,
        )
