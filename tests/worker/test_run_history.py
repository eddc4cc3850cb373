"""What workers measure becomes the run's history: once an epoch, whoever measured it."""

from __future__ import annotations

import pytest
from station import Station, checkpoint
from typer.testing import CliRunner

from elesh.analysis import ImportanceTracker
from elesh.analysis.importance.tracker import measurements_of
from elesh.bus import Bus
from elesh.cli import app
from leyline import CheckpointBundle


def recalled(station: Station) -> ImportanceTracker:
    async def action(bus: Bus) -> ImportanceTracker:
        store = bus.history(500, 10**9)
        epochs = await store.epochs("run")
        return ImportanceTracker.of_epochs("run", await store.recall("run", epochs), 500)

    return station.on_bus(action)


def expected(bundles: list[CheckpointBundle]) -> bytes:
    tracker = ImportanceTracker(500)
    for bundle in bundles:
        tracker.merge(ImportanceTracker.from_bytes(measurements_of(bundle, 500)))
    return tracker.to_bytes()


@pytest.mark.slow
def test_two_workers_and_repeated_events_give_the_history_of_the_checkpoints(
    station: Station,
) -> None:
    bundles = [checkpoint(epoch, seed=epoch, number=epoch) for epoch in range(60, 66)]
    station.worker()
    station.worker()
    station.publish(*bundles, times=2)
    station.wait_decisions(len(bundles))
    assert recalled(station).to_bytes() == expected(bundles)


def test_the_history_is_shown_by_group_and_by_channel(station: Station) -> None:
    bundles = [checkpoint(epoch, seed=epoch, number=epoch) for epoch in (60, 61, 62)]
    station.worker()
    station.publish(*bundles)
    station.wait_decisions(3)
    shared = ["--redis", station.url, "--settings", str(station.settings_file())]
    whole = CliRunner().invoke(app, ["history", "run", *shared])
    assert whole.exit_code == 0, whole.output
    name = bundles[0].architecture.groups[0].name
    assert name in whole.output
    one = CliRunner().invoke(app, ["history", "run", "--group", name, *shared])
    assert one.exit_code == 0, one.output
    assert "stability" in one.output
    unknown = CliRunner().invoke(app, ["history", "nobody", *shared])
    assert unknown.exit_code == 1
    assert "nobody" in unknown.output
