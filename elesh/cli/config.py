"""``elesh config``: what is in force, whether a file can be used, and what can be set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from elesh.observe.terminal import escape
from elesh.settings import Settings
from elesh.settings.advice import advisory
from elesh.settings.masking import masked_values

from .common import SettingsOption, console, print_json

config = typer.Typer(no_args_is_help=True, help="Settings: what is in force, and what can be.")


@config.command("show")
def config_show(settings: SettingsOption = None) -> None:
    """Print every setting in force: file, environment and defaults together; secrets masked."""
    print_json(masked_values(Settings.load(settings).model_dump(mode="json")))


@config.command("check")
def config_check(file: Annotated[Path, typer.Argument(help="A settings file.")]) -> None:
    """Say whether a settings file can be used; every complaint names line and key.

    Keys that change nothing as the others stand are advisory, and named.
    """
    settings = Settings.load(file)
    console.print(f"{file}: ok", soft_wrap=True)
    for key, reason in advisory(settings):
        console.print(f"{file}: advisory: {key}: {escape(reason)}", soft_wrap=True)


@config.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the settings."""
    console.print_json(json.dumps(Settings.model_json_schema()))
