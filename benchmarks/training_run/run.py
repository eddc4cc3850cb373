"""A training script: the same epochs for every method, with three moments at which it may cut.

Promises: batches, their order and the learning rate of an epoch depend on task and seed alone;
epochs before the first cut are trained once for all methods that leave them alone, and their time
counts for each of them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from elesh import Evaluation

from .tasks import Split, Task

__all__ = ["Prefix", "Run", "macs_of", "parameters_of", "scored"]

CUTS = (0.4, 0.55, 0.7)
"""After which share of the epochs something may be cut."""
CALIBRATION = 512
Penalty = Callable[[nn.Module], Tensor]


@dataclass
class Prefix:
    """The state after the epochs before the first cut."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    seconds: float


@dataclass
class Run:
    """What a method works with. Its time counts from when it is made.

    Args:
        share: of the task's resource that may be left at the end.
        prefixes: what other runs of this task and seed have trained already.
    """

    task: Task
    seed: int
    share: float
    epochs: int
    prefixes: dict[str, Prefix]
    penalty: Penalty | None = None
    """Added to the loss before the first cut (sparsity training)."""
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    seconds: float = 0.0
    """Processor time of training, and of cutting."""
    cutting: float = 0.0
    """Of which cutting."""
    done: int = 0

    def __post_init__(self) -> None:
        self.rebuild(self.task.width)
        self.original = macs_of(self.model, self.example)
        """MACs of one sample before any cut."""

    def rebuild(self, width: int) -> None:
        """A new network, from the same seed."""
        torch.manual_seed(self.seed)
        self.model = self.task.build(width)
        self.renew()

    def renew(self) -> None:
        """A new optimizer: for who replaces the network's parameters."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=1e-3)

    @property
    def example(self) -> Tensor:
        """One sample."""
        return self.task.train.inputs[:1]

    @property
    def calibration(self) -> list[tuple[Tensor, Tensor]]:
        """Some hundred training samples, in batches."""
        train, size = self.task.train, 128
        stop = min(CALIBRATION, len(train))
        return [
            (train.inputs[i : i + size], train.labels[i : i + size]) for i in range(0, stop, size)
        ]

    def evaluate(self) -> Evaluation:
        """On validation data."""
        return scored(self.model, self.task.validation)

    @property
    def macs(self) -> float:
        """Share of the original MACs."""
        return macs_of(self.model, self.example) / self.original

    @property
    def left(self) -> float:
        """Share of what the task's budget is of."""
        return self.left_of(self.model)

    def left_of(self, model: nn.Module) -> float:
        """The same of another network."""
        if self.task.resource == "macs":
            return macs_of(model, self.example) / self.original
        return parameters_of(model) / parameters_of(self.task.build(self.task.width))

    def steps(self, at_once: bool = False) -> Iterator[float]:
        """Train; at three moments say what share of the resource may be left; train to the end.

        Args:
            at_once: all may go at the first moment, what is left of it at the others; not a third
                of the way each time.
        """
        for number, after in enumerate(CUTS, 1):
            self.train(round(after * self.epochs))
            if at_once and self.left <= self.share:
                continue
            begun = time.process_time()
            yield self.share if at_once else self.share ** (number / len(CUTS))
            self.cutting += time.process_time() - begun
        self.seconds += self.cutting
        self.train(self.epochs)

    def train(self, until: int | None = None) -> None:
        """Epochs up to this one."""
        until = self.epochs if until is None else until
        first = round(CUTS[0] * self.epochs)
        name = self.penalty.__name__ if self.penalty else ""
        if self.done == 0 and until >= first and self._standard():
            if name not in self.prefixes:
                self._train(first)
                state = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
                self.prefixes[name] = Prefix(*state, self.seconds)
            found = copy.deepcopy(self.prefixes[name])
            self.model.load_state_dict(found.model)
            self.optimizer.load_state_dict(found.optimizer)
            self.seconds, self.done = found.seconds, first
        self._train(until)

    def epoch(self, number: int) -> None:
        """Train one epoch, for loops of a method's own."""
        self._train(number)

    def _standard(self) -> bool:
        return macs_of(self.model, self.example) == self.original

    def _train(self, until: int) -> None:
        begun, train = time.process_time(), self.task.train
        while self.done < until:
            generator = torch.Generator().manual_seed(self.seed * 10_007 + self.done)
            torch.manual_seed(self.seed * 10_007 + self.done)
            order = torch.randperm(len(train), generator=generator)
            order = order[: len(order) // self.task.batch * self.task.batch]
            rows = order.split(self.task.batch)
            self.model.train()
            for number, chosen in enumerate(rows):
                self._rate((self.done + number / len(rows)) / self.epochs)
                inputs, labels = train.inputs[chosen], train.labels[chosen]
                if inputs.ndim == 4:  # images, moved by up to two pixels
                    moved = torch.randint(-2, 3, (2,), generator=generator).tolist()
                    inputs = torch.roll(inputs, moved, (2, 3))
                loss = loss_of(self.model(inputs), labels)
                if self.penalty is not None and self.done < round(CUTS[0] * self.epochs):
                    loss = loss + self.penalty(self.model)
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
            self.done += 1
        self.seconds += time.process_time() - begun

    def _rate(self, progress: float) -> None:
        """One cosine, after a warm-up of a twentieth."""
        rate = self.task.rate * min(1.0, progress / 0.05 + 0.05)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, of every position of sequences."""
    return cross_entropy(outputs.flatten(0, -2), labels.flatten())


@torch.no_grad()
def scored(model: nn.Module, data: Split) -> Evaluation:
    """Accuracy and mean cross-entropy, in evaluation mode; the mode is put back."""
    was = model.training
    model.eval()
    outputs = torch.cat([model(part) for part in data.inputs.split(256)])
    model.train(was)
    right = (outputs.argmax(-1) == data.labels).float().mean()
    return Evaluation(float(right), float(loss_of(outputs, data.labels)))


def macs_of(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one sample, as PyTorch counts them: no method's own count."""
    was = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    model.train(was)
    return int(counter.get_total_flops()) // 2


def parameters_of(model: nn.Module) -> int:
    """All that are trained."""
    return sum(p.numel() for p in model.parameters())
