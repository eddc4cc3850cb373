"""Commands that show what happens: fleet status, traces, stream entries, console."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from elesh.bus import Bus, server_url
from elesh.observe.logs import moment
from elesh.observe.terminal import escape
from elesh.operate.events import FormattedEvent, formatted_events
from elesh.settings import Settings
from leyline.streams import STREAMS

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

app = typer.Typer()


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two updates.")] = 2.0,
    as_json: AsJson = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Show the fleet: workers, backlog, breakers, dead letters, the last decisions."""
    from rich.live import Live

    from elesh.operate.fleet_status import fleet_status, fleet_status_of

    if watch and as_json:
        fail("--watch draws on a terminal: --json prints once")

    async def follow(bus: Bus, _: Settings) -> None:
        with Live(
            fleet_status(await fleet_status_of(bus)), console=console, auto_refresh=False
        ) as live:
            while True:
                await asyncio.sleep(every)
                live.update(fleet_status(await fleet_status_of(bus)), refresh=True)

    if not watch:
        seen = on_bus(redis, settings, lambda bus, _: fleet_status_of(bus))
        print_json(seen.facts()) if as_json else console.print(fleet_status(seen))
        return
    with contextlib.suppress(KeyboardInterrupt):
        on_bus(redis, settings, follow)


@app.command()
def trace(
    what: Annotated[
        str, typer.Argument(help="Key of a decision, a run, or a trace id; empty: the newest.")
    ] = "",
    as_json: JsonLines = False,
) -> None:
    """Print the waterfall of a checkpoint's trace, as far as this machine recorded it."""
    from dataclasses import asdict

    from elesh.observe.spanfile import find_trace, print_trace

    spans = find_trace(what)
    if not spans:
        fail(f"{what or 'trace'}: nothing is recorded here; a collector may have it")
    if as_json:
        for span in spans:
            print_json(asdict(span), line=True)
    else:
        print_trace(console, spans)


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
    """Print the events of the streams, oldest first, one a line."""
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


@app.command("console")
def serve(
    host: Annotated[str, typer.Option(help="Where to listen; default: console.host.")] = "",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default: console.port; 0: any free one.")
    ] = None,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Serve the web console until Ctrl-C. Read only unless console.token is set."""
    from elesh.console import serve_console

    loaded = Settings.load(settings)

    async def run() -> None:
        async with server_url(redis or loaded.bus.url) as url:
            await serve_console(
                url,
                loaded,
                host or loaded.console.host,
                loaded.console.port if port is None else port,
                lambda address: console.print(f"console on {address}"),
            )

    asyncio.run(run())


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The run.")],
    file: Annotated[Path | None, typer.Option("--file", help="Default: RUN.html.")] = None,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Write a run with all its decisions into one self-contained HTML file."""
    from elesh.console import write_report

    path = file or Path(f"{run}.html")
    with working("writing the report"):
        count = on_bus(redis, settings, lambda bus, loaded: write_report(bus, loaded, run, path))
    console.print(f"{path}: {count} decisions, {path.stat().st_size / 2**20:.1f} MiB")
