"""A trained network cut without any training, and what two epochs make of it.

    python -m benchmarks.pruning.recovery --data digits.npz --seeds 0 1

The networks and data of ``benchmarks.training_run``, trained to the end, then cut to a share of
their MACs: ours in one call of ``elesh.prune`` with as large a drop allowed as it takes,
torch-pruning in ten steps, its gradients taken anew at each, and with batch statistics
estimated anew at the end, which it does not do itself. Then two epochs of AdamW at a small
rate, the same for all. Every line of ``--out`` is one network; what has one is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import elesh
from benchmarks.training_run.methods import hessian, magnitude, taylor, torch_pruning
from benchmarks.training_run.run import Run, loss_of, scored
from benchmarks.training_run.tasks import TASKS, Options
from elesh.trainer.surgery.reconstruction.after_cut import reestimate_batch_statistics

EPOCHS, RATE = 2, 5e-4
"""Of the recovery."""
STEPS = 10
"""In which the others come down to the share, measured anew at each."""


@dataclass
class Cut(Run):
    """A run in which nothing is trained between the cuts."""

    trained: nn.Module | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained is not None:
            self.model = copy.deepcopy(self.trained)
            self.renew()

    def steps(self, at_once: bool = False) -> Iterator[float]:
        """Ten shares, one smaller than the other; or the last of them."""
        if at_once:
            yield self.share
            return
        for number in range(1, STEPS + 1):
            yield self.share ** (number / STEPS)


def ours(run: Run) -> None:
    """``elesh.prune`` in one call."""
    elesh.prune(
        run.model,
        run.calibration,
        {run.task.resource: run.share},
        evaluate=run.evaluate,
        optimizer=run.optimizer,
        max_accuracy_drop=0.95,
        progress=False,
    )


METHODS: dict[str, Callable[[Run], None]] = {
    "uncut": lambda run: None,
    "ours": ours,
    "torch-pruning magnitude": lambda run: torch_pruning(run, magnitude),
    "torch-pruning Taylor": lambda run: torch_pruning(run, taylor),
    "torch-pruning Hessian": lambda run: torch_pruning(run, hessian),
}


def recover(run: Run) -> None:
    """Two epochs, the same batches for everybody, with the optimizer as the cut has left it."""
    train = run.task.train
    for group in run.optimizer.param_groups:
        group["lr"] = RATE
    for epoch in range(EPOCHS):
        generator = torch.Generator().manual_seed(run.seed * 31 + epoch)
        order = torch.randperm(len(train), generator=generator)
        run.model.train()
        for rows in order[: len(order) // run.task.batch * run.task.batch].split(run.task.batch):
            run.optimizer.zero_grad()
            loss_of(run.model(train.inputs[rows]), train.labels[rows]).backward()  # type: ignore[no-untyped-call]
            run.optimizer.step()


def measured(trained: Run, method: str, share: float) -> dict[str, Any]:
    """One line."""
    task = trained.task
    run = Cut(task, trained.seed, share, trained.epochs, {}, trained=trained.model)
    if method != "uncut":
        METHODS[method](run)
        reestimate_batch_statistics(run.model, run.calibration)
    at_once = scored(run.model, task.test)
    recover(run)
    after = scored(run.model, task.test)
    return {
        "macs": run.macs,
        "accuracy": [at_once.accuracy, after.accuracy],
        "loss": [at_once.loss, after.loss],
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds."""
    rows = ["| MACs left | | at once | after two epochs |", "|---|---|---|---|"]
    for share in sorted({line["share"] for line in lines}, reverse=True):
        for method in METHODS:
            own = [x for x in lines if x["method"] == method and x["share"] == share]
            if own:
                left = statistics.fmean(x["macs"] for x in own)
                cells = [_told([x["accuracy"][n] for x in own]) for n in (0, 1)]
                rows.append(f"| {left:.2f} | {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _told(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f}" + (f" ±{error:.4f}" if error else "")


def main() -> None:
    """Measure what is not there yet, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="resnet", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, help="digits: .npz with images and labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="+", default=[50, 30, 15], metavar="%")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--pixels", type=int, default=14)
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options = Options(asked.epochs, asked.samples, asked.pixels, asked.width)
    text = asked.out.read_text() if asked.out.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    for seed in asked.seeds:
        task, trained = TASKS[asked.task](options, seed, asked.data, asked.task), None
        wanted = [("uncut", 1.0)]
        wanted += [(m, s / 100) for s in asked.shares for m in METHODS if m != "uncut"]
        for method, share in wanted:
            what = {"task": asked.task, "seed": seed, "method": method, "share": share}
            what |= vars(options)
            if any(line | what == line for line in lines):
                continue
            if trained is None:
                trained = Run(task, seed, 1.0, options.epochs, {})
                trained.train()
            lines.append(what | measured(trained, method, share))
            with asked.out.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(json.dumps(lines[-1]), flush=True)
    print(table([line for line in lines if line["task"] == asked.task]))


if __name__ == "__main__":
    main()
