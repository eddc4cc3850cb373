"""What a run does when analyses fail or the bus is away: it trains on and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from recorded import small_demo

SCHEDULE = dict.fromkeys(
    ("validation_epochs", "conservative_epochs", "moderate_epochs", "aggressive_epochs"), 2
)


@pytest.mark.soak
def test_after_three_failed_analyses_the_demo_trains_on_under_an_open_breaker(
    redis_url: str, partition: str, tmp_path: Path
) -> None:
    """The breaker alone: tests/worker/test_breaker.py."""
    settings = tmp_path / "short.yaml"
    sections = {
        "structured_pruning": {"safety_schedule": SCHEDULE},
        "bus": {"partition": partition},
        "breaker": {"recovery_seconds": 600},
    }
    settings.write_text(yaml.safe_dump({"elesh": sections}))
    out = tmp_path / "out.json"
    done = small_demo(
        "--epochs", "5", "--seed", "4", "--fail", "3", "--workers", "1",
        "--settings", str(settings), "--json", str(out),
        environment={"ELESH_REDIS_URL": redis_url, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert len(figures["failed"]) == 3
    assert [d["epoch"] for d in figures["decisions"]] == [4, 5]
    for decision in figures["decisions"]:
        assert not decision["approved"]
        assert "breaker: open" in decision["reason"]
        assert "statistics" in decision["reason"], "the reason names what failed"
    assert figures["parameters_after"] == figures["parameters_before"]


@pytest.mark.slow
def test_without_a_bus_the_demo_says_so_in_one_line_and_trains_to_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = small_demo(
        "--epochs", "1", "--workers", "1", "--json", str(out),
        environment={"ELESH_REDIS_URL": "redis://127.0.0.1:1/0", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum("does not answer" in line for line in done.stdout.splitlines()) == 1
    figures = json.loads(out.read_text())
    assert (figures["epochs"], figures["missed"], figures["decisions"]) == (1, 1, [])
