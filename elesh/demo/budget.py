"""``elesh demo --budget macs=0.3``: trains a network, then prunes it at once.

No server and no worker: train, ``elesh.prune`` in two steps with some training after each, and a
table of what that cost and brought.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional

import elesh
from elesh.pruning.latency import compared
from elesh.pruning.report import Figures

from .network import Digits, DigitsNet
from .training import evaluate

_EPOCHS = 12
_BATCH, _RATE, _SECOND_RATE = 128, 0.1, 0.03
_STEPS = 2
_DROPPED, _WIDTH = 0.3, 48
"""Wide enough for a processor to spend its time in what a cut removes: with 24 channels, most of a
call is what PyTorch needs for an operator, however narrow."""
_CALLED = (1, 32, 256)
"""Samples in a call whose time is shown: one alone is mostly such overhead, which goes with whole
layers only."""


@dataclass
class _Trained:
    """A network with its optimizer and data."""

    data: Digits
    model: DigitsNet
    optimizer: torch.optim.Optimizer

    def train(self, epochs: int, rate: float, console: Console, what: str) -> None:
        """Some epochs, the last with almost no learning rate."""
        shown = console.status(what) if console.is_terminal else None
        if shown is not None:
            shown.start()
        self.model.train()
        for epoch in range(epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = rate * max(0.01, 0.5 * (1 + math.cos(math.pi * epoch / epochs)))
            order = torch.randperm(len(self.data.train))
            for rows in torch.split(order, _BATCH):
                if len(rows) < 2:
                    continue  # a batch of one has no batch statistics
                images, labels = self.data.train.images[rows], self.data.train.labels[rows]
                self.optimizer.zero_grad()
                loss = functional.cross_entropy(self.model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            if shown is not None:
                shown.update(f"{what}: epoch {epoch + 1} of {epochs}")
        if shown is not None:
            shown.stop()
        found = evaluate(self.model, self.data.held_out)
        console.print(f"{what}: {epochs} epochs, accuracy {found.accuracy:.2%}", highlight=False)

    def figures(self, like: Figures, latency: Mapping[int, float]) -> Figures:
        """Of the network as it is, on data that nothing was decided by."""
        found = evaluate(self.model, self.data.held_out)
        return replace(like, accuracy=found.accuracy, loss=found.loss, latency=dict(latency))


def run_budget(
    budget: Mapping[str, float],
    console: Console,
    *,
    epochs: int | None = None,
    seed: int = 0,
    json_file: Path | None = None,
) -> int:
    """Train, prune to ``budget`` in steps, train a little after each, and show both networks.

    Args:
        epochs: before the first cut; after each cut three eighths of that.

    Raises:
        InvalidField: if the budget names an unknown resource or no share.
    """
    begun = time.monotonic()
    torch.manual_seed(seed)
    # Blocks that it can do without: what is not called takes no time, unlike a narrow layer.
    model = DigitsNet(_WIDTH, blocks=(3, 1), identity=True, dropped=_DROPPED)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=0.9, weight_decay=5e-4)
    run = _Trained(Digits.load(seed), model, optimizer)
    epochs = epochs or _EPOCHS
    run.train(epochs, _RATE, console, "training")
    before, accuracy = copy.deepcopy(model), evaluate(model, run.data.held_out)

    def validation() -> elesh.Evaluation:
        return evaluate(model, run.data.validation)

    reports = []
    for step in range(1, _STEPS + 1):
        shares = {name: share ** (step / _STEPS) for name, share in budget.items()}
        report = elesh.prune(
            model,
            run.data.calibration(),
            shares,
            evaluate=validation,
            optimizer=optimizer,
            levels=("channel", "head", "layer"),
            max_accuracy_drop=0.5,  # training follows
            round_to=8,
        )
        reports.append(report)
        run.train(max(1, 3 * epochs // 8), _SECOND_RATE, console, "training the cut network")
    took = compared({"before": before, "after": model}, run.data.held_out.images, _CALLED)
    first, last = reports[0], reports[-1]
    whole = replace(
        last,
        original=first.original,
        before=replace(
            first.before, accuracy=accuracy.accuracy, loss=accuracy.loss, latency=took["before"]
        ),
        after=run.figures(last.after, took["after"]),
        data="held-out images",
    )
    console.print(str(whole), highlight=False, markup=False)
    console.print(f"{time.monotonic() - begun:.0f} s, no server", highlight=False)
    if json_file is not None:
        figures = {"before": vars(whole.before), "after": vars(whole.after), "met": whole.reached}
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    return 0
