"""Batch statistics re-estimated after a cut: what normalisations expect is what now enters them.

A refitted consumer sends out almost what it sent before, not just that; over many layers the small
differences add up, and the running means and variances of normalisations behind are those of
another network. One forward pass over calibration samples sets them right.

Promises: only running means and variances change; every other module stays in the mode it is in,
so that dropout draws nothing; momentum and counters are the user's afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from elesh.trainer.network.calling import batch_size, call, device_of, map_tensors

__all__ = ["reestimate_batch_statistics"]


@torch.no_grad()
def reestimate_batch_statistics(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> int:
    """Set the running statistics of batch normalisations to the means over ``batches``.

    Args:
        batches: (inputs, labels) pairs, the largest first; labels are not looked at, batches of
            less than half the largest are left out.

    Returns:
        How many normalisations were set; 0, without a pass, where there are none.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    norms = [m for m in norms if m.running_mean is not None]
    if not norms:
        return 0
    before = [(m, m.momentum, m.num_batches_tracked.clone()) for m in norms]  # type: ignore[union-attr]
    modes = [(module, module.training) for module in model.modules()]
    kept = [(m, m.running_mean.clone(), m.running_var.clone()) for m in norms]  # type: ignore[union-attr]
    seen, largest, device = 0, 0, device_of(model)
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # The plain mean over batches.
        for inputs, _ in batches:
            size = batch_size(inputs)
            largest = max(largest, size)
            if size < 2 or 2 * size < largest:  # A small rest would count as much as the others.
                continue
            call(model, map_tensors(lambda x: x.to(device), inputs))
            seen += 1
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        for norm, mean, variance in kept:
            sound = norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()  # type: ignore[union-attr]
            if not seen or not sound:
                norm.running_mean.copy_(mean)  # type: ignore[union-attr]
                norm.running_var.copy_(variance)  # type: ignore[union-attr]
    return len(norms) if seen else 0
