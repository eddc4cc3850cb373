"""Commands for operators of a fleet: circuit breakers, keys of the keyring, and settings."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml

from elesh.bus import Bus
from elesh.observe.terminal import escape
from elesh.operate.actions import BREAKERS, operator, reset_breaker, trip_breaker
from elesh.security import KEY_ID, Keyring, new_key
from elesh.settings import Settings
from elesh.settings.advice import advisory
from elesh.settings.masking import masked_values
from leyline import ContractError, Level

from .common import (
    JsonLines,
    RedisOption,
    SettingsOption,
    console,
    fail,
    on_bus,
    print_json,
)

app = typer.Typer()
breaker = typer.Typer(no_args_is_help=True, help="Circuit breakers, one for each run and level.")
app.add_typer(breaker, name="breaker")


@breaker.command("show")
def breaker_show(
    as_json: JsonLines = False, redis: RedisOption = "", settings: SettingsOption = None
) -> None:
    """List all breakers that ever counted a failure."""
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
    """Close breakers and forget their failures, each by itself."""

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
    """Open breakers: workers approve nothing of these levels until reset or recovery."""
    if level not in (None, *BREAKERS):
        fail(f"level {level}: expected {', '.join(BREAKERS)}: no other has a breaker")
    chosen = [level] if level else BREAKERS

    async def trip(bus: Bus, _: Settings) -> None:
        for each in chosen:
            await trip_breaker(bus, run, each, operator(), reason)

    on_bus(redis, settings, trip)
    for each in chosen:
        console.print(f"breaker of {escape(run)} at level {each.value}: open ({escape(reason)})")


keys = typer.Typer(no_args_is_help=True, help="Keys that sign what goes over the bus.")


class Kind(StrEnum):
    """Kinds of keys."""

    HMAC = "hmac-sha256"
    ED25519 = "ed25519"


@keys.command("new")
def keys_new(
    name: Annotated[str, typer.Argument(help="The key's id, for example trainer-2026.")],
    kind: Annotated[
        Kind, typer.Option(help="Shared secret, or a pair whose private half stays with one.")
    ] = Kind.ED25519,
) -> None:
    """Print a new key as an entry for a keyring file; its secret is shown only once."""
    if not re.fullmatch(KEY_ID, name):
        fail(f"{name or 'an empty name'}: expected letters, digits, _, . and -, at most 64")
    entry = new_key("ed25519" if kind is Kind.ED25519 else "hmac-sha256", name)
    console.print(yaml.safe_dump([entry], sort_keys=False), end="", markup=False, soft_wrap=True)


@keys.command("check")
def keys_check(file: Annotated[Path, typer.Argument(help="A keyring file.")]) -> None:
    """Check a keyring: is it valid, which key signs, what may each key do?"""
    ring = Keyring.load(file)
    for key in ring.keys:
        signs = "signs" if key.id == ring.sign_with else "is believed"
        until = f" until {key.not_after:%F %T %Z}" if key.not_after else ""
        streams = "every stream" if "*" in key.may else ", ".join(sorted(key.may))
        console.print(f"{key.id} ({key.kind}) {signs}{until} on {streams}", soft_wrap=True)


config = typer.Typer(no_args_is_help=True, help="Settings: those in force, and all that exist.")


@config.command("show")
def config_show(settings: SettingsOption = None) -> None:
    """Print every setting in force, from file, environment and defaults; secrets are masked."""
    print_json(masked_values(Settings.load(settings).model_dump(mode="json")))


@config.command("check")
def config_check(file: Annotated[Path, typer.Argument(help="A settings file.")]) -> None:
    """Check a settings file; every error names line and key.

    Keys that have no effect beside the others are listed as advisory.
    """
    settings = Settings.load(file)
    console.print(f"{file}: ok", soft_wrap=True)
    for key, reason in advisory(settings):
        console.print(f"{file}: advisory: {key}: {escape(reason)}", soft_wrap=True)


@config.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the settings."""
    console.print_json(json.dumps(Settings.model_json_schema()))
