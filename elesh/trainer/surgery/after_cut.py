"""What a cut network needs for training to go on well: its batch statistics and its outputs' scale.

Batch statistics. A refitted consumer sends out almost what it sent before, not just that; over many
layers the small differences add up, and the running means and variances of the normalisations
behind are those of another network. One forward pass over calibration samples sets them right.

Scale. A network trained until it is sure of every training sample has next to no gradient left: two
more epochs follow the few samples it is not sure of and end below where they began, cut or not
(docs/decisions/trainer.md, 0087). Outputs that are multiplied by one number give the same answers,
and every sample counts again.

Promises: batch statistics change nothing but running means and variances, and every other module
stays in its mode; the scale changes nothing but the weight and bias of the layer that makes the
outputs, keeps the order of the classes for every input, and is never above 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from elesh.trainer.network.calling import batch_size, call, device_of, main_output, map_tensors
from elesh.trainer.network.state import Uncompiled, preserved

__all__ = [
    "estimated_batch_statistics",
    "has_batch_statistics",
    "put_batch_statistics",
    "reestimate_batch_statistics",
    "soften_outputs",
]


@torch.no_grad()
def reestimate_batch_statistics(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> int:
    """Set the running statistics of batch normalisations to the means over ``batches``.

    Args:
        batches: (inputs, labels) pairs, the largest first; labels are not looked at, batches of
            less than half the largest are left out.

    Returns:
        How many normalisations were set; 0, without a pass, where there are none.
    """
    norms = list(_tracking(model).values())
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


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether there is anything for :func:`reestimate_batch_statistics` to set."""
    return bool(_tracking(model))


def _tracking(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations with running statistics, by path. None where they synchronise with
    other processes, which do not run this pass."""
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    several = distributed.is_available() and distributed.is_initialized()
    if several and any(isinstance(norm, nn.SyncBatchNorm) for norm in norms.values()):
        return {}
    return {path: norm for path, norm in norms.items() if norm.running_mean is not None}


def estimated_batch_statistics(
    model: nn.Module, batches: Iterable[tuple[Any, Any]]
) -> dict[str, Tensor]:
    """What :func:`reestimate_batch_statistics` would set, by path of the buffer; empty where that
    is nothing. The network and random states are left as they were."""
    with preserved(model), Uncompiled(model):
        if not reestimate_batch_statistics(model, batches):
            return {}
        return {path: buffer.clone() for path, buffer in _statistics(model).items()}


def put_batch_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set running statistics, by path of the buffer; what they were."""
    buffers = _statistics(model) if statistics else {}
    before = {path: buffers[path].clone() for path in statistics}
    for path, new in statistics.items():
        buffers[path].data.copy_(new)
    return before


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}" if path else name: getattr(norm, name)
        for path, norm in _tracking(model).items()
        for name in ("running_mean", "running_var")
    }


_LEAST = 0.05
"""Outputs are not scaled further down than this."""
_STEPS = 30


@torch.no_grad()
def soften_outputs(model: nn.Module, batches: Iterable[tuple[Any, Any]], accuracy: float) -> float:
    """Scale the outputs down until the network is as sure of samples that it was trained on as it
    may be: their mean cross-entropy is at least ``-log(accuracy)``.

    Args:
        batches: (inputs, class labels) pairs of training data.
        accuracy: share of right answers on data that it was not trained on.

    Returns:
        The factor; 1 where nothing was changed: the network is not too sure, or its outputs are
        not made by one linear layer or convolution of their own.
    """
    layer, outputs, labels = _seen(model, batches)
    if layer is None or not 0 < accuracy < 1:
        return 1.0
    shape = tuple(outputs.shape)
    second = labels.shape == shape[:1] + shape[2:] and labels.shape != shape[:-1]
    axis = 1 if outputs.ndim > 2 and second else -1
    logits = outputs.movedim(axis, -1).flatten(0, -2).double()
    flat = labels.flatten().long()

    def loss(scale: float) -> float:
        return float(nn.functional.cross_entropy(logits * scale, flat))

    target = -math.log(accuracy)
    if not loss(1.0) < target:
        return 1.0
    low, high = _LEAST, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) >= target else (low, middle)
    for tensor in (layer.weight, layer.bias):
        if isinstance(tensor, Tensor):
            tensor.data.mul_(low)
    return low


def _seen(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> tuple[Any, Tensor, Tensor]:
    """The layer that makes the outputs (None if none does), all outputs and their labels."""
    calls: dict[nn.Module, list[Tensor]] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        calls.setdefault(module, []).append(output)

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd))]
    handles = [module.register_forward_hook(hook) for module in layers]
    modes = [(module, module.training) for module in model.modules()]
    device, outputs, labels, makers = device_of(model), [], [], set(layers)
    try:
        model.eval()
        for inputs, wanted in batches:
            calls.clear()
            output = main_output(call(model, map_tensors(lambda x: x.to(device), inputs)))
            if not isinstance(wanted, Tensor):
                return None, torch.zeros(0), torch.zeros(0)
            makers &= {m for m, made in calls.items() if len(made) == 1 and made[0] is output}
            outputs.append(output.float().cpu())
            labels.append(wanted.cpu())
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    maker = next(iter(makers), None)
    if not outputs or maker is None:
        return None, torch.zeros(0), torch.zeros(0)
    owners = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is maker.weight
    ]
    if len(owners) != 1 or any(x.shape[1:] != outputs[0].shape[1:] for x in outputs):
        return None, torch.zeros(0), torch.zeros(0)
    return maker, torch.cat(outputs), torch.cat(labels)
