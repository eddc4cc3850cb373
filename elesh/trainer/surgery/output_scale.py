"""The scale of a classifier's outputs, set for training to go on from.

A network trained until it is sure of every training sample has next to no gradient left: two more
epochs follow the few samples it is not sure of and end below where they began, cut or not
(docs/decisions/trainer.md, 0087). A cut that keeps what the network computes keeps that, too.
Outputs that are multiplied by one number give the same answers, and every sample counts again.

Promises: the order of the classes is kept for every input; nothing but the weight and bias of the
layer that makes the outputs changes; outputs are never scaled up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from elesh.trainer.network.calling import call, device_of, main_output, map_tensors

__all__ = ["soften_outputs"]

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
