"""The tasks: data, split by the seed, and a network of a given width.

Promises: nothing is fetched; test data is looked at by no method; the same options and seed give
the same task.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits, make_classification
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from .nets import ConvolutionVit, Gpt, ResNet, Tabular, Vit

__all__ = ["Options", "Split", "TASKS", "Task"]


@dataclass(frozen=True)
class Options:
    """What is asked for; results of other options are other results."""

    epochs: int = 10
    samples: int = 2000
    """Training samples (of ``gpt``: passages); small tables have fewer."""
    pixels: int = 28
    width: int = 0
    """Of the network; 0: the task's own."""
    depth: int = 0
    """Blocks of the transformers; 0: the task's own."""
    context: int = 64
    """Characters a passage of ``gpt``."""


@dataclass(frozen=True)
class Split:
    """Inputs and labels, samples first."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """What a method is given."""

    name: str
    build: Callable[[int], nn.Module]
    """From a width to a network."""
    width: int
    train: Split
    validation: Split
    """For a method's own checks."""
    test: Split
    rate: float
    """Highest learning rate of AdamW."""
    batch: int = 64
    resource: str = "macs"
    """What the budget is of: ``macs`` or ``parameters``."""


def mnist(options: Options, seed: int, data: Path | None, kind: str) -> Task:
    """Handwritten digits from an ``.npz`` of ``images`` [N, 28, 28] and ``labels`` [N].
    ``mnist-table``: their pixels as the columns of a table."""
    if data is None:
        raise SystemExit(f"{kind}: name the file of digits with --data")
    with np.load(data) as file:
        images, labels = file["images"], file["labels"]
    x = torch.from_numpy(images.astype(np.float32) / 255).unsqueeze(1)
    if options.pixels != x.shape[-1]:
        x = avg_pool2d(x, x.shape[-1] // options.pixels)
    if kind == "mnist-table":
        x = x.flatten(1)
    splits = _split(x, torch.from_numpy(labels.astype(np.int64)), options.samples, seed)
    if kind == "mnist-table":
        columns = x.shape[1]
        build = partial(Tabular, columns=columns, classes=10)
        return Task(kind, build, options.width or 96, *splits, rate=4e-3)
    if kind == "resnet":
        return Task(kind, ResNet, options.width or 16, *splits, rate=4e-3)
    if kind == "vit-stem":
        depth = options.depth or 2
        build = partial(ConvolutionVit, depth=depth)
        return Task(kind, build, options.width or 48, *splits, rate=3e-3)
    depth = options.depth or 4
    return Task(
        kind, lambda w: Vit(w, depth, options.pixels), options.width or 64, *splits, rate=2e-3
    )


def tabular(options: Options, seed: int, data: Path | None, kind: str) -> Task:
    """``tabular``: the digits of scikit-learn as a table of 64 columns. ``clusters``: a table that
    scikit-learn makes, of 40 columns, 20 of them of use, and 24 clusters in 8 classes."""
    if kind == "tabular":
        x, y = load_digits(return_X_y=True)
    else:
        x, y = make_classification(
            12_000, 40, n_informative=20, n_classes=8, n_clusters_per_class=3, random_state=7
        )
    rows = torch.from_numpy(((x - x.mean(0)) / (x.std(0) + 1e-9)).astype(np.float32))
    count = min(options.samples, int(0.6 * len(rows)))
    splits = _split(rows, torch.from_numpy(y.astype(np.int64)), count, seed)
    columns, classes = rows.shape[1], int(y.max()) + 1
    return Task(
        kind, lambda w: Tabular(w, columns, classes), options.width or 192, *splits, rate=4e-3
    )


def gpt(options: Options, seed: int, data: Path | None, kind: str) -> Task:
    """Characters of Python's own reference, as it comes with the interpreter (``help()``).
    ``gpt-parameters``: the same, with budgets of parameters."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    codes = np.frombuffer(text, np.uint8)
    known, numbers = np.unique(codes, return_inverse=True)
    length = options.context
    passages = torch.from_numpy(numbers[: len(numbers) // (length + 1) * (length + 1)].copy())
    rows = passages.long().view(-1, length + 1)
    splits = _split(rows[:, :-1], rows[:, 1:], min(options.samples, int(0.8 * len(rows))), seed)
    depth = options.depth or 6
    return Task(
        kind,
        lambda w: Gpt(w, depth, length, len(known)),
        options.width or 256,
        *splits,
        rate=2e-3,
        batch=32,
        resource="parameters" if kind == "gpt-parameters" else "macs",
    )


def _split(inputs: Tensor, labels: Tensor, train: int, seed: int) -> tuple[Split, Split, Split]:
    """Training, validation (a fifth of the rest, 600 at most) and test data (5,000 at most)."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    rest = len(order) - train
    middle = train + min(600, rest // 5 if rest > 1000 else rest // 3)
    parts = order[:train], order[train:middle], order[middle : middle + 5000]
    first, second, third = (Split(inputs[rows].contiguous(), labels[rows]) for rows in parts)
    return first, second, third


TASKS: dict[str, Callable[[Options, int, Path | None, str], Task]] = {
    "tabular": tabular,
    "clusters": tabular,
    "mnist-table": mnist,
    "resnet": mnist,
    "vit": mnist,
    "vit-stem": mnist,
    "gpt": gpt,
    "gpt-parameters": gpt,
}
"""By the name on the command line."""
