"""Limits of what is measured before a cut is approved. No part of the design document's block.

What a cut may cost follows one rule: from the table of five steps a cut of channels in the
conservative phase takes the first, and each level (head, layer) and each phase (moderate,
aggressive) that is bolder takes one step more. ``limit_factor`` moves all of them at once.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from leyline import Level, Phase

from ._base import Section, retired


class CutLimits(Section):
    """What a cut may cost."""

    accuracy_drop: float = Field(ge=0, le=1)
    """Of the accuracy on held-out data."""
    loss_rise: float = Field(ge=0, json_schema_extra={"unit": "nats"})
    """Of the loss on held-out data, a sample."""


class PhaseLimits(Section):
    """What a cut of one level may cost in each pruning phase (FACTS, "Selection")."""

    conservative: CutLimits
    """In the conservative phase, and in phases that do not prune."""
    moderate: CutLimits
    """In the moderate phase."""
    aggressive: CutLimits
    """In the aggressive phase."""

    def of(self, phase: Phase) -> CutLimits:
        """The limits of a phase; in phases that do not prune, the strictest."""
        found: CutLimits = getattr(self, phase, self.conservative)
        return found


_STEPS = ((0.02, 0.05), (0.03, 0.08), (0.05, 0.12), (0.08, 0.15), (0.12, 0.20))
"""Accuracy drop, and loss increase in nats, from the strictest step on (FACTS, "Selection")."""
_BY_RULE = "the limits follow one rule; verification.limit_factor moves all of them"


def _limits(first: int) -> PhaseLimits:
    """The limits of the level that begins with this step."""
    steps = [CutLimits(accuracy_drop=drop, loss_rise=rise) for drop, rise in _STEPS[first:]]
    return PhaseLimits(conservative=steps[0], moderate=steps[1], aggressive=steps[2])


class VerificationSettings(Section):
    """How cuts are measured on held-out data, and what is allowed where they cannot be."""

    channel: PhaseLimits = retired(_limits(0), _BY_RULE)
    """What a cut of channels may cost."""
    head: PhaseLimits = retired(_limits(1), _BY_RULE)
    """What a cut of heads may cost."""
    layer: PhaseLimits = retired(_limits(2), _BY_RULE)
    """What a cut of layers may cost."""
    programs: Literal["signed", "authenticated", "any"] = "authenticated"
    """Whose networks are run: those on a bus where every message must be signed; also those on a
    bus that asks for a password, as the embedded one does; or of any client."""
    accuracy_retention: float = Field(default=0.95, ge=0, le=1)
    """Accuracy after the cut as a share of the accuracy before it."""
    class_accuracy_drop: float = Field(default=0.15, ge=0, le=1)
    """Within any one class of at least ten samples, beyond what sampling explains."""
    gradient_flow_change: float = Field(default=0.15, ge=0)
    """Of the norm of the gradients of the outputs, in the parameters that stay: the document's
    target for gradient flow is to keep 85% (decision 0031)."""
    kept_share: float = retired(
        0.5, "a ranking of which less than half is safe says nothing of the rest", ge=0, le=1
    )
    """Of the units that a ranking proposed, so many must be safe; else none of it is believed."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the bounds that are compared with the limits, and of the intervals that are stated."""
    bootstrap_samples: int = retired(2000, "the usual number of draws for 95% bounds", ge=100)
    """Draws behind each of them."""
    rounds: int = Field(default=4, ge=1, le=64)
    """In so many rounds a cut is chosen where the checkpoint carries its network: after each, what
    the rest costs is measured again on the masked network. 1: once, from the statistics."""
    rounds_from: float = retired(
        0.05, "smaller cuts are chosen as well at once (decision 0060)", ge=0, le=1
    )
    """The share of a level's present units that a proposal must exceed to be cut in rounds: small
    cuts are chosen as well at once (decision 0060)."""
    window_share: float = retired(
        0.5,
        "the other half of the window is for the analysis; analysis_timeout is the window",
        gt=0,
        le=1,
    )
    """Share of the checkpoint window that measuring may take; what takes longer is not measured."""
    predicted_loss_factor: float = Field(default=2.0, ge=1)
    """Where nothing could be measured, the predicted loss rise times this must be within the
    limit: predictions from derivatives may be too low by that much."""

    @field_validator("channel", "head", "layer", mode="before")
    @classmethod
    def _over_defaults(cls, limits: Any, info: ValidationInfo) -> Any:
        """What is given of a level's limits, over the level's own defaults."""
        if not isinstance(limits, dict):
            return limits
        whole = cls.model_fields[info.field_name or ""].default.model_dump()
        for phase, given in limits.items():
            both = isinstance(given, dict) and isinstance(whole.get(phase), dict)
            whole[phase] = whole[phase] | given if both else given
        return whole

    calibration_measurements: int = retired(
        6, "the fewest ratios that a factor is taken from (decision 0062)", ge=0
    )
    """So many calibration probes must have been measured in a run's preparation phase before what
    they say of its predictions replaces ``predicted_loss_factor``; 0: nothing is measured."""
    limit_factor: float | None = Field(default=None, gt=0, le=10, exclude_if=lambda x: x is None)
    """All limits on accuracy drop and loss increase times this: under 1 is stricter."""

    def limits(self, levels: frozenset[Level], phase: Phase) -> CutLimits:
        """The strictest limits of the levels that a cut is made of."""
        found = [getattr(self, level).of(phase) for level in sorted(levels)]
        factor = self.limit_factor or 1.0
        return CutLimits(
            accuracy_drop=min(1.0, factor * min((x.accuracy_drop for x in found), default=0.0)),
            loss_rise=factor * min((x.loss_rise for x in found), default=0.0),
        )
