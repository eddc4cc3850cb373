"""Start values of the backward passes: random directions, the loss, sampled labels, logit gaps.

All are sums over samples, so that a gradient at one sample's activation is that sample's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from elesh.program.program import IGNORED_LABEL
from elesh.trainer.network.calling import main_output
from leyline import InvalidField

Loss = Callable[[Any, Any], Tensor]
"""From what the network returned and the labels: a loss for each sample, or their mean."""
Sampler = Callable[[Any], Any]
"""From what the network returned: labels drawn from its own predictive distribution."""


def class_axis(logits: Tensor, labels: Any) -> int:
    """Where the classes are: the last axis, or axis 1 where the labels say so: classes by their
    shape, shares of every class by adding up to one there."""
    if logits.ndim > 2 and isinstance(labels, Tensor):
        shape = logits.shape
        if labels.shape == shape[:1] + shape[2:] and labels.shape != shape[:-1]:
            return 1
        if labels.shape == shape and not _are_shares(labels, -1) and _are_shares(labels, 1):
            return 1
    return logits.ndim - 1


def _are_shares(labels: Tensor, axis: int) -> bool:
    """Whether these numbers add up to one along an axis, or to nothing where no class counts."""
    sums = labels.float().sum(axis)
    off = torch.minimum(sums.abs(), (sums - 1).abs())
    return bool((labels >= 0).all()) and bool((off < _ROUNDED).all())


_ROUNDED = 0.02
"""How far shares may be from one: they may come in half precision, one for each of many classes."""


def class_labels(logits: Tensor, labels: Any) -> Tensor:
    """Labels as the cross-entropy of these logits takes them: classes in int64, or a share of every
    class in the logits' shape.

    Raises:
        InvalidField: if they are neither.
    """
    where, shape, hint = "labels", tuple(logits.shape), _NOT_CLASSES
    if logits.ndim < 2:
        raise InvalidField("outputs", "logits with an axis of classes", shape, hint=hint)
    if not isinstance(labels, Tensor):
        raise InvalidField(where, "a tensor of classes", type(labels).__name__, hint=hint)
    axis, found = class_axis(logits, labels), tuple(labels.shape)
    if shape[axis] < 2:
        raise InvalidField("outputs", "logits of at least two classes", shape, hint=hint)
    if labels.is_floating_point() and found == shape:
        if not _are_shares(labels, axis):
            expected = "classes, or shares of them that add up to one"
            raise InvalidField(where, expected, "numbers that do not", hint=hint)
        return labels
    if labels.is_floating_point() or labels.is_complex():
        expected = f"classes as integers, or their shares in the shape of the logits {shape}"
        raise InvalidField(where, expected, f"{labels.dtype} in shape {found}", hint=hint)
    if shape[:axis] + shape[axis + 1 :] != found:
        expected = f"the shape of the logits {shape} without their classes"
        raise InvalidField(where, expected, found, hint=hint)
    whole: Tensor = labels.long()
    classes, counted = shape[axis], whole[whole != IGNORED_LABEL]
    if counted.numel():
        low, high = map(int, counted.aminmax())
        if not 0 <= low <= high < classes:
            expected = f"classes from 0 to {classes - 1}, or {IGNORED_LABEL} where none counts"
            raise InvalidField(where, expected, f"{low} to {high}", hint=_OTHER_IGNORED)
    return whole


_NOT_CLASSES = "without classes, use elesh.prune or a Recorder with a loss of your own"
_OTHER_IGNORED = (
    f"does another number mark ignored labels? labels.masked_fill(..., {IGNORED_LABEL})"
)


def total(loss: Tensor, samples: int) -> Tensor:
    """The sum of a loss over samples, from one loss a sample or from their mean."""
    return loss.sum() if loss.ndim else loss * samples


def cross_entropy(output: Any, labels: Any) -> Tensor:
    """Of logits; summed over samples and, for sequences and images, over their positions."""
    logits = main_output(output).float()
    classes = class_axis(logits, labels)
    if labels.is_floating_point():  # shares of every class
        labels = labels.movedim(classes, 1)
    return functional.cross_entropy(logits.movedim(classes, 1), labels, reduction="sum").reshape(1)


def sampled_labels(output: Any, labels: Any, generator: torch.Generator) -> Tensor:
    """Labels drawn from the softmax of the logits, shaped like ``labels``."""
    logits = main_output(output).detach().float()
    classes = class_axis(logits, labels)
    odds = logits.movedim(classes, -1).softmax(-1).cpu()
    drawn = torch.multinomial(odds.reshape(-1, odds.shape[-1]), 1, generator=generator)
    return drawn.reshape(odds.shape[:-1]).to(logits.device)


def has_logit_gaps(logits: Tensor, labels: Any) -> bool:
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


def rival_direction(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, K]: the movement along it, squared, estimates the second derivative of the margin.

    That is the variance of the movement among the wrong classes, by the odds q of their softmax.
    The direction sets the strongest rival a against the mean of the others, whose share of the
    variance is q_a (1 - q_a) (law of total variance). It is scaled up to the whole, which is exact
    in the mean where movements along all differences of classes are alike. One pass then does for
    all, and unlike a random direction it adds no noise.
    """
    odds = logits.detach().double().scatter(1, labels[:, None], -torch.inf).softmax(1)
    top, rival = odds.max(1, keepdim=True)
    others = odds.scatter(1, rival, 0.0)
    rest = others.sum(1, keepdim=True)
    others = others / rest.clamp_min(torch.finfo(odds.dtype).tiny)
    whole = top * rest + rest - (rest * others).square().sum(1, keepdim=True)  # 1 - sum of q^2
    scale = (whole / (1 + others.square().sum(1, keepdim=True))).clamp_min(0).sqrt()
    return ((-others).scatter(1, rival, 1.0) * scale).to(logits)


def directions(values: Tensor, generator: torch.Generator, centred: int | None = None) -> Tensor:
    """One Gaussian direction for each sample in the space of the outputs, ``values``' shape.

    Centred over axis ``centred`` (logits: a constant added to all changes nothing), if given.
    """
    drawn = torch.randn(values.shape, generator=generator, dtype=torch.float32)
    if centred is not None and values.shape[centred] > 1:
        drawn -= drawn.mean(centred, keepdim=True)
    return drawn.to(values)
