"""Does the trainer's own accuracy drop lie inside the interval that the worker stated?

    python -m benchmarks.pruning.intervals --seeds 0 1 2 3 4 5 6 7 8 9

Runs ``elesh demo`` for every seed, all levels (channels, heads, layers), and compares: the worker's
interval says where the drop on as many other samples lies; the trainer masks the cut some epochs
later, on a network that has been trained on, and measures on its validation data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.report import show, write
from elesh.demo.run import Demo, run_demo


def cuts_of(seed: int, epochs: int | None) -> list[dict[str, Any]]:
    """The cuts of one run that a worker measured and the trainer tried."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        code = run_demo(
            Demo(epochs=epochs, workers=1, seed=seed, json_file=file), Console(quiet=True)
        )
        report: dict[str, Any] = json.loads(file.read_text())
    if code:
        raise RuntimeError(f"seed {seed}: the demo ended with {code}")
    found: list[dict[str, Any]] = report["cuts"]
    return [cut for cut in found if cut["trainer_accuracy_drop"] is not None]


def main() -> None:
    """Run and print, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, help="the whole schedule if not given")
    parser.add_argument("--json", type=Path, help="write all figures of all seeds to this file")
    asked = parser.parse_args()
    figures: dict[int, list[dict[str, Any]]] = {}
    for seed in asked.seeds:
        figures[seed] = cuts_of(seed, asked.epochs)
        write(asked.json, figures)
    rows = [[str(seed), *_row(cuts)] for seed, cuts in figures.items()]
    rows.append(["all", *_row([cut for cuts in figures.values() for cut in cuts])])
    columns = ["seed", "decisions", "inside", "share", "worker's mean drop", "trainer's mean drop"]
    show("trainer's drops inside the workers' intervals", columns, rows)


def _row(cuts: list[dict[str, Any]]) -> list[str]:
    count, inside = len(cuts), sum(cut["inside"] for cut in cuts)
    means = [
        f"{sum(cut[name] for cut in cuts) / max(count, 1):.4f}"
        for name in ("worker_accuracy_drop", "trainer_accuracy_drop")
    ]
    return [str(count), str(inside), f"{inside / max(count, 1):.1%}", *means]


if __name__ == "__main__":
    main()
