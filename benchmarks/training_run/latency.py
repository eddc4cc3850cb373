"""How many times faster a network is than another, both measured in turns.

Promises: what is taken is the processor's time for one thread, so that other processes do not
count (they still share its caches); a busy moment of the machine hits both; the least of several
calls of each counts.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

__all__ = ["SIZES", "speed_up"]

SIZES = (1, 64)
"""Samples in a call."""
_ROUNDS, _SECONDS = 15, 0.02


@torch.no_grad()
def speed_up(before: nn.Module, after: nn.Module, inputs: Tensor) -> dict[str, float]:
    """By the samples in a call: time of ``before`` over that of ``after``, and both, in ms."""
    found = {}
    before.eval(), after.eval()
    for size in SIZES:
        batch = inputs[:size]
        counts = [max(1, int(_SECONDS / _timed(m, batch, 2))) for m in (before, after)]
        best = [float("inf")] * 2
        for _ in range(_ROUNDS):
            for n, model in enumerate((before, after)):
                best[n] = min(best[n], _timed(model, batch, counts[n]))
        found |= {
            f"{size}": best[0] / best[1],
            f"{size}_before_ms": 1e3 * best[0],
            f"{size}_after_ms": 1e3 * best[1],
        }
    return found


def _timed(model: nn.Module, batch: Tensor, calls: int) -> float:
    """Processor seconds a call."""
    begun = time.thread_time()
    for _ in range(calls):
        model(batch)
    return (time.thread_time() - begun) / calls
