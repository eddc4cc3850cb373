"""What every command shares: options, consoles, a bus for the length of a call, and how to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from elesh.bus import Bus, server_url
from elesh.settings import Settings

T = TypeVar("T")
console = Console(highlight=False)
complaints = Console(stderr=True, highlight=False)

RedisOption = Annotated[
    str,
    typer.Option(
        "--redis",
        envvar="ELESH_REDIS_URL",
        show_envvar=True,
        help="Redis URL; without one, an embedded server that is found again.",
    ),
]
SettingsOption = Annotated[
    Path | None, typer.Option("--settings", envvar="ELESH_SETTINGS", help="Settings file (YAML).")
]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Epochs; default: the whole schedule and four more.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of data, weights and batches.")]
Every = Annotated[int | None, typer.Option(min=1, help="Epochs between checkpoints.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
JsonLogs = Annotated[bool, typer.Option("--json-logs", help="Log lines as JSON.")]


def on_bus(redis: str, settings: Path | None, action: Callable[[Bus, Settings], Awaitable[T]]) -> T:
    """Run ``action`` with a bus that is closed afterwards."""
    loaded = Settings.load(settings)

    async def run() -> T:
        async with server_url(redis or loaded.bus.url) as url:
            bus = await Bus.connect(url, loaded.bus, loaded.breaker)
            try:
                return await action(bus, loaded)
            finally:
                await bus.close()

    return asyncio.run(run())


def fail(reason: str) -> NoReturn:
    complaints.print(f"[red]error:[/] {escape(reason)}", soft_wrap=True)
    raise typer.Exit(1)
