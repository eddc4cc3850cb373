"""The command line: one verb a capability, errors in one line with exit code 1.

Each module of this package holds one family of commands; here they become one program.
"""

from __future__ import annotations

import typer
from rich.markup import escape

from elesh.bus import BusUnavailable
from elesh.settings import SettingsError
from leyline import ContractError

from . import audit, config, console, dead, decisions, events, keys, observe, operate, profile, run
from .common import complaints

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Elesh says, at checkpoints of a training run, which parts of the network can be removed.",
)
for family in (run, decisions, observe, operate, events, console, profile):
    app.add_typer(family.app)
app.add_typer(dead.dead, name="dead")
app.add_typer(audit.audit, name="audit")
app.add_typer(keys.keys, name="keys")
app.add_typer(config.config, name="config")


def main() -> None:
    """Run the command line; expected errors are one line on standard error and exit code 1."""
    try:
        app()
    except FileNotFoundError as error:
        complaints.print(f"[red]error:[/] {error.filename}: there is no such file", soft_wrap=True)
        raise SystemExit(1) from None
    except (SettingsError, ContractError, BusUnavailable) as error:
        complaints.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from None
