"""Commands that show what happens: traces, and the fleet at a glance."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated

import typer

from elesh.bus import Bus
from elesh.cli.common import (
    AsJson,
    JsonLines,
    RedisOption,
    SettingsOption,
    console,
    fail,
    on_bus,
    print_json,
)
from elesh.settings import Settings

app = typer.Typer()


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    as_json: AsJson = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """The fleet at a glance: workers, backlog, breakers, dead letters, the last decisions."""
    from rich.live import Live

    from elesh.operate.fleet_status import fleet_status, fleet_status_of

    if watch and as_json:
        fail("--watch draws on a terminal: --json is one look")

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
    """Print the waterfall of a checkpoint's trace, from what this machine recorded of it."""
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
