"""``elesh events``: the streams for people, one line an event."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Annotated

import typer

from elesh.bus import Bus
from elesh.cli.common import (
    JsonLines,
    RedisOption,
    SettingsOption,
    console,
    fail,
    on_bus,
    print_json,
)
from elesh.observe.logs import moment
from elesh.observe.terminal import escape
from elesh.operate.events import FormattedEvent, formatted_events
from elesh.settings import Settings
from leyline.streams import STREAMS

app = typer.Typer()
_COLOURS = {"good": "green", "warn": "yellow", "bad": "red", "": "default"}


@app.command()
def events(
    stream: Annotated[
        list[str] | None, typer.Option(help="Only this stream, by its short name; may be repeated.")
    ] = None,
    run: Annotated[str, typer.Option(help="Only events of this run.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    as_json: JsonLines = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Print what is in the streams, oldest first, one line an event."""
    known = {each.name: each for each in STREAMS}
    for name in stream or ():
        if name not in known:
            fail(f"--stream {name}: expected one of {', '.join(known)}")
    chosen = [known[name] for name in stream] if stream else list(STREAMS)

    async def format_all(bus: Bus, _: Settings) -> None:
        async for event in formatted_events(bus, chosen, follow=follow, run_id=run):
            if as_json:
                print_json(asdict(event), line=True)
            else:
                console.print(event_line(event), soft_wrap=True)

    with contextlib.suppress(KeyboardInterrupt):
        on_bus(redis, settings, format_all)


def event_line(event: FormattedEvent) -> str:
    """Time, stream, run, epoch, what happened, key: columns while they are short."""
    colour = _COLOURS[event.tone]
    epoch = "" if event.epoch is None else str(event.epoch)
    what = f"[{colour}]{escape(event.what)}[/]"
    key = f"  [dim]{escape(event.key)}[/]" if event.key else ""
    head = f"[dim]{moment(event.at)}[/] {event.stream:11}"
    return f"{head} {escape(event.run_id):10} {epoch:>4}  {what}{key}"
