"""Golden rankings: fixed inputs give the recorded picks, so that no change of order goes unseen.

To renew after an intended change:
``PYTHONPATH=tests/support python tests/analysis/selection/test_golden_rankings.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "golden" / "rankings"
CASES = {
    "output_projection": {"scorer": "output_projection"},
    "multi_metric": {"scorer": "multi_metric"},
    "magnitude": {"scorer": "magnitude"},
    "fisher": {"scorer": "fisher"},
    "rounded_to_four": {"scorer": "output_projection", "round_to": 4},
}


def ranking(name: str) -> dict[str, Any]:
    """What is removed and spared in a fixed network with fixed statistics."""
    from networks import bundle, chain, settings

    from elesh import analyze
    from leyline import AnalysisParameters

    parameters = AnalysisParameters(**CASES[name])  # type: ignore[arg-type]
    checkpoint = bundle(chain((32, 48, 64), skip=(0,)), epoch=120, seed=11, parameters=parameters)
    decision = analyze(checkpoint, settings(redundancy_threshold=0.35))
    return {
        target.layer_name: {
            "removed": list(target.channel_indices),
            "importance": [float(f"{value:.4g}") for value in target.importance],
            "redundant": [[pair.kept, pair.removed] for pair in target.redundancy_pairs],
            "spared": [[spared.index, spared.reason] for spared in target.spared],
        }
        for target in decision.channels
    }


@pytest.mark.parametrize("name", CASES)
def test_a_fixed_input_gives_the_recorded_ranking(name: str) -> None:
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    found = ranking(name)
    for layer in recorded.keys() | found.keys():
        ours, theirs = found.get(layer, {}), recorded.get(layer, {})
        assert ours.pop("importance", None) == pytest.approx(theirs.pop("importance", []), rel=1e-3)
        assert ours == theirs


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        (FOLDER / f"{case}.json").write_text(json.dumps(ranking(case), indent=1) + "\n")
