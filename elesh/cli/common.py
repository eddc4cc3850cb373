"""What commands share: options, consoles, a bus for one call, and error handling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elesh.bus import Bus, server_url
from elesh.observe.logs import iso
from elesh.observe.terminal import Terminal, escape
from elesh.settings import Settings

T = TypeVar("T")
# Without emoji: a text such as nets:x:build is meant as it stands.
console = Terminal(highlight=False, emoji=False)
complaints = Terminal(stderr=True, highlight=False, emoji=False)


def _in_a_folder(file: Path | None) -> Path | None:
    """A file that a run writes at its end: what is wrong with its folder is said before it."""
    if file is not None and not file.parent.is_dir():
        raise typer.BadParameter(f"{file.parent}: there is no such folder")
    return file


RedisOption = Annotated[
    str,
    typer.Option(
        "--redis",
        envvar="ELESH_REDIS_URL",
        show_envvar=True,
        help="Redis URL; default: an embedded server that other processes find.",
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
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", callback=_in_a_folder, help="Write the figures here."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
JsonLines = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
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


def print_json(value: object, *, line: bool = False) -> None:
    """A value as JSON, coloured on a terminal; with ``line`` on one line, as scripts read it."""
    text = json.dumps(value, default=_plain)
    if line:
        typer.echo(text)
    else:
        console.print_json(text)


def _plain(value: object) -> str:
    """What JSON has no form for: times in ISO 8601, the rest as it is written."""
    return iso(value) if isinstance(value, datetime) else str(value)


def working(what: str) -> AbstractContextManager[object]:
    """Says on a terminal that something is being done; nothing elsewhere."""
    return complaints.status(what)


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal for ``total`` things that each print a line; the block calls what it is
    given after each. Elsewhere the lines are enough."""
    columns = TextColumn(what), MofNCompleteColumn(), BarColumn(24), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task = bar.add_task(what, total=total)
    with bar:
        yield lambda: bar.advance(task)


def fail(reason: str) -> NoReturn:
    complaints.print(f"[red]error:[/] {escape(reason)}", soft_wrap=True)
    raise typer.Exit(1)
