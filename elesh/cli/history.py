"""``elesh history``: how the importance of a run's channels moved over its checkpoints."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from elesh.analysis import ImportanceTracker, Track
from elesh.analysis.candidates import Doubles
from elesh.bus import Bus
from elesh.bus.admission import hear
from elesh.operate.tables import compact
from elesh.settings import Settings
from leyline import CheckpointReady, ContractError, PruningGroup
from leyline.streams import CHECKPOINTS

from .common import AsJson, RedisOption, SettingsOption, console, fail, on_bus, print_json

app = typer.Typer()


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
