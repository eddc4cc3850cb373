"""Commands for operators of a fleet: breakers."""

from __future__ import annotations

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
from elesh.observe.terminal import escape
from elesh.operate.actions import BREAKERS, operator, reset_breaker, trip_breaker
from elesh.settings import Settings
from leyline import ContractError, Level

app = typer.Typer()
breaker = typer.Typer(no_args_is_help=True, help="Circuit breakers, one a run and level.")
app.add_typer(breaker, name="breaker")


@breaker.command("show")
def breaker_show(
    as_json: JsonLines = False, redis: RedisOption = "", settings: SettingsOption = None
) -> None:
    """All breakers that ever counted a failure."""
    from elesh.operate.explain import breaker_table

    views = on_bus(redis, settings, lambda bus, _: bus.breakers.show())
    if as_json:
        for view in views:
            print_json(asdict(view), line=True)
        return
    console.print(breaker_table(views) if views else "no breaker has counted a failure")


@breaker.command("reset")
def breaker_reset(
    run: Annotated[str, typer.Argument(help="The run; without one, every breaker.")] = "",
    level: Annotated[
        Level | None, typer.Argument(help="The level; without one, every level.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; kept in the audit log.")] = "",
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Close breakers and forget their failures. One that cannot be closed keeps no other open."""

    async def reset(bus: Bus, _: Settings) -> list[tuple[str, Level, str]]:
        found = []
        for view in await bus.breakers.show():
            if run in ("", view.run_id) and level in (None, view.level):
                why = ""
                try:
                    await reset_breaker(bus, view.run_id, view.level, operator(), reason)
                except ContractError as error:
                    why = str(error)
                found.append((view.run_id, view.level, why))
        return found

    found = on_bus(redis, settings, reset)
    for name, which, why in found:
        if not why:
            console.print(f"breaker of {escape(name)} at level {which.value}: closed")
    if not found:
        console.print("no such breaker has counted a failure")
    if left := [
        f"breaker of {name} at level {which.value}: {why}" for name, which, why in found if why
    ]:
        fail("; ".join(left))


@breaker.command("trip")
def breaker_trip(
    run: Annotated[str, typer.Argument(help="The run.")],
    level: Annotated[
        Level | None, typer.Argument(help="The level; without one, every level.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; shown in every rejected decision.")] = "by hand",
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Open breakers: nothing of these levels is approved until they are reset or recover."""
    if level not in (None, *BREAKERS):
        fail(f"level {level}: expected {', '.join(BREAKERS)}: no other has a breaker")
    chosen = [level] if level else BREAKERS

    async def trip(bus: Bus, _: Settings) -> None:
        for each in chosen:
            await trip_breaker(bus, run, each, operator(), reason)

    on_bus(redis, settings, trip)
    for each in chosen:
        console.print(f"breaker of {escape(run)} at level {each.value}: open ({escape(reason)})")
