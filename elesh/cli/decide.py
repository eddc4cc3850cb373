"""Commands about decisions: make one from a folder, explain one, replay recorded ones; show the
history and the accuracy of a run's importance."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.progress import Progress
from rich.table import Table

from elesh.analysis import ImportanceTracker, Track
from elesh.analysis.candidates import Doubles
from elesh.bus import Bus
from elesh.bus.admission import hear
from elesh.observe import setup_tracing
from elesh.observe.spanfile import REPLAYS
from elesh.observe.terminal import escape
from elesh.operate.capture import open_case, versions
from elesh.operate.replay import Replayed, Selection, count_selected, replay_case
from elesh.operate.replay import capture as capture_case
from elesh.operate.replay import replay as replay_events
from elesh.operate.tables import compact
from elesh.settings import Settings
from leyline import CheckpointReady, ContractError, Level, PruningGroup
from leyline.streams import CHECKPOINTS

from .common import (
    AsJson,
    JsonLines,
    RedisOption,
    SettingsOption,
    complaints,
    console,
    counting,
    fail,
    on_bus,
    print_json,
    working,
)

if TYPE_CHECKING:
    from elesh.analysis.accuracy import AccuracyCheck

app = typer.Typer()


@app.command()
def analyze(
    folder: Annotated[Path, typer.Argument(help="A checkpoint bundle that a Recorder saved.")],
    settings: SettingsOption = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: AsJson = False,
    level: Annotated[
        Level | None,
        typer.Option(help="What may be removed; default: what the checkpoint asks for."),
    ] = None,
) -> None:
    """Analyse a saved checkpoint and decide, without a bus."""
    from elesh import CheckpointBundle
    from elesh import analyze as decide
    from elesh.operate.explain import print_decision
    from elesh.program import verifier

    bundle = CheckpointBundle.load(folder)
    loaded = Settings.load(settings)
    verify = verifier(bundle, loaded)
    with working("analysing"):
        decision = decide(bundle, settings=loaded, level=level, threads=threads, verify=verify)
    if as_json:
        print_json(decision.model_dump(mode="json"))
    else:
        print_decision(console, decision, bundle)


@app.command()
def explain(
    what: Annotated[str, typer.Argument(help="The key of a decision, or a bundle's folder.")],
    every: Annotated[
        bool, typer.Option("--all", help="Every unit, gate and reason, not just a screenful.")
    ] = False,
    as_json: AsJson = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Explain a decision: targets, scores, partners, units kept, gates."""
    from elesh.operate.explain import print_decision

    if Path(what).is_dir():
        analyze(Path(what), settings, as_json=as_json)
        return
    from elesh.operate.replay import decision_context
    from leyline import IdempotencyKey

    key = IdempotencyKey.parse(what)
    found = on_bus(redis, settings, lambda bus, loaded: decision_context(bus, loaded, key))
    if found is None:
        fail(f"{what}: no decision is recorded for this key")
    if as_json:
        print_json(found.decision.model_dump(mode="json"))
        return
    print_decision(console, found.decision, found.bundle, found.tracker, whole=every)
    if found.missing:
        console.print(f"  without the checkpoint's own figures: {escape(found.missing)}")


_SHOWN = 40


@app.command()
def replay(
    key: Annotated[
        str,
        typer.Argument(help="Key of a decision; default: every decision that the options select."),
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
    """Analyse recorded events again and compare with the decisions; publish nothing."""
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
    """Write a case into one file: event, blobs, decision, settings and versions."""
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
        lines = ["decided by other settings, which are no longer kept"]
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


@app.command()
def history(
    run: Annotated[str, typer.Argument(help="The training run.")],
    group: Annotated[str, typer.Option(help="Every channel of this group.")] = "",
    as_json: AsJson = False,
    redis: RedisOption = "",
    settings: SettingsOption = None,
) -> None:
    """Show trend and stability of a run's channels, from the measurements that workers kept."""
    tracks = on_bus(redis, settings, lambda bus, loaded: _tracks(bus, loaded, run))
    if not tracks:
        fail(f"{run}: no history is kept of this run, or its checkpoints have left the stream")
    if group and group not in tracks:
        fail(f"--group {group}: expected one of {', '.join(tracks)}")
    if as_json:
        print_json({name: _facts(tracks[name]) for name in ([group] if group else tracks)})
        return
    console.print(_of_group(group, tracks[group]) if group else _of_groups(tracks))


async def _tracks(bus: Bus, settings: Settings, run: str) -> dict[str, Track]:
    """The Taylor importance of the run's channels, by group."""
    kept = settings.importance_history_epochs
    store = bus.history(kept, int(settings.analysis_cache_size))
    found = await store.recall(run, await store.epochs(run))
    tracker = ImportanceTracker.of_epochs(run, found, kept)
    groups = await _groups(bus, run)
    return {g.name: tracker.track(g)["taylor"] for g in groups if tracker.epochs(g)}


async def _groups(bus: Bus, run: str) -> tuple[PruningGroup, ...]:
    """The groups of the run's newest checkpoint that is still in the stream."""
    for delivery in reversed(await bus.read(CHECKPOINTS)):
        try:
            message = hear(delivery, bus.guard).message
        except ContractError:
            continue  # it is among the dead letters
        if isinstance(message, CheckpointReady) and message.metadata.run_id == run:
            return message.architecture.groups
    return ()


def _facts(track: Track) -> dict[str, list[float]]:
    """Of each channel, as :func:`_of_group` prints it."""
    return {
        "latest": track.latest.tolist(),
        "average": track.ema.tolist(),
        "trend": _relative(track.trend, track.ema).tolist(),
        "stability": (1 / (1 + _relative(track.variance, track.ema**2))).tolist(),
    }


def _of_groups(tracks: dict[str, Track]) -> Table:
    figures = ("channels", "checkpoints", "rising", "falling", "stability")
    table = compact("group", *figures, figures=figures)
    for name, track in tracks.items():
        steady = 1 / (1 + _relative(track.variance, track.ema**2))
        table.add_row(
            name,
            str(len(track.ema)),
            str(int(track.count.max())),
            str(int((track.trend > 0).sum())),
            str(int((track.trend < 0).sum())),
            f"{np.nanmin(steady):.2f}..{np.nanmax(steady):.2f}",
        )
    return table


def _of_group(name: str, track: Track) -> Table:
    figures = ("channel", "latest", "average", "trend a checkpoint", "stability")
    table = compact(*figures, figures=figures, title=name)
    trend = _relative(track.trend, track.ema)
    steady = 1 / (1 + _relative(track.variance, track.ema**2))
    for unit in np.argsort(track.ema):
        table.add_row(
            str(unit),
            f"{track.latest[unit]:.3g}",
            f"{track.ema[unit]:.3g}",
            f"{trend[unit]:+.1%}",
            f"{steady[unit]:.2f}",
        )
    return table


def _relative(values: Doubles, scale: Doubles) -> Doubles:
    """Values as shares of a scale; 0 where the scale is 0."""
    return np.asarray(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0))


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
    """Measure how accurate the importance of a saved checkpoint is. Exit code 1 if a target is
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
