"""Whether planted duplicates are found, and nothing else: precision and recall.

    python -m benchmarks.speed.redundancy [--channels 64 512 2048] [--seeds 0 1 2]

Rectified random activations; a fifth of the channels are copies of others, each scaled by a factor
from .1 to 10, with noise of a share of the original's standard deviation. The recorder's own tally
makes the correlations, and the analysis' rule (cosine above .95, the best of each group stays)
finds the pairs. Two noisy copies of one channel are less alike than each is to the original: with
noise above .28 not all of a family are alike by the rule, above .4 no copy is.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.common.report import bars, show
from elesh.analysis.importance.scores import redundant_pairs
from elesh.trainer.calibration.accumulators import cosines

NOISE = (0.0, 0.1, 0.25, 0.35)
THRESHOLD = 0.95
ROWS = 2048
"""Samples times positions."""


def planted(channels: int, noise: float, rng: np.random.Generator) -> tuple[Any, Any]:
    """Activations [ROWS, C], and [C] of which channel each is a copy (of itself if of none)."""
    copies = channels // 5
    own = np.maximum(rng.standard_normal((ROWS, channels - copies)), 0)
    parents = rng.choice(channels - copies, size=copies, replace=True)
    drawn = rng.standard_normal((ROWS, copies)) * own[:, parents].std(axis=0)
    scales = np.exp(rng.uniform(np.log(0.1), np.log(10), size=copies))
    places = rng.permutation(channels)
    activations = np.empty((ROWS, channels))
    activations[:, places] = np.hstack([own, scales * (own[:, parents] + noise * drawn)])
    origin = np.empty(channels, dtype=np.int64)
    origin[places] = places[np.concatenate([np.arange(channels - copies), parents])]
    return activations, origin


def figures(channels: int, noise: float, seed: int) -> tuple[float, float]:
    """Precision of the pairs, and the share of the copies that went or stayed for a twin."""
    rng = np.random.default_rng([seed, channels, round(100 * noise)])
    activations, origin = planted(channels, noise, rng)
    rows = torch.from_numpy(activations).float()
    pairs = redundant_pairs(cosines(rows.T @ rows), rng.uniform(size=channels), THRESHOLD)
    right = [pair for pair in pairs if origin[pair.kept] == origin[pair.removed]]
    # Of a family of n alike n - 1 are to go, whichever they are.
    due = channels - len(np.unique(origin))
    return len(right) / max(len(pairs), 1), len(right) / due


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    rows = []
    for channels in asked.channels:
        for noise in NOISE:
            found = [figures(channels, noise, seed) for seed in asked.seeds]
            precision, recall = zip(*found, strict=True)
            rows.append([f"{channels} channels", f"{noise:.2f}", bars(precision), bars(recall)])
    title = f"planted duplicates, {len(asked.seeds)} seeds"
    show(title, ["size", "noise", "precision", "recall"], rows)


if __name__ == "__main__":
    main()
