"""Trains a cut network, by gradient descent, towards the outputs that it had before.

:mod:`.layer_by_layer` solves the layers that read units, each for itself. What the kept units
compute stays as it was. Where much goes, few units should compute something else than the same few
did among many. So here all layers move together, for a few passes over the samples, towards the
outputs of the network before the cut (Hinton, Vinyals and Dean 2015, section 2.1: squared
differences of logits). Labels are not looked at.

Promises: nothing but trained parameters changes, and their ``grad`` does not; what does not end
nearer than it began, on the samples that it is judged by, is put back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from elesh.trainer.network.calling import Inputs, batch_size, call, main_output, map_tensors
from elesh.trainer.network.state import preserve_state

_PASSES, _BATCH, _STEPS, _FEW_STEPS = 2, 32, 100, 26
"""Batches are larger where a pass would have more steps; of a run, which goes on, than few."""
_JUDGED = 256
"""Samples, spread over all, by which it is judged whether a pass came nearer."""
_CROSSED, _TAKEN = 7, 0.2
"""Of a table, how many rows are made of each, and the share of numbers that is another row's."""
_STEP = 0.04
"""Of the root mean square of a tensor: how far its elements go in a step of the first pass."""
_FINER, _MUCH_FINER = 2, 4
"""By how much steps shrink after a pass that came nearer, and after one that did not."""
_NEAR = 1e-3
"""Share of the outputs' variance: what is missing less is not worth the passes."""
_MEAN, _SQUARE, _TINY = 0.9, 0.99, 1e-12
"""Of Adam (Kingma and Ba 2015); squares are forgotten fast, as there are few steps."""


@dataclass(frozen=True)
class Matched:
    """How much of the outputs' variance is missing, of 1, on the samples that it was judged by."""

    before: float
    after: float


@dataclass(frozen=True)
class Wanted:
    """What a network puts out, for it to come near to that after a cut."""

    inputs: Inputs
    outputs: Tensor
    """[S, ...] the main output."""


def wanted_of_a_table(model: nn.Module, inputs: Inputs) -> Wanted:
    """Its outputs in evaluation mode for some rows, and for more of which every number may be
    that of another row. Too few rows say what a network computes among them, and it can be asked
    about any."""
    size, draw = batch_size(inputs), torch.Generator().manual_seed(0)

    def crossed(x: Tensor) -> Tensor:
        if not (x.ndim and len(x) == size):
            return x
        parts = [x]
        for _ in range(_CROSSED):
            others = x[torch.randperm(size, generator=draw).to(x.device)]
            taken = torch.rand(x.shape, generator=draw).to(x.device) < _TAKEN
            parts.append(torch.where(taken, others, x) if x.is_floating_point() else x)
        return torch.cat(parts)

    rows: Inputs = map_tensors(crossed, inputs)
    with preserve_state(model, 0), torch.no_grad():
        return Wanted(rows, main_output(call(model, rows)))


def matched_parameters(
    model: nn.Module, wanted: Wanted, *, skip: Collection[str] = ()
) -> dict[str, Tensor]:
    """What :func:`match_outputs` would give the parameters in few steps, by path; nothing is
    changed."""
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    try:
        given = wanted.inputs, wanted.outputs
        matched = match_outputs(model, *given, skip=skip, steps=_FEW_STEPS)
        if matched is None or not matched.after < matched.before:
            return {}
        now = {path: p.detach().clone() for path, p in model.named_parameters()}
        return {path: p for path, p in now.items() if not torch.equal(p, before[path])}
    finally:
        for path, p in model.named_parameters():
            p.data.copy_(before[path])


def match_outputs(
    model: nn.Module,
    inputs: Inputs,
    wanted: Tensor,
    *,
    skip: Collection[str] = (),
    steps: int = _STEPS,
) -> Matched | None:
    """Move all trained parameters so that the network's main output comes nearer to what is wanted.

    Args:
        inputs: samples of training data, on the network's device.
        wanted: [S, ...] the main output of these samples before a cut.
        skip: paths of layers that keep their parameters.
        steps: that a pass has at most, or one more.

    Returns:
        How near it was and is; None where nothing was tried: the outputs have another shape than
        before or do not vary, or no parameter of 32 bits is trained.
    """
    size = batch_size(inputs)
    trained = [
        p
        for path, p in model.named_parameters()
        if p.requires_grad and p.dtype in (torch.float32, torch.float64) and p.numel()
        if path.rpartition(".")[0] not in skip
    ]
    variance = float((wanted.float() - wanted.float().mean(0)).square().mean())
    if not trained or len(wanted) != size or not 0 < variance < math.inf:
        return None
    batch = max(_BATCH, size // steps)
    with preserve_state(model, 0):
        first = _missing(model, inputs, wanted, variance)
        if first is None or not first > _NEAR:
            return None if first is None else Matched(first, first)
        nearest, step = first, _STEP * math.sqrt(min(first, 1.0))
        descent, best = _Descent(trained), [p.detach().clone() for p in trained]
        for number in range(_PASSES):
            order = torch.randperm(size, generator=torch.Generator().manual_seed(number))
            for rows in torch.split(order.to(wanted.device), batch):
                output = main_output(call(model, _rows(inputs, rows)))
                error = mse_loss(output.float(), wanted[rows].float()) / variance
                if not error.requires_grad:
                    return Matched(first, first)  # No trained parameter makes this output.
                descent.step(torch.autograd.grad(error, trained, allow_unused=True), step)
            missing = _missing(model, inputs, wanted, variance)
            if missing is not None and missing < nearest:
                nearest, step = missing, step / _FINER
                best = [p.detach().clone() for p in trained]
            else:
                for parameter, value in zip(trained, best, strict=True):
                    parameter.data.copy_(value)
                step, descent = step / _MUCH_FINER, _Descent(trained)
    return Matched(first, nearest)


class _Descent:
    """Steps of Adam, each tensor's in its own size."""

    def __init__(self, trained: Sequence[Tensor]) -> None:
        self.trained = trained
        self.sizes = [float(p.detach().float().square().mean().sqrt()) for p in trained]
        self.means = [torch.zeros_like(p) for p in trained]
        self.squares = [torch.zeros_like(p) for p in trained]
        self.number = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], step: float) -> None:
        """Go so far, as a share of a tensor's root mean square."""
        self.number += 1
        states = zip(self.trained, gradients, self.means, self.squares, self.sizes, strict=True)
        for parameter, gradient, mean, square, size in states:
            if gradient is None:
                continue
            mean.lerp_(gradient, 1 - _MEAN)
            square.lerp_(gradient.square(), 1 - _SQUARE)
            first = mean / (1 - _MEAN**self.number)
            second = (square / (1 - _SQUARE**self.number)).sqrt()
            parameter.sub_(step * size * first / (second + _TINY))


@torch.no_grad()
def _missing(model: nn.Module, inputs: Inputs, wanted: Tensor, variance: float) -> float | None:
    """Share of the outputs' variance; None where they have another shape."""
    every = -(-len(wanted) // _JUDGED)
    rows = torch.arange(0, len(wanted), every, device=wanted.device)
    output = main_output(call(model, _rows(inputs, rows)))
    if output.shape != wanted[rows].shape:
        return None
    return float(mse_loss(output.float(), wanted[rows].float())) / variance


def _rows(inputs: Inputs, rows: Tensor) -> Inputs:
    size = batch_size(inputs)

    def chosen(x: Tensor) -> Tensor:
        return x[rows] if x.ndim and len(x) == size else x

    found: Inputs = map_tensors(chosen, inputs)
    return found
