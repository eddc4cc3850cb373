"""``elesh keys``: make keys for the bus's keyring, and check a keyring's file."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml

from elesh.security import KEY_ID, Keyring, new_key

from .common import console, fail

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
    """Print a fresh key as an entry of a keyring file; its secret is shown this once."""
    if not re.fullmatch(KEY_ID, name):
        fail(f"{name or 'an empty name'}: expected letters, digits, _, . and -, at most 64")
    entry = new_key("ed25519" if kind is Kind.ED25519 else "hmac-sha256", name)
    console.print(yaml.safe_dump([entry], sort_keys=False), end="", markup=False, soft_wrap=True)


@keys.command("check")
def keys_check(file: Annotated[Path, typer.Argument(help="A keyring file.")]) -> None:
    """Say whether a keyring can be used, which key signs, and what each may do."""
    ring = Keyring.load(file)
    for key in ring.keys:
        signs = "signs" if key.id == ring.sign_with else "is believed"
        until = f" until {key.not_after:%F %T %Z}" if key.not_after else ""
        streams = "every stream" if "*" in key.may else ", ".join(sorted(key.may))
        console.print(f"{key.id} ({key.kind}) {signs}{until} on {streams}", soft_wrap=True)
