"""What ``elesh.attach`` costs a training script on the machine that trains, in wall time.

    python -m benchmarks.training_run.overhead --task resnet --data digits.npz --pixels 14
    python -m benchmarks.training_run.overhead --task gpt --width 64 --depth 4

The same script, the same epochs, as it is and under ``elesh.attach`` with a worker beside it on the
same machine: default settings, the schedule's four phases a quarter of the epochs each, a
checkpoint after every tenth. Each run is a process of its own; the two of a seed follow each other,
which of them comes first alternates. Server and worker are started before the clock is. What the
training thread gives to Elesh is timed by part, in processor time where one thread trains; a part
that is called by another counts once. What the epochs themselves take more than those of the script
as it is, is the worker's part of what the cores share.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import elesh
from benchmarks.common.report import bars, show, write
from elesh.demo import local_fleet
from elesh.pruning import attached
from elesh.trainer import Recorder, Surgeon
from elesh.trainer.export import Exporter
from elesh.trainer.recovery.recovery import Recovery
from elesh.trainer.session import apply
from elesh.trainer.session import session as sessions
from elesh.trainer.session.apply import _Check

from .run import Run, scored
from .tasks import TASKS, Options

__all__ = ["Parts", "main"]

_CHECKPOINTS = 10
_PHASES = ("validation", "conservative", "moderate", "aggressive")
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "begin: samples": ((attached, "divided"),),
    "begin: recorder": ((Recorder, "__init__"),),
    "begin: surgeon": ((Surgeon, "__init__"), (Surgeon, "train_with")),
    "begin: preflight": ((sessions, "try_all"),),
    "measure": ((Recorder, "measure"), (Recorder, "moments")),
    "export": ((Exporter, "export"),),
    "publish": ((sessions.Session, "publish"),),
    "restore points": ((Recovery, "put"), (Recovery, "save")),
    "layer by layer": ((_Check, "_keep_outputs"), (_Check, "_solve_layers")),
    "batch statistics": ((apply, "estimated_batch_statistics"),),
    "evaluations": ((_Check, "_measure"), (elesh.Pruning, "evaluate"), (Run, "evaluate")),
    "cut": ((Surgeon, "cut"), (Surgeon, "mask"), (Surgeon, "cut_layers")),
    "the rest": (
        (elesh.Pruning, "step"),
        (elesh.Pruning, "__enter__"),
        (elesh.Pruning, "__exit__"),
    ),
}
"""Functions by part."""


class Parts:
    """Seconds by part while entered, by some clock; of a part only what is none of another."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner: list[float] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Have the functions timed."""
        with ExitStack() as stack:
            for part, places in PARTS.items():
                for owner, name in places:
                    work = self._timing(part, getattr(owner, name))
                    stack.enter_context(patch.object(owner, name, work))
            yield

    def _timing(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def clocked(*args: Any, **options: Any) -> Any:
            begun = self._clock()
            self._inner.append(0.0)
            try:
                return work(*args, **options)
            finally:
                took = self._clock() - begun
                self.seconds[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return clocked


def plain(run: Run) -> dict[str, Any]:
    """The script as it is."""
    begun = time.perf_counter(), time.process_time()
    run.train()
    return {"wall": time.perf_counter() - begun[0], "cpu": time.process_time() - begun[1]}


def under_elesh(run: Run) -> dict[str, Any]:
    """The script under ``elesh.attach``."""
    quarter = run.epochs // len(_PHASES)
    schedule = dict.fromkeys((f"{name}_epochs" for name in _PHASES), quarter)
    block = {"structured_pruning": {"safety_schedule": schedule}}
    one = torch.get_num_threads() == 1  # Then others on the machine count for nothing.
    parts, trained = Parts(time.thread_time if one else time.perf_counter), 0.0
    with tempfile.TemporaryDirectory() as folder, local_fleet(block) as (url, settings):
        before = _seconds_of_children()
        begun = time.perf_counter(), time.process_time(), time.thread_time()
        with (
            parts.timed(),
            elesh.attach(
                run.model,
                run.optimizer,
                run_id="overhead",
                calibration=run.calibration,
                evaluate=run.evaluate,
                budget={run.task.resource: run.share} if run.share < 1 else None,
                removed_at_most=0.9 if run.share < 1 else None,
                every=max(1, run.epochs // _CHECKPOINTS),
                url=url,
                settings=settings,
                restore_dir=folder,
            ) as pruning,
        ):
            for epoch in pruning.epochs(run.epochs):
                started = time.perf_counter()
                run.epoch(epoch)
                trained += time.perf_counter() - started
                pruning.step(epoch)
        wall, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
        thread = time.thread_time() - begun[2]
        children = _seconds_of_children() - before
        results = [outcome.result for outcome in pruning.outcomes if outcome.watched != 0]
    return {
        "wall": wall,
        "cpu": cpu,
        "thread": thread,
        "training": trained,
        "children": children,
        "left": run.macs,
        "outcomes": {result: results.count(result) for result in dict.fromkeys(results)},
        "parts": parts.seconds,
    }


def _seconds_of_children() -> float:
    """Processor seconds of all processes that descend from this one."""
    ticks, parents = dict[int, int](), dict[int, int]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(fields[1])
        ticks[int(folder.name)] = int(fields[11]) + int(fields[12])
    found, ours = 0, {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        found += sum(ticks[pid] for pid in more)
        ours |= more
    return found / os.sysconf("SC_CLK_TCK")


def one_run(asked: argparse.Namespace, seed: int) -> None:
    """Train once, and print what it took as a line of JSON."""
    options = Options(**{name: getattr(asked, name) for name in asdict(Options())})
    torch.set_num_threads(asked.threads)
    task = TASKS[asked.task](options, seed, asked.data, asked.task)
    run = Run(task, seed, asked.share, options.epochs, {})
    found = plain(run) if asked.only == "plain" else under_elesh(run)
    after = scored(run.model, task.test)
    print(json.dumps(found | {"accuracy": after.accuracy, "loss": after.loss}), flush=True)


def both(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """What the two runs of every seed took."""
    pairs = []
    for number, seed in enumerate(asked.seeds):
        pair: dict[str, Any] = {"seed": seed, "load": os.getloadavg()[0]}
        for kind in ("plain", "attached")[:: -1 if number % 2 else 1]:
            again = [*sys.argv[1:], "--seeds", str(seed), "--only", kind]
            command = [sys.executable, "-m", "benchmarks.training_run.overhead", *again]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            pair[kind] = json.loads(made.stdout.splitlines()[-1])
        pairs.append(pair)
        print(json.dumps(pair), flush=True)
    return pairs


def main() -> None:
    """Print by how much longer it takes, and by which parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="resnet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--share", type=float, default=1.0, help="budget; 1: the schedule's limits")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    for name, value in asdict(Options(epochs=40)).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--data", type=Path, help="digits: .npz with images and labels")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("plain", "attached"), help="one run, as a line of JSON")
    asked = parser.parse_args()
    if asked.only:
        one_run(asked, asked.seeds[0])
        return
    pairs = both(asked)
    own = [pair["attached"] for pair in pairs]
    ratios = [pair["attached"]["wall"] / pair["plain"]["wall"] for pair in pairs]
    rows = [["wall time with over without", bars(ratios)]]
    rows += [["the script, seconds", bars([pair["plain"]["wall"] for pair in pairs], 1)]]
    rows += [[name, bars([x["parts"][name] for x in own], 2)] for name in PARTS]
    rows += [["the script's own epochs", bars([x["training"] for x in own], 1)]]
    waits = [x["wall"] - x["training"] - sum(x["parts"].values()) for x in own]
    rows += [["waits for the disk and for others", bars(waits, 1)]]
    rows += [["server and worker, CPU seconds", bars([x["children"] for x in own], 1)]]
    rows += [["MACs left", bars([x["left"] for x in own])]]
    show(f"{asked.task}, {asked.threads} threads", ["", "seconds"], rows)
    write(asked.json, pairs)


if __name__ == "__main__":
    main()
