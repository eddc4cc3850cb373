"""Budgets other than a share of channels: what the network may cost after the cut."""

from __future__ import annotations

import itertools
import math
from typing import Literal, Self

from pydantic import Field, model_validator

from leyline.base import Count, Fraction, Message, Name, NonNegative, is_none
from leyline.errors import InvalidField

Resource = Literal["parameters", "macs", "memory", "latency"]


class LayerLatency(Message):
    """Seconds of one layer by the sizes of its weight's first two dimensions, as measured."""

    layer: Name
    """Name of the layer in the architecture."""
    outputs: tuple[Count, ...] = Field(min_length=1)
    """Measured sizes of dimension 0, rising."""
    inputs: tuple[Count, ...] = ()
    """Measured sizes of dimension 1, rising; empty where there is no such dimension."""
    seconds: tuple[NonNegative, ...]
    """[outputs, inputs] in row-major order."""

    @model_validator(mode="after")
    def _is_a_grid(self) -> Self:
        for name in ("outputs", "inputs"):
            sizes = getattr(self, name)
            if any(a >= b for a, b in itertools.pairwise(sizes)):
                raise InvalidField(f"latency.{self.layer}.{name}", "rising sizes", sizes)
        expected = math.prod((len(self.outputs), len(self.inputs) or 1))
        if len(self.seconds) != expected:
            raise InvalidField(
                f"latency.{self.layer}.seconds", f"{expected} entries", len(self.seconds)
            )
        return self


class LatencyTable(Message):
    """What a device takes for each layer at several sizes; measured by ``elesh profile``."""

    device: Name
    """The device and its threads, for people."""
    batch: Count
    """Samples a call when it was measured."""
    total_seconds: NonNegative
    """One call of the whole network, measured."""
    layers: tuple[LayerLatency, ...]


class Budget(Message):
    """What may be left of a resource, as a share of what a network takes."""

    resource: Resource
    at_most: Fraction
    """For example 0.7: at most 70% of the multiply-accumulates."""
    of: Literal["present", "original"] = Field(
        default="present", exclude_if=lambda which: which == "present"
    )
    """Of which network: as it is at the checkpoint, or as it was before the first cut. A budget of
    the original is reached over as many decisions as it takes."""
    original: NonNegative | None = Field(default=None, exclude_if=is_none)
    """What the original network takes, in the resource's own unit, where the trainer knows it;
    otherwise reckoned from the original sizes of the groups, without layers that are gone."""
    latency: LatencyTable | None = Field(default=None, exclude_if=is_none)
    """The target's measured table; needed for a latency budget."""

    @model_validator(mode="after")
    def _latency_is_measured(self) -> Self:
        if (self.resource == "latency") != (self.latency is not None):
            raise InvalidField(
                "budget.latency", "a measured table, for a latency budget only", self.resource
            )
        return self
