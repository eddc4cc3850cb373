"""Parameter masks at scale: time, memory, false marks and recall on planted networks.

    python -m benchmarks.speed.parameters --elements 10_000_000 --live 100_000

Every element outside ``--live`` is dead (importance 0); live ones are log-normal and at least ten
times the threshold. The trainer's sketch is sized by the document's formula for worker sketches.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from elesh.analysis import CountMinSketch, element_keys
from elesh.analysis.sketch.parameter_masks import Marking, analyze_parameters
from leyline import IdempotencyKey, Level, ParameterIdentifier

_TENSOR = 5_000_000
_THRESHOLD = 1e-8


def planted(elements: int, live: int, seed: int) -> tuple[list[ParameterIdentifier], np.ndarray]:
    """Tensors of up to five million elements, and the rising places of the live ones."""
    sizes = [min(_TENSOR, elements - start) for start in range(0, elements, _TENSOR)]
    tensors = [
        ParameterIdentifier(path=f"layer{i}.weight", shape=(size,), dtype="float32")
        for i, size in enumerate(sizes)
    ]
    places = np.random.default_rng(seed).choice(elements, live, replace=False)
    return tensors, np.sort(places)


def filled(tensors: list[ParameterIdentifier], live: np.ndarray, seed: int) -> CountMinSketch:
    """The worker-sized sketch of the planted importance."""
    sketch = CountMinSketch.offline(sum(t.shape[0] for t in tensors), seed=seed)
    random, start = np.random.default_rng(seed), 0
    for tensor in tensors:
        here = live[(live >= start) & (live < start + tensor.shape[0])] - start
        values = np.maximum(10 * _THRESHOLD, random.lognormal(-10, 3, len(here)))
        sketch.add(element_keys(tensor.identifier, here), values)
        start += tensor.shape[0]
    return sketch


def main() -> None:
    """Print one row of figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=lambda text: int(text.replace("_", "")), default=10**7)
    parser.add_argument("--live", type=lambda text: int(text.replace("_", "")), default=10**5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    tensors, live = planted(asked.elements, asked.live, asked.seed)
    sketch = filled(tensors, live, asked.seed)
    key = IdempotencyKey(40, "0" * 16, "bench", Level.PARAMETER)
    begun = time.perf_counter()
    masks, report = analyze_parameters(
        key, tensors, sketch, {}, Marking(_THRESHOLD), threads=asked.threads
    )
    seconds = time.perf_counter() - begun
    start, false, marked = 0, 0, 0
    bits = {mask.parameter.path: mask for mask in masks.masks}
    for tensor in tensors:
        size = tensor.shape[0]
        if tensor.path in bits:
            here = live[(live >= start) & (live < start + size)] - start
            kept = np.frombuffer(bits[tensor.path].bits, np.uint8)
            false += int((kept[here >> 3] >> (7 - (here & 7)) & 1 == 0).sum())
            marked += bits[tensor.path].marked
        start += size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{asked.elements:,} elements, {asked.live:,} live, sketch {sketch.width:,} x "
        f"{sketch.depth}: {seconds:.1f} s, peak {peak:.2f} GiB, {false} false marks, recall "
        f"{marked / (asked.elements - asked.live):.4f} (expected {report.expected_recall:.4f})"
    )


if __name__ == "__main__":
    main()
