"""Parameters of an analysis, as a coordinator or trainer sets them; and budgets, which limit what
the network may cost after the cut."""

from __future__ import annotations

import itertools
import math
import operator
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


Scorer = Literal[
    "output_projection", "reconstruction", "fisher", "multi_metric", "magnitude", "margins"
]
"""What units can be ranked by; ``margins``: in rounds, where the checkpoint carries its network."""
WantedScorer = Literal[
    "auto", "output_projection", "reconstruction", "fisher", "multi_metric", "magnitude"
]
"""What can be asked for; ``auto``: the best that the statistics allow."""


class Reconstruction(Message):
    """Cuts are followed by refitting what reads the kept units, by least squares."""

    skip: tuple[Name, ...] = Field(default=(), exclude_if=operator.not_)
    """Consumers that keep their weights all the same, by path."""
    batch_statistics: bool = Field(default=False, exclude_if=operator.not_)
    """After that the running statistics of batch normalisations move along, by a pass over
    calibration samples."""


class AnalysisParameters(Message):
    """How to analyse; what is not given comes from the worker's settings."""

    scorer: WantedScorer = "auto"
    """Which score ranks; ``auto``: the best that the statistics allow."""
    target_ratio: Fraction | None = None
    """Share of all original units to have removed after this decision; the schedule's limit
    still holds above it."""
    ignored_layers: tuple[Name, ...] = ()
    """Groups and layers to leave alone, by name."""
    redistribute: bool = Field(default=False, exclude_if=operator.not_)
    """The trainer will re-solve the consumers of what is cut: ``auto`` then ranks channels
    and heads by what the kept ones cannot make up for (``reconstruction``)."""
    reconstruction: Reconstruction | None = Field(default=None, exclude_if=is_none)
    """The trainer refits what reads the kept units: predictions, verification and limits are of
    the network after that. Left out: cuts leave the weights as they are."""
    failing_gate: Literal["refuse", "shorten"] = Field(
        default="refuse", exclude_if=lambda what: what == "refuse"
    )
    """What a gate of the predicted effect does where it fails: refuse the level, or shorten the
    set to the largest that passes."""
    removed_at_most: Fraction | None = Field(default=None, exclude_if=is_none)
    """Share of the original units that the last phase may have removed, in place of the worker's
    setting; the limits of the other phases go along in proportion."""
    phases: tuple[Count, Count, Count, Count] | None = Field(default=None, exclude_if=is_none)
    """Epochs of the preparation, conservative, moderate and aggressive phase, in place of the
    worker's setting: of a run that ends before the schedule does."""
    round_to: int = Field(default=1, ge=1, le=1024)
    """Keep a multiple of this many channels in every group."""
    budget: Budget | None = Field(default=None, exclude_if=is_none)
    """Choose channels and heads so that a resource fits, instead of so many; the schedule's limit
    still holds above it."""
    more_budgets: tuple[Budget, ...] = Field(default=(), exclude_if=operator.not_)
    """Further budgets that are to hold together with ``budget``."""


class PerformanceRequirements(Message):
    """What the result must hold to; a decision that cannot is rejected with the reason."""

    max_predicted_loss_rise: NonNegative | None = None
    """In nats a sample."""
    min_parameters_removed: Fraction | None = None
    """Share of the present parameters."""
