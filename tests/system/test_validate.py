"""``elesh validate``: for people, for scripts, and on the bus."""

from __future__ import annotations

import json
from pathlib import Path

import proved_networks
import pytest
from command import elesh
from station import Station

from leyline.streams import TELEMETRY


@pytest.mark.slow
def test_validate_prints_every_target_and_tells_the_bus(station: Station, tmp_path: Path) -> None:
    bundle = proved_networks.perceptron().bundle
    folder = str(bundle.save(tmp_path / "bundle"))
    environment = {"ELESH_REDIS_URL": station.url, "ELESH_BUS__PARTITION": station.partition}
    lenient = {"ELESH_ACCURACY_TARGETS__CHANNEL_IMPORTANCE_RANKING__TARGET": "0.1"}
    done = elesh("validate", folder, "--units", "6", environment=environment | lenient)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [line.partition(":")[0] for line in lines] == [
        "channel_importance_ranking",
        "attention_redundancy_detection",
        "layer_skip_potential",
        "structured_pruning_accuracy",
    ]
    (event,) = station.messages(TELEMETRY)
    assert event.step == "validated"
    assert event.run_id == bundle.metadata.run_id
    assert f"kendall_tau {event.figures['channel_importance_ranking']:.3f}" in lines[0]
    assert "layer_skip_potential" not in event.figures
    shown = elesh("events", "--stream", "telemetry", environment=environment).stdout
    assert "validated" in shown


@pytest.mark.slow
def test_a_missed_target_is_exit_code_1_and_json_has_it(tmp_path: Path) -> None:
    folder = str(proved_networks.perceptron().bundle.save(tmp_path / "bundle"))
    narrow = {"ELESH_SKETCH_WIDTH": "10", "ELESH_SKETCH_DEPTH": "1"}
    done = elesh("validate", folder, "--units", "3", "--json", environment=narrow)
    assert done.returncode == 1
    verdicts = {check["name"]: check["verdict"] for check in json.loads(done.stdout)}
    assert verdicts["structured_pruning_accuracy"] == "missed"
