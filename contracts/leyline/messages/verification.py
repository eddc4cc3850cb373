"""What a worker measured of a cut on held-out data, before it said go."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from leyline.base import Count, Finite, Fraction, Message, NonNegative, Text
from leyline.errors import InvalidField


class Interval(Message):
    """A range in which a figure is expected."""

    low: Finite
    high: Finite

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise InvalidField("high", f"at least {self.low}", self.high)
        return self


class Verification(Message):
    """The network with and without the cut, on the same held-out samples.

    Rises and drops are positive where the cut does harm. They are of the cut that is decided (the
    kept units); where none was kept, of the whole that was proposed and refused.
    """

    samples: Count
    """Held-out samples."""
    measurements: Count
    """Masked networks that were measured to find it, all in all."""
    proposed: Count
    """Units (channels, heads, layers) that the ranking proposed to remove."""
    kept: Count
    """Units of these that were measured as safe to remove: those that the decision names."""
    stopped: Text = ""
    """Why no more were kept; empty where all were."""
    loss_before: NonNegative
    """Mean loss in nats a sample of the network as it is."""
    predicted_loss_rise: Finite | None = None
    """As predicted from the checkpoint's statistics, in nats a sample, where they tell."""
    loss_rise: Finite
    """Measured, in nats a sample."""
    loss_rise_interval: Interval
    """Paired bootstrap over the samples: of the mean rise, at ``confidence``."""
    accuracy_before: Fraction
    accuracy_drop: Finite
    """Measured, -1 to 1."""
    accuracy_drop_interval: Interval
    """Paired bootstrap over the samples: where the drop on as many other samples of the same kind
    lies, at ``confidence``. Wider than the interval of the mean, as that sample varies, too."""
    confidence: Fraction = 0.95
    """Of both intervals."""
    class_accuracy_drop: Finite
    """The largest drop of accuracy within one class, -1 to 1."""
    worst_class: Count
    """The class that it was in."""
    gradient_flow_change: NonNegative
    """By which share the norm of the gradients of the outputs changed, in the parameters that
    stay."""
    rounds: Count = 1
    """In how many rounds the units were chosen, each on the network masked so far; 1: at once, from
    the statistics. Their costs are then marginal rises of the loss in nats."""
