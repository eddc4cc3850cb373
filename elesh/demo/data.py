"""Real handwritten digits: scikit-learn's bundled 1,797 images of 8x8, split by a seed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["Digits", "Split"]

_CALIBRATION = 512


@dataclass(frozen=True)
class Split:
    """Images [N, 1, 8, 8] in 0..1, float32, and labels [N], int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """Training data, data for workers to measure cuts on, validation data for the trainer's own
    check, and held-out data for the report.

    The calibration batch is a part of the training data; held-out data is looked at only to
    report, never to decide.
    """

    train: Split
    proof: Split
    validation: Split
    held_out: Split

    @classmethod
    def load(cls, seed: int) -> Digits:
        """60% to train, 12.5% for workers, 12.5% to validate, 15% held out."""
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(labels))
        x = torch.from_numpy((images[order] / 16).astype(np.float32)).view(-1, 1, 8, 8)
        y = torch.from_numpy(labels[order].astype(np.int64))
        ends = [int(share * len(y)) for share in (0, 0.6, 0.725, 0.85, 1)]
        return cls(*(Split(x[a:b], y[a:b]) for a, b in pairwise(ends)))

    def calibration(self, batch: int = 256) -> list[tuple[Tensor, Tensor]]:
        """The first 512 training samples, in batches: the same at every checkpoint."""
        stop = min(_CALIBRATION, len(self.train))
        return [
            (self.train.images[i : i + batch], self.train.labels[i : i + batch])
            for i in range(0, stop, batch)
        ]
