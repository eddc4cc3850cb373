"""What the three backward passes start from: random directions, the loss, sampled labels.

All are sums over samples, so that a gradient at one sample's activation is that sample's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .calling import main_output

Loss = Callable[[Any, Any], Tensor]
"""From what the network returned and the labels: a loss for each sample, or their mean."""
Sampler = Callable[[Any], Any]
"""From what the network returned: labels drawn from its own predictive distribution."""


def class_axis(logits: Tensor, labels: Any) -> int:
    """Where the classes are: the last axis, or axis 1 where the labels' shape says so."""
    if logits.ndim > 2 and isinstance(labels, Tensor):
        shape = logits.shape
        if labels.shape == shape[:1] + shape[2:] and labels.shape != shape[:-1]:
            return 1
    return logits.ndim - 1


def total(loss: Tensor, samples: int) -> Tensor:
    """The sum of a loss over samples, from one loss a sample or from their mean."""
    return loss.sum() if loss.ndim else loss * samples


def cross_entropy(output: Any, labels: Any) -> Tensor:
    """Of logits; summed over samples and, for sequences and images, over their positions."""
    logits = main_output(output).float()
    classes = class_axis(logits, labels)
    return functional.cross_entropy(logits.movedim(classes, 1), labels, reduction="sum").reshape(1)


def sampled_labels(output: Any, labels: Any, generator: torch.Generator) -> Tensor:
    """Labels drawn from the softmax of the logits, shaped like ``labels``."""
    logits = main_output(output).detach().float()
    classes = class_axis(logits, labels)
    odds = logits.movedim(classes, -1).softmax(-1).cpu()
    drawn = torch.multinomial(odds.reshape(-1, odds.shape[-1]), 1, generator=generator)
    return drawn.reshape(odds.shape[:-1]).to(logits.device)


def has_margins(logits: Tensor, labels: Any) -> bool:
    """Whether every sample has one label among at least two classes, so that it has one margin.

    Negative labels are those that the cross-entropy ignores.
    """
    single = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim == 1
    return single and logits.ndim == 2 and logits.shape[1] > 1 and bool((labels >= 0).all())


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """[N]: log of the odds against the label, so that the cross-entropy is ``softplus(margin)``."""
    label = labels[:, None]
    rivals = logits.scatter(1, label, -torch.inf)
    return rivals.logsumexp(1) - logits.gather(1, label)[:, 0]


def rival_directions(
    logits: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two directions [N, K] that together have the covariance of one-hot draws from the softmax
    of the wrong classes, which is the second derivative of the margin.

    By the law of total variance: the first is the strongest rival against the mean of the other
    wrong classes, which is most of it and not random; the second is Gaussian among the others.
    What the outputs move along them, squared and added up, has the whole as its mean.
    """
    odds = logits.detach().double().scatter(1, labels[:, None], -torch.inf).softmax(1).cpu()
    top, strongest = odds.max(1, keepdim=True)
    others = odds.scatter(1, strongest, 0.0)
    others = others / others.sum(1, keepdim=True).clamp_min(torch.finfo(odds.dtype).tiny)
    contrast = (-others).scatter(1, strongest, 1.0) * (top * (1 - top)).clamp_min(0).sqrt()
    drawn = torch.randn(odds.shape, generator=generator) * others.sqrt()
    among = (drawn - others * drawn.sum(1, keepdim=True)) * (1 - top).clamp_min(0).sqrt()
    return contrast.to(logits), among.to(logits)


def directions(values: Tensor, generator: torch.Generator, centred: int | None = None) -> Tensor:
    """One Gaussian direction for each sample in the space of the outputs, ``values``' shape.

    Centred over axis ``centred`` (logits: a constant added to all changes nothing), if given.
    """
    drawn = torch.randn(values.shape, generator=generator)
    if centred is not None and values.shape[centred] > 1:
        drawn -= drawn.mean(centred, keepdim=True)
    return drawn.to(values.device)
