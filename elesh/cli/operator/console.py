"""``elesh console`` and ``elesh report``: what runs do and why something was cut, as pages."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from elesh.bus import server_url
from elesh.cli.common import RedisOption, SettingsOption, console, on_bus, working
from elesh.settings import Settings

app = typer.Typer()


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
    """Write a run with all its decisions as one HTML file that needs nothing else."""
    from elesh.console import write_report

    path = file or Path(f"{run}.html")
    with working("writing the report"):
        count = on_bus(redis, settings, lambda bus, loaded: write_report(bus, loaded, run, path))
    console.print(f"{path}: {count} decisions, {path.stat().st_size / 2**20:.1f} MiB")
