"""How long a call of a network takes.

Promises: the least of single calls counts, until three more are no quicker; a device has finished
before the clock is read. What a trainer says of its cuts is, on a processor, the time that the
calling thread computed: others on the machine change it little, where they change the time by the
clock by factors.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from .calling import Inputs, call, device_of, example_of, map_tensors
from .state import preserve_state

__all__ = ["call_seconds", "timed_call"]

_CALLS = 3
"""Of each rank of several: a call may wait for the others."""
_SECONDS, _MOST_CALLS = 0.03, 30
"""Of a process alone: at most so long and so often, as long as it gets quicker by this share."""
_QUICKER = 0.02


def call_seconds(network: nn.Module) -> float | None:
    """Seconds of a call in evaluation mode with the batch that the network was measured with: those
    that the thread computed, on other devices those by the clock. None if there is no such batch,
    or it does not run (any more). Nothing of the network changes."""
    inputs = example_of(network)
    if inputs is None:
        return None
    try:
        with preserve_state(network, 0), torch.no_grad():
            clock = time.thread_time if device_of(network).type == "cpu" else time.perf_counter
            timed = timed_call(network, inputs, clock)
            best = timed(_CALLS)
            if dist.is_available() and dist.is_initialized():
                return best
            rounds = min(int(_SECONDS / max(best, 1e-7)), _MOST_CALLS) // _CALLS
            for _ in range(rounds - 1):
                before, best = best, min(best, timed(_CALLS))
                if best > (1 - _QUICKER) * before:
                    break
            return best
    except Exception:  # it is a figure for people: nothing hangs on it
        return None


def timed_call(
    network: nn.Module, inputs: Inputs, clock: Callable[[], float] = time.perf_counter
) -> Callable[[int], float]:
    """Calls the network so many times and returns the seconds of the quickest; it was called once
    before."""
    device = device_of(network)
    placed = map_tensors(lambda tensor: tensor.to(device), inputs)

    def finish() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    def timed(times: int) -> float:
        best = float("inf")
        for _ in range(times):
            begun = clock()
            call(network, placed)
            finish()
            best = min(best, clock() - begun)
        return best

    timed(1)
    return timed
