"""``elesh replay`` and ``elesh capture``: decisions made again, here or elsewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from elesh.bus import Bus
from elesh.observe import setup_tracing
from elesh.observe.spanfile import REPLAYS
from elesh.observe.terminal import escape
from elesh.operate.capture import open_case, versions
from elesh.operate.replay import Replayed, Selection, count_selected, replay_case
from elesh.operate.replay import capture as capture_case
from elesh.operate.replay import replay as replay_events
from elesh.settings import Settings

from .common import (
    JsonLines,
    RedisOption,
    SettingsOption,
    console,
    counting,
    fail,
    on_bus,
    print_json,
    working,
)

app = typer.Typer()
_SHOWN = 40


@app.command()
def replay(
    key: Annotated[
        str, typer.Argument(help="Key of a decision; empty: all that is selected.")
    ] = "",
    run: Annotated[str, typer.Option(help="Only this run.")] = "",
    epoch: Annotated[int | None, typer.Option(help="Only this epoch.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show every field that differs.")] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A file of elesh capture; its settings, unless others are given."
        ),
    ] = None,
    as_json: JsonLines = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Analyse recorded events again, publish nothing, and compare with what was decided."""
    if source is not None:
        _replay_file(source, settings, diff, as_json)

    async def run_all(bus: Bus, loaded: Settings) -> tuple[int, int, int]:
        setup_tracing(REPLAYS, run or key or "all", loaded.observe)
        selection = Selection(key, run, epoch)
        total, same, rounding = await count_selected(bus, selection), 0, 0
        with counting("replayed", total) as advance:
            async for item in replay_events(bus, loaded, selection):
                _print(item, diff, as_json)
                same += item.identical
                rounding += item.rounding
                advance()
        return total, same, rounding

    total, same, rounding = on_bus(redis, settings, run_all)
    if not total:
        fail("nothing was selected that is still in the streams")
    if not as_json:
        others = f", {rounding} the same but for rounding" if rounding else ""
        console.print(f"{same} of {total} bit-identical{others}")
    raise typer.Exit(0 if same + rounding == total else 1)


def _replay_file(source: Path, settings: Path | None, diff: bool, as_json: bool) -> None:
    chosen = Settings.load(settings) if settings is not None else None
    with working("replaying"):
        item = asyncio.run(replay_case(source, chosen))
    _print(item, diff, as_json)
    now = versions()
    for name, then in {} if as_json else open_case(source).versions.items():
        if now.get(name) != then:
            console.print(f"  captured with {name} {then}, here {now.get(name, 'not installed')}")
    raise typer.Exit(0 if item.identical or item.rounding else 1)


@app.command()
def capture(
    key: Annotated[str, typer.Argument(help="Key of a decision, or of a dead letter.")],
    file: Annotated[Path, typer.Argument(help="The file to write, for example case.zip.")],
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Take a case home: event, blobs, decision, settings and versions in one file."""
    case = on_bus(redis, settings, lambda bus, _: capture_case(bus, key, file))
    if case is None:
        fail(f"{key}: no event of this key is in the streams")
    what = "with its decision" if case.decision else "no decision is recorded"
    console.print(f"{file}: {file.stat().st_size} bytes, {what}; elesh replay --from {file}")


def _print(item: Replayed, diff: bool, as_json: bool) -> None:
    if not as_json:
        print_replayed(item, diff=diff)
        return
    changed = None if item.settings is None else [change._asdict() for change in item.settings]
    facts = {
        "key": str(item.key),
        "identical": item.identical,
        "rounding": item.rounding,
        "error": item.error,
        "settings": changed,
        "moved": item.moved,
        "differences": [change._asdict() for change in item.differences],
    }
    print_json(facts, line=True)


def print_replayed(item: Replayed, *, diff: bool) -> None:
    """What became of one key: identical, or which settings changed and what moved."""
    if item.identical:
        console.print(f"{item.key}  [green]identical[/]")
    elif item.rounding:
        count = len(item.differences)
        console.print(f"{item.key}  [green]the same[/] but for rounding, in {count} figures")
    elif item.error:
        console.print(f"{item.key}  [red]no decision now[/]: {escape(item.error)}", soft_wrap=True)
    elif item.recorded is None:
        console.print(f"{item.key}  [yellow]no decision was recorded[/]")
    else:
        console.print(f"{item.key}  [red]differs[/] in {len(item.differences)} fields")
    for line in _reasons(item):
        console.print(f"  {escape(line)}", soft_wrap=True)
    if diff and not item.identical:
        for change in item.differences[:_SHOWN]:
            console.print(f"  {escape(str(change))}", soft_wrap=True)
        if len(item.differences) > _SHOWN:
            console.print(f"  and {len(item.differences) - _SHOWN} more")


def _reasons(item: Replayed) -> list[str]:
    """Why a decision differs, and what that means."""
    if item.settings is None:
        lines = ["decided by other settings, which are not kept any more"]
    else:
        lines = [f"setting {change}" for change in item.settings]
    old, new = item.recorded, item.decision
    if old and new and old.elesh_version != new.elesh_version:
        lines.append(f"decided by Elesh {old.elesh_version}, this is {new.elesh_version}")
    elif old and new and item.rounding:
        lines.append("another kind of processor or another library decided: it adds up differently")
    elif old and new and not item.identical and item.settings == ():
        lines.append("no setting changed: the code or its libraries did")
    return lines + item.moved
