"""Commands for whoever operates a fleet: breakers, dead letters, the streams."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from elesh.bus import Bus
from elesh.settings import Settings
from leyline import Level
from leyline.streams import STREAMS

from .common import RedisOption, SettingsOption, console, fail, on_bus

app = typer.Typer()
breaker = typer.Typer(no_args_is_help=True, help="Circuit breakers, one a run and level.")
dead = typer.Typer(no_args_is_help=True, help="Messages that could not be served.")
app.add_typer(breaker, name="breaker")
app.add_typer(dead, name="dead")


@breaker.command("show")
def breaker_show(redis: RedisOption = "", settings: SettingsOption = None) -> None:
    """All breakers that ever counted a failure."""
    from elesh.explanation import breaker_table

    views = on_bus(redis, settings, lambda bus, _: bus.breakers.show())
    console.print(breaker_table(views) if views else "no breaker has counted a failure")


@breaker.command("reset")
def breaker_reset(
    run: Annotated[str, typer.Argument(help="The run; without one, every breaker.")] = "",
    level: Annotated[Level, typer.Argument(help="The level.")] = Level.CHANNEL,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Close breakers and forget their failures."""

    async def reset(bus: Bus, _: Settings) -> list[tuple[str, Level]]:
        known = [(view.run_id, view.level) for view in await bus.breakers.show()]
        chosen = [(run, level)] if run else known
        for each in chosen:
            await bus.breakers.reset(*each)
        return chosen

    for name, which in on_bus(redis, settings, reset):
        console.print(f"breaker of {name} at level {which.value}: closed")


@breaker.command("trip")
def breaker_trip(
    run: Annotated[str, typer.Argument(help="The run.")],
    level: Annotated[Level, typer.Argument(help="The level.")] = Level.CHANNEL,
    reason: Annotated[str, typer.Option(help="Why; shown in every rejected decision.")] = "by hand",
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Open a breaker: nothing of this level is approved until it is reset or recovers."""
    on_bus(redis, settings, lambda bus, _: bus.breakers.trip(run, level, reason))
    console.print(f"breaker of {run} at level {level.value}: open ({reason})")


@dead.command("list")
def dead_list(redis: RedisOption = "", settings: SettingsOption = None) -> None:
    """Every dead letter: where it stood, the class of error, and the reason."""
    from elesh.explanation import dead_letters, dead_table

    letters = on_bus(redis, settings, lambda bus, _: dead_letters(bus))
    console.print(dead_table(letters) if letters else "no dead letters")


@app.command()
def events(
    stream: Annotated[str, typer.Option(help="Only this stream, by its short name.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Print what is in the streams, oldest first, one line an event."""
    from elesh.explanation import event_lines

    known = {each.name: each for each in STREAMS}
    if stream and stream not in known:
        fail(f"--stream {stream}: expected one of {', '.join(known)}")
    chosen = [known[stream]] if stream else list(STREAMS)

    async def run(bus: Bus, _: Settings) -> None:
        async for line in event_lines(bus, chosen, follow=follow):
            console.print(line, soft_wrap=True)

    with contextlib.suppress(KeyboardInterrupt):
        on_bus(redis, settings, run)
