"""How large a fleet must be: by measured costs, the same in page, command and model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elesh.cli import app
from elesh.operate.sizing import FULL, Load, costs, server_cores, size

DOCS = Path(__file__).parents[1] / "docs"


def test_every_cost_was_measured() -> None:
    assert costs().machine
    assert all(value > 0 for name, value in vars(costs()).items() if name != "machine")


def test_more_runs_never_need_less_of_anything() -> None:
    sizes = [size(Load(runs)) for runs in (1, 10, 100, 1000, 10_000)]
    for name in ("partitions", "servers", "workers", "cores", "memory", "network"):
        found = [getattr(each, name) for each in sizes]
        assert found == sorted(found), name
    assert (sizes[0].partitions, sizes[0].servers) == (1, 1)
    assert sizes[-1].partitions > 1, "what trainers read of each other does not fit on one"


def test_no_server_has_more_to_do_than_it_is_given() -> None:
    for runs in (10, 1000, 30_000):
        made = size(Load(runs))
        assert made.cores <= FULL * made.servers * 1.0001
        assert made.servers <= made.partitions <= made.workers


def test_what_trainers_read_of_each_other_grows_with_the_square_of_a_partition_s_runs() -> None:
    only = replace(
        costs(), checkpoint_server=0, megabyte_server=0, trainer_server=0, worker_server=0
    )
    one, ten = (server_cores(Load(runs), 1, 1, only) for runs in (100, 1000))
    assert ten == pytest.approx(100 * one)
    assert server_cores(Load(1000), 10, 10, only) == pytest.approx(ten / 10)


def test_the_command_and_the_page_say_the_same() -> None:
    done = CliRunner().invoke(app, ["plan", "1000", "--runs", "10000"])
    made = size(Load(10_000))
    text = " ".join(done.output.split())
    assert f"{made.partitions} partitions on {made.servers} servers" in text
    row = next(
        line
        for line in (DOCS / "scaling.md").read_text().splitlines()
        if line.startswith("| 10000 | 600 s")
    )
    assert f"| {made.workers} | {made.partitions} | {made.servers} |" in row


def test_the_model_is_as_busy_as_the_sum_of_its_costs() -> None:
    pytest.importorskip("simpy")
    from benchmarks.scale.model import MEASURED, fit, simulate

    load = Load(200, 60, 1, 1)
    found = simulate(load, costs(), events=1500)
    assert found.busy == pytest.approx(server_cores(load, 1, 1, costs()), rel=0.2)
    points = json.loads(MEASURED.read_text())
    assert fit(points, "").checkpoint_server == pytest.approx(costs().checkpoint_server, rel=0.01)
