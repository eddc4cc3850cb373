"""``elesh validate``: a checkpoint against the design document's accuracy targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from elesh.observe.terminal import escape
from elesh.operate.tables import compact
from elesh.settings import Settings

from .common import AsJson, RedisOption, SettingsOption, complaints, console, on_bus, print_json

if TYPE_CHECKING:
    from elesh.analysis.accuracy import AccuracyCheck

app = typer.Typer()
_COLOURS = {"passed": "green", "missed": "red", "out of reach": "yellow", "not measured": "dim"}


@app.command()
def validate(
    folder: Annotated[Path, typer.Argument(help="A checkpoint bundle that a Recorder saved.")],
    settings: SettingsOption = None,
    units: Annotated[
        int, typer.Option(min=2, help="Channels of a group that are masked one by one, at most.")
    ] = 64,
    as_json: AsJson = False,
    redis: RedisOption = "",
) -> None:
    """Measure how accurate the importance of a saved checkpoint is; exit code 1 if a target is
    missed. With a server the figures are published as telemetry of the run."""
    from elesh.operate.actions import operator
    from elesh.operate.validate import publish_checks
    from elesh.operate.validate import validate as check
    from leyline import CheckpointBundle

    bundle, loaded = CheckpointBundle.load(folder), Settings.load(settings)
    with Progress(console=complaints, transient=True) as bar:
        task = bar.add_task("masking channels", total=None)
        checks = check(
            bundle,
            loaded,
            units=units,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print_json([asdict(c) | {"verdict": c.verdict} for c in checks])
    else:
        _show(checks)
    if redis or loaded.bus.url:
        on_bus(redis, settings, lambda bus, _: publish_checks(bus, bundle, checks, operator()))
    if any(c.verdict == "missed" for c in checks):
        raise typer.Exit(1)


def _show(checks: Sequence[AccuracyCheck]) -> None:
    """A table on a terminal, lines elsewhere; what each figure compares below it."""
    rows = [
        (c.name, c.metric, _figure(c.value), f"{c.target:g}", _figure(c.ceiling), c.verdict)
        for c in checks
    ]
    if console.is_terminal:
        numbers = ("measured", "wanted", "half split")
        table = compact("target", "metric", *numbers, "verdict", figures=numbers)
        for *cells, verdict in rows:
            table.add_row(*cells, f"[{_COLOURS[verdict]}]{verdict}[/]")
        console.print(table)
    else:
        for name, metric, value, target, ceiling, verdict in rows:
            figures = f"{metric} {value}, wanted {target}, half split {ceiling}"
            console.print(f"{name}: {verdict}: {figures}", soft_wrap=True)
    for c in checks:
        console.print(f"  {c.name}: {escape(c.detail)}", soft_wrap=True)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
