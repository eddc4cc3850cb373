"""Latency of networks, measured in turns.

Promises: the networks take turns, so that a busy moment of the machine hits all of them; the least
of all single calls counts, which a process that is pushed aside meanwhile does not change; nothing
of them changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from elesh.trainer.network.calling import Inputs, batch_size, map_tensors, timed_call
from elesh.trainer.network.state import preserve_state

SIZES = (1, 32)
"""Samples in a call."""
_ROUNDS, _SECONDS = 7, 0.02
_CALM_ROUNDS, _CALM = 2, 0.99
"""After so many rounds in a row in which no network became faster than this share of its best, more
rounds would tell no more."""
_FEW_ROUNDS, _LONG_SECONDS = 2, 0.1
"""Calls that take this long are hit by little else, and cost much."""


def compared(
    networks: Mapping[str, nn.Module], inputs: Inputs, sizes: Sequence[int] = SIZES
) -> dict[str, dict[int, float]]:
    """Seconds a call of each network in evaluation mode, by the samples in it.

    Args:
        inputs: a batch; where it has fewer samples than are called with, its first come again.
        sizes: samples in a call.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in networks}
    with ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(preserve_state(network, 0))
        stack.enter_context(torch.no_grad())
        for size in sizes:
            batch = _of_size(inputs, size)
            for name, seconds in _side_by_side(networks, batch).items():
                found[name][size] = seconds
    return found


def _of_size(inputs: Inputs, size: int) -> Inputs:
    have = batch_size(inputs)

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim or len(tensor) != have:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % have]

    return map_tensors(rows, inputs)  # type: ignore[no-any-return]


def _side_by_side(networks: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, float]:
    best = dict.fromkeys(networks, float("inf"))
    calls = {name: timed_call(network, inputs) for name, network in networks.items()}
    took = {name: max(once(1), 1e-7) for name, once in calls.items()}
    counts = {name: max(1, int(_SECONDS / seconds)) for name, seconds in took.items()}
    calm = 0
    for _ in range(_ROUNDS if max(took.values()) < _LONG_SECONDS else _FEW_ROUNDS):
        before = dict(best)
        for name, timed in calls.items():
            best[name] = min(best[name], timed(counts[name]))
        calm = calm + 1 if all(best[n] >= _CALM * before[n] for n in best) else 0
        if calm == _CALM_ROUNDS:
            break
    return best
