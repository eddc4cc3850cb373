"""Commands for whoever operates a fleet: breakers."""

from __future__ import annotations

from typing import Annotated

import typer

from elesh.bus import Bus
from elesh.operating import operator, reset_breaker, trip_breaker
from elesh.settings import Settings
from leyline import Level

from .common import RedisOption, SettingsOption, console, on_bus

app = typer.Typer()
breaker = typer.Typer(no_args_is_help=True, help="Circuit breakers, one a run and level.")
app.add_typer(breaker, name="breaker")


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
            await reset_breaker(bus, *each, operator())
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
    on_bus(redis, settings, lambda bus, _: trip_breaker(bus, run, level, operator(), reason))
    console.print(f"breaker of {run} at level {level.value}: open ({reason})")
