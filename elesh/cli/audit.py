"""``elesh audit``: shows the audit log, verifies it, and copies it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, get_args

import typer

from elesh.bus import Bus
from elesh.observe import AuditFile, Fault, Link, line_of, sound, verify
from elesh.observe.logs import moment, printable
from elesh.observe.terminal import escape
from elesh.settings import Settings
from leyline import AuditEntry, AuditEvent

from .common import (
    AsJson,
    JsonLines,
    RedisOption,
    SettingsOption,
    console,
    fail,
    on_bus,
    print_json,
    working,
)

audit = typer.Typer(no_args_is_help=True, help="The audit log: a hash chain of actions.")

FileOption = Annotated[Path | None, typer.Option("--file", help="An audit file beside the bus.")]
_FOLLOW_SECONDS = 1.0
KINDS: tuple[str, ...] = get_args(AuditEvent.model_fields["kind"].annotation)


@audit.command("show")
def audit_show(
    run: Annotated[str, typer.Option(help="Only this run.")] = "",
    kind: Annotated[str, typer.Option(help=f"Only entries of this kind: {', '.join(KINDS)}.")] = "",
    last: Annotated[int, typer.Option(min=1, help="At most this many, the newest.")] = 50,
    as_json: JsonLines = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Print entries, oldest first: when, who, action, object, reason."""
    if kind not in ("", *KINDS):
        fail(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    chosen = [
        link
        for link in on_bus(redis, settings, _links)
        if link.entry is not None
        and run in ("", link.entry.event.run_id)
        and kind in ("", link.entry.event.kind)
    ]
    for link in chosen[-last:]:
        assert link.entry is not None
        if as_json:
            typer.echo(printable(line_of(link.entry).decode(), lines=True), nl=False)
        else:
            doubt = f"  [red]not an auditor's: {escape(link.doubt)}[/]" if link.doubt else ""
            console.print(_shown(link.entry) + doubt, soft_wrap=True)


@audit.command("verify")
def audit_verify(
    file: FileOption = None,
    signed_from: Annotated[
        int, typer.Option(min=1, help="Entries before this one were written without a keyring.")
    ] = 1,
    as_json: AsJson = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Verify the chain on the bus, its signatures (with a keyring), and a file against it. On a
    fault: exit code 1, the place of each, and which entries can be trusted."""

    async def prove(bus: Bus, _: Settings) -> tuple[int, list[Fault], str, bool]:
        head = await bus.audit.head()
        links = await _links(bus, _)
        faults = verify(links, number=head.number, digest=head.digest, signed_from=signed_from)
        if head.doubt:
            faults.append(Fault("audit:head", f"the chain's end is not an auditor's: {head.doubt}"))
        trusted = sound(links, faults)
        if file is not None:
            written = list(AuditFile(file).links())
            faults += verify(written) + _differences(links, written)
        return head.number, faults, trusted, bus.guard.requires_signatures

    with working("reading the log"):
        number, faults, trusted, signed = on_bus(redis, settings, prove)
    if as_json:
        texts = [str(fault) for fault in faults]
        print_json({"entries": number, "faults": texts, "trusted": trusted, "signed": signed})
        raise typer.Exit(1 if faults else 0)
    for fault in faults:
        console.print(f"[red]{escape(str(fault))}[/]", soft_wrap=True)
    if faults:
        kept = f"can be trusted: entries {trusted}" if trusted else "no entry can be trusted"
        fail(f"the audit log does not hold: {len(faults)} places; {kept}")
    proof = f"signed from entry {signed_from} on" if signed else "unsigned: there is no keyring"
    console.print(f"{number} entries, one chain, nothing missing or changed; {proof}")


@audit.command("export")
def audit_export(
    file: Annotated[str, typer.Argument(help="A new file, or - for standard output.")] = "-",
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Write the whole log to a file, one JSON line an entry."""
    links = on_bus(redis, settings, _links)
    lines = b"".join(line_of(link.entry) for link in links if link.entry is not None)
    for link in links:
        if link.entry is None or link.doubt:
            fail(f"{link.place} {link.problem or link.doubt}: see elesh audit verify")
    if file == "-":
        if sys.stdout.isatty():
            lines = printable(lines.decode(), lines=True).encode()
        sys.stdout.buffer.write(lines)
        return
    with Path(file).open("xb") as out:
        out.write(lines)
    console.print(f"{len(links)} entries in {file}")


@audit.command("follow")
def audit_follow(
    file: Annotated[Path, typer.Option("--file", help="The append-only file.")],
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Append new entries to a file until Ctrl-C; several processes may write one file."""
    from elesh.worker.telemetry.auditor import extend_file, write_audit

    async def run(bus: Bus, _: Settings) -> None:
        while True:
            await write_audit(bus)
            for entry in await extend_file(bus, AuditFile(file)):
                console.print(_shown(entry), soft_wrap=True)
            await asyncio.sleep(_FOLLOW_SECONDS)

    with contextlib.suppress(KeyboardInterrupt):
        on_bus(redis, settings, run)


async def _links(bus: Bus, _: Settings) -> list[Link]:
    from elesh.worker.telemetry.auditor import audit_links

    return [link async for link in audit_links(bus)]


def _differences(links: list[Link], written: list[Link]) -> list[Fault]:
    """Where a file says something else than the bus."""
    known = {link.entry.number: link.entry for link in links if link.entry is not None}
    return [
        Fault(link.place, f"entry {link.entry.number} is another one than on the bus")
        for link in written
        if link.entry is not None and known.get(link.entry.number, link.entry) != link.entry
    ]


def _shown(entry: AuditEntry) -> str:
    event = entry.event
    at: datetime = event.at
    failed = [gate.name for gate in event.gates if not gate.passed]
    parts = [
        f"{entry.number:6}  {moment(at)}",
        f"{event.kind:11}  [bold]{escape(event.action)}[/]",
        escape(event.subject),
        f"by {escape(event.actor)}",
    ]
    if event.reason:
        parts.append(escape(event.reason))
    if event.gates:
        gates = f"{len(event.gates)} gates"
        parts.append(gates + (f", failed: {escape(', '.join(failed))}" if failed else " passed"))
    return "  ".join(parts)
