"""The predicted rise of the loss when units or layers go, from gate gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from leyline import CheckpointBundle, LayerPruningTarget, LayerStatistics

from .plans import Target
from .sets import set_removal

__all__ = ["LossIncrease", "loss_rise", "with_loss_increases"]


@dataclass(frozen=True)
class LossIncrease:
    """In nats a sample."""

    mean: float
    error: float | None = None
    """Standard error over the samples, where known."""


def loss_rise(
    bundle: CheckpointBundle, units: Mapping[str, Sequence[int]], layers: Sequence[str] = ()
) -> LossIncrease | None:
    """What the units do together (:func:`set_removal`), and each layer on its own besides.

    None where a unit or layer has no gate statistics, or nothing goes.
    """
    known = all(name in bundle.gates for name in units)
    known = known and all(name in bundle.layers for name in layers)
    if not known or not (units or layers):
        return None
    parts = [_of_layer(bundle.layers[name]) for name in sorted(layers)]
    if units:
        parts.append(LossIncrease(*set_removal(bundle.gates, units)))
    errors = [part.error for part in parts if part.error is not None]
    known = len(errors) == len(parts)
    return LossIncrease(sum(part.mean for part in parts), math.hypot(*errors) if known else None)


def _of_layer(data: LayerStatistics) -> LossIncrease:
    """What the trainer predicted, where it did; else to second order, as for units."""
    if data.removal_rise is None or data.removal_error is None:
        return LossIncrease(float(-data.first_order[0] + 0.5 * data.second_order[0]))
    return LossIncrease(float(data.removal_rise[0]), float(data.removal_error[0]))


def with_loss_increases(bundle: CheckpointBundle, targets: Iterable[Target]) -> tuple[Target, ...]:
    """The targets, each with what removing it alone is predicted to do."""
    return tuple(_with_loss_increase(bundle, target) for target in targets)


def _with_loss_increase(bundle: CheckpointBundle, target: Target) -> Target:
    if isinstance(target, LayerPruningTarget):
        rise = loss_rise(bundle, {}, [target.layer_name])
    else:
        rise = loss_rise(bundle, {target.layer_name: target.indices})
    update = {
        "predicted_loss_rise": rise.mean if rise else None,
        "predicted_loss_rise_error": rise.error if rise else None,
    }
    return target.model_copy(update=update)
