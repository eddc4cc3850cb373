"""How fast channels are ranked and chosen. Prints figures, asserts nothing.

    python benchmarks/speed/selection.py [--channels 25000] [--samples 512] [--threads 2]

Scoring + selection from the three vectors (multi-metric), redundancy from a C x C matrix against
one plain read of it, and the greedy joint order on output projections with its extra memory.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from elesh.analysis.candidates import Candidates
from elesh.analysis.importance.scores import MID, multi_metric, redundant_pairs
from elesh.analysis.selection.choose import select
from elesh.analysis.selection.removal_order import JointOrder, StaticOrder
from leyline import ChannelImportanceData

GROUP = 250


def best_of(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def vectors(candidates: Candidates, rng: np.random.Generator) -> list[ChannelImportanceData]:
    """Log-normal importances of every group."""
    return [
        ChannelImportanceData(
            layer_name=name,
            taylor_importance=rng.lognormal(size=size).astype(np.float32),
            magnitude_importance=rng.lognormal(size=size).astype(np.float32),
            activation_frequency=rng.uniform(size=size).astype(np.float32),
        )
        for name, size in zip(candidates.names, candidates.sizes, strict=True)
    ]


def projections(count: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """[C, N]: 64 shared directions, own noise, log-normal sizes."""
    shared = rng.standard_normal((count, 64)) @ rng.standard_normal((64, samples)) / 8
    shared += 0.5 * rng.standard_normal((count, samples))
    return (shared * np.exp(1.5 * rng.standard_normal((count, 1)))).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=25_000)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    groups = max(1, asked.channels // GROUP)
    candidates = Candidates(
        tuple(f"g{i}" for i in range(groups)),
        (GROUP,) * groups,
        (GROUP - 16,) * groups,
        (1,) * groups,
    )
    quota = candidates.count // 5

    data = vectors(candidates, rng)
    seconds = best_of(
        lambda: select(lambda: StaticOrder(candidates, multi_metric(data, MID)), quota)
    )
    print(f"multi-metric scoring + selection  {candidates.count / seconds / 1e6:8.1f} M channels/s")

    unit = rng.standard_normal((2048, 256)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    matrix, scores = unit @ unit.T, rng.uniform(size=2048)
    read = best_of(matrix.sum)
    found = best_of(lambda: redundant_pairs(matrix, scores, 0.95))
    print(f"redundancy at C = 2048            {read / found:8.2f} x the speed of reading it once")

    columns = projections(candidates.count, asked.samples, rng)
    everything = np.ones(candidates.count, dtype=np.bool_)

    def greedy() -> object:
        return JointOrder(candidates, columns, threads=asked.threads).pick(quota, everything)

    print(f"greedy, 20% of {candidates.count} at N = {asked.samples}   {best_of(greedy, 2):8.2f} s")
    tracemalloc.start()
    greedy()
    extra = tracemalloc.get_traced_memory()[1] / columns.nbytes
    print(f"greedy, peak extra memory         {extra:8.2f} x G (and one G for the joined matrix)")


if __name__ == "__main__":
    main()
