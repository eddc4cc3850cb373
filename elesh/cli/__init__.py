"""The command line: one verb for each capability; errors are one line with exit code 1.

Each module of this package holds one family of commands; here they become one program.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from elesh.bus import BusUnavailable
from elesh.observe.terminal import escape
from elesh.settings import SettingsError
from leyline import ContractError

from . import audit, dead, decide, operate, run, watch
from .common import complaints

__all__ = ["app", "main"]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"elesh {version('elesh')}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Elesh finds parts of a network that can be removed while it trains.",
)
_REASONS: dict[type[OSError], str] = {
    FileNotFoundError: "there is no such file or folder",
    FileExistsError: "there is such a file already",
    NotADirectoryError: "expected a folder",
}
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a full or broken disk: they name no file where standard output is one."""
_RUN, _DECIDE, _WATCH, _OPERATE = "Run", "Decide and explain", "Watch", "Operate"


def _mount(family: typer.Typer, panel: str) -> None:
    """Add a family's commands and groups, under one heading of the help."""
    for command in family.registered_commands:
        command.rich_help_panel = panel
    for group in family.registered_groups:
        group.rich_help_panel = panel
    app.add_typer(family)


_mount(run.app, _RUN)
_mount(decide.app, _DECIDE)
_mount(watch.app, _WATCH)
_mount(operate.app, _OPERATE)
app.add_typer(dead.dead, name="dead", rich_help_panel=_OPERATE)
app.add_typer(audit.audit, name="audit", rich_help_panel=_OPERATE)
app.add_typer(operate.keys, name="keys", rich_help_panel=_OPERATE)
app.add_typer(operate.config, name="config", rich_help_panel=_OPERATE)


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; expected errors are one line on standard error and exit code 1."""
    try:
        app()
    except (SettingsError, ContractError, BusUnavailable) as error:
        complaints.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from None
    except UnicodeEncodeError as error:  # an argument whose bytes are not UTF-8
        complaints.print(f"[red]error:[/] {escape(error.object)}: expected UTF-8", soft_wrap=True)
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None and error.errno not in _OF_OUTPUT:
            raise
        place = error.filename or "the output"
        reason = _REASONS.get(type(error), (error.strerror or "").lower())
        complaints.print(f"[red]error:[/] {escape(f'{place}: {reason}')}", soft_wrap=True)
        if error.filename is None:
            _drop_output()
        raise SystemExit(1) from None


def _drop_output() -> None:
    """What is still to be written goes nowhere: Python would try once more when it ends, say that
    this failed, too, and end with 120."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
