"""Accuracy against MACs and latency, of a training script that cuts, by several methods.

    python -m benchmarks.training_run --tasks tabular --shares 50 30 15 --seeds 0 1 2
    python -m benchmarks.training_run --tasks resnet,vit --data digits.npz --pixels 14
    python -m benchmarks.training_run.picture benchmarks/training_run/results.jsonl docs/gain.svg

Every finished run is a line of JSON in ``--out``; a run that has one is not repeated, so that a
command that was killed is simply given again. A method that fails is a line, too, with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .latency import speed_up
from .methods import METHODS, NotApplicable, lines_of
from .run import Prefix, Run, parameters_of, scored
from .tasks import TASKS, Options, Task

__all__ = ["main"]

_FIGURES = 5


def measured(task: Task, seed: int, method: str, share: float, run: Run) -> dict[str, Any]:
    """What a method makes of the script."""
    begun, busy = time.perf_counter(), time.process_time()
    METHODS[method](run)
    wall, busy = time.perf_counter() - begun, time.process_time() - busy
    found = scored(run.model, task.test)
    whole = task.build(task.width)
    return {
        "accuracy": found.accuracy,
        "loss": found.loss,
        "macs": run.macs,
        "parameters": parameters_of(run.model) / parameters_of(whole),
        "original_macs": run.original,
        "original_parameters": parameters_of(whole),
        "faster": speed_up(whole, run.model, task.train.inputs),
        "cpu_seconds": max(run.seconds, busy),  # the first is more where epochs were shared
        "cutting_seconds": run.cutting,
        "wall_seconds": wall,
        "lines": lines_of(method),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def line(task: Task, seed: int, method: str, share: float, run: Run) -> dict[str, Any]:
    """The same, or why there is nothing."""
    try:
        return measured(task, seed, method, share, run)
    except NotApplicable as error:
        return {"not_applicable": str(error)}
    except Exception as error:  # A peer's crash is a result.
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def wanted(asked: argparse.Namespace) -> Iterator[tuple[str, int, str, float]]:
    """Task, seed, method and share of every run; those of a seed one after another."""
    for task in asked.tasks:
        for seed in asked.seeds:
            for share in (percent / 100 for percent in asked.shares):
                for method in asked.methods:
                    if method != "unpruned" or share == asked.shares[0] / 100:
                        yield task, seed, method, 1.0 if method == "unpruned" else share


def main() -> None:
    """Run what is asked for and is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--tasks", type=split, default=["tabular"], help=", ".join(TASKS))
    parser.add_argument("--methods", type=lambda t: t.split(";"), help="; ".join(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=[70, 50, 30, 15], metavar="%")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--data", type=Path, help="digits: .npz with images and labels")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    asked = parser.parse_args()
    asked.methods = asked.methods or [name for name in METHODS if name != "ours, attached"]
    options = Options(**{name: getattr(asked, name) for name in asdict(Options())})
    torch.set_num_threads(1)
    done = set()
    if asked.out.exists():
        done = {key(json.loads(text)) for text in asked.out.read_text().splitlines()}
    prefixes: dict[tuple[str, int], dict[str, Prefix]] = {}
    for name, seed, method, share in wanted(asked):
        what = {"task": name, "method": method, "share": share, "seed": seed, **asdict(options)}
        if key(what) in done:
            continue
        task = TASKS[name](options, seed, asked.data, name)
        before = prefixes.setdefault((name, seed), {})
        found = line(task, seed, method, share, Run(task, seed, share, options.epochs, before))
        with asked.out.open("a") as file:
            file.write(json.dumps(what | rounded(found)) + "\n")
        print(json.dumps(what | rounded(found)), flush=True)


def key(what: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a run the same run."""
    return tuple(what[name] for name in ("task", "method", "share", "seed", *asdict(Options())))


def rounded(found: Any) -> Any:
    """Floats to five significant digits."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    return float(f"{found:.{_FIGURES}g}") if isinstance(found, float) else found


if __name__ == "__main__":
    main()
