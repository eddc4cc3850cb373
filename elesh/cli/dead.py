"""``elesh dead``: list, show, redrive or drop messages that could not be served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from elesh.bus import Bus, DeadLetterEntry, Redriven
from elesh.observe.logs import moment
from elesh.observe.terminal import escape
from elesh.operate.actions import operator
from elesh.settings import Settings
from leyline import DeadLetter

from .common import (
    AsJson,
    JsonLines,
    RedisOption,
    SettingsOption,
    console,
    fail,
    on_bus,
    print_json,
)

dead = typer.Typer(no_args_is_help=True, help="Messages that could not be served.")
_SHOWN_BYTES = 64

DeadLetterId = Annotated[str, typer.Argument(help="Its entry id, as elesh dead list shows it.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the audit log.")]


@dead.command("list")
def dead_list(
    redis: RedisOption = "",
    settings: SettingsOption = None,
    as_json: JsonLines = False,
) -> None:
    """List dead letters: where each came from, class of error, reason."""
    dead_letters = on_bus(redis, settings, lambda bus, _: bus.dead_letters.all())
    if as_json:
        for dead_letter in dead_letters:
            print_json(_facts(dead_letter), line=True)
        return
    for dead_letter in dead_letters:
        for line in brief_lines(dead_letter):
            console.print(line, soft_wrap=True)
    if not dead_letters:
        console.print("no dead letters")


@dead.command("show")
def dead_show(
    dead_letter: DeadLetterId,
    as_json: AsJson = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Show one dead letter: reason, every delivery, trace, and the original bytes."""
    shown = on_bus(redis, settings, lambda bus, _: bus.dead_letters.get(dead_letter))
    if as_json:
        print_json(_facts(shown))
        return
    for line in dead_letter_lines(shown):
        console.print(line, soft_wrap=True)


@dead.command("redrive")
def dead_redrive(
    dead_letters: Annotated[list[str] | None, typer.Argument(help="Entry ids; or --all.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every dead letter not yet redriven.")
    ] = False,
    code: Annotated[str, typer.Option(help="With --all: only of this class of error.")] = "",
    reason: Reason = "",
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Publish the original again on its stream, once; a second call changes nothing."""
    if bool(dead_letters) == everything:
        fail("name dead letters, or give --all")

    async def redrive(bus: Bus, _: Settings) -> list[tuple[str, Redriven]]:
        chosen = dead_letters or [
            found.entry_id
            for found in await bus.dead_letters.all()
            if found.message and not found.redriven_as and code in ("", found.message.error_code)
        ]
        return [(each, await bus.dead_letters.redrive(each, operator(), reason)) for each in chosen]

    done = on_bus(redis, settings, redrive)
    for entry_id, where in done:
        how = "published again" if where.again else "had been redriven already"
        console.print(f"{entry_id}  {how}: {where.stream}/{where.entry_id}")
    if not done:
        console.print("nothing to redrive")


@dead.command("drop")
def dead_drop(
    dead_letters: Annotated[list[str], typer.Argument(help="Dead letters to delete for good.")],
    reason: Reason = "",
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Delete dead letters for good; the audit log records who did it."""

    async def drop(bus: Bus, _: Settings) -> None:
        for each in dead_letters:
            await bus.dead_letters.drop(each, operator(), reason)

    on_bus(redis, settings, drop)
    console.print(f"dropped {len(dead_letters)}")


def brief_lines(dead_letter: DeadLetterEntry) -> Iterator[str]:
    """A dead letter in two lines of markup: what and where, then the reason."""
    message = dead_letter.message
    if message is None:
        yield f"[bold]{dead_letter.entry_id}[/]  [red]unreadable[/]"
        yield f"  {escape(dead_letter.error)}"
        return
    parts = [
        f"[bold]{dead_letter.entry_id}[/]",
        f"[red]{escape(message.error_code)}[/]",
        f"from {escape(message.stream)}",
        moment(message.at),
        f"{message.deliveries} deliver{'y' if message.deliveries == 1 else 'ies'}",
    ]
    if dead_letter.redriven_as:
        parts.append(f"redriven as {escape(dead_letter.redriven_as)}")
    yield "  ".join(parts)
    yield f"  {escape(message.reason)}"


def dead_letter_lines(dead_letter: DeadLetterEntry) -> Iterator[str]:
    """Everything that is known about a dead letter, as lines of markup."""
    message = dead_letter.message
    if message is None:
        yield f"[bold]{dead_letter.entry_id}[/]  [red]unreadable[/]: {escape(dead_letter.error)}"
        return
    yield f"[bold]{dead_letter.entry_id}[/]  [red]{escape(message.error_code)}[/]"
    yield f"  {escape(message.reason)}"
    facts = {
        "stood in": f"{message.stream}/{message.entry_id}",
        "key": message.idempotency_key,
        "field": message.field,
        "given up": f"{moment(message.at)} UTC by {message.worker_id}",
        "deliveries": str(message.deliveries),
        "trace": message.traceparent,
        "redriven as": dead_letter.redriven_as,
    }
    for name, value in facts.items():
        if value:
            yield f"  {name:12} {escape(value)}"
    yield from _history(message)
    for name, original in message.original.items():
        brief = escape(_brief(original))
        yield f"  original field [bold]{escape(name)}[/], {len(original)} bytes: {brief}"


def _history(message: DeadLetter) -> Iterator[str]:
    for number, attempt in enumerate(getattr(message, "history", ()), 1):
        detail = f": {attempt.detail}" if attempt.detail else ""
        yield (
            f"  attempt {number}    {moment(attempt.at)} {escape(attempt.worker_id)} "
            f"{attempt.cause}{escape(detail)}"
        )


def _brief(value: bytes) -> str:
    shown = value[:_SHOWN_BYTES]
    text = (
        shown.decode("ascii")
        if shown.isascii() and shown.decode().isprintable()
        else shown.hex(" ")
    )
    return text + (" ..." if len(value) > _SHOWN_BYTES else "")


def _facts(dead_letter: DeadLetterEntry) -> dict[str, object]:
    known = (
        dead_letter.message.model_dump(mode="json")
        if dead_letter.message
        else {"error": dead_letter.error}
    )
    entry = dead_letter.entry_id
    # "letter": the key of the version before.
    return {"dead_letter": entry, "letter": entry, "redriven_as": dead_letter.redriven_as, **known}
