"""How an analysis is to be made, as a coordinator or a trainer may ask for it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leyline.base import Fraction, Message, Name, NonNegative

from .budget import Budget

Scorer = Literal[
    "output_projection", "reconstruction", "fisher", "multi_metric", "magnitude", "margins"
]
"""What units can be ranked by; ``margins``: in rounds, where the checkpoint carries its network."""
WantedScorer = Literal[
    "auto", "output_projection", "reconstruction", "fisher", "multi_metric", "magnitude"
]
"""What can be asked for; ``auto``: the best that the statistics allow."""


class AnalysisParameters(Message):
    """How to analyse; what is not given comes from the worker's settings."""

    scorer: WantedScorer = "auto"
    """Which score ranks; ``auto``: the best that the statistics allow."""
    target_ratio: Fraction | None = None
    """Share of all original units to have removed after this decision; the schedule's limit
    still holds above it."""
    ignored_layers: tuple[Name, ...] = ()
    """Groups and layers to leave alone, by name."""
    redistribute: bool = Field(default=False, exclude_if=lambda asked: not asked)
    """The trainer will re-solve the consumers of what is cut: ``auto`` then ranks channels
    and heads by what the kept ones cannot make up for (``reconstruction``)."""
    round_to: int = Field(default=1, ge=1, le=1024)
    """Keep a multiple of this many channels in every group."""
    budget: Budget | None = Field(default=None, exclude_if=lambda budget: budget is None)
    """Choose channels and heads so that a resource fits, instead of so many; the schedule's limit
    still holds above it."""


class PerformanceRequirements(Message):
    """What the result must hold to; a decision that cannot is rejected with the reason."""

    max_predicted_loss_rise: NonNegative | None = None
    """In nats a sample."""
    min_parameters_removed: Fraction | None = None
    """Share of the present parameters."""
