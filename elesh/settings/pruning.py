"""The design document's own sections (structured pruning and the accuracy targets), and the limits
of what is measured before a cut is approved, which are no part of its block.

What a cut may cost follows one rule: from the table of five steps a cut of channels in the
conservative phase takes the first, and each level (head, layer) and each phase (moderate,
aggressive) that is bolder takes one step more. ``limit_factor`` moves all of them at once.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from leyline.messages.parameters import WantedScorer

from ._base import Section, require_sum_one, retired


class ChannelAnalysis(Section):
    """How channels are scored and selected."""

    taylor_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of Taylor importance in the mix (scorer ``multi_metric``) in the conservative and
    moderate phases; earlier and later phases use the document's mixes. The three weights sum to 1.
    """
    magnitude_weight: float = Field(default=0.3, ge=0, le=1)
    """Weight of the magnitude in that mix."""
    frequency_weight: float = Field(default=0.2, ge=0, le=1)
    """Weight of the activation frequency in that mix."""
    redundancy_threshold: float = Field(default=0.95, gt=0, le=1)
    """Channels whose activations have a higher cosine similarity are redundant; one of them is
    considered for removal first."""
    min_channels_per_layer: int = Field(default=16, ge=1)
    """Minimum number of channels that every group keeps."""
    scorer: WantedScorer = "auto"
    """How channels and heads are ranked; ``auto``: the best way that a checkpoint's statistics
    allow. A request can override it."""
    redistribute: bool = False
    """Consumers are solved again after cuts, so ``auto`` ranks channels and heads for
    reconstruction."""
    schedule: Literal["polynomial", "linear", "exponential"] = "polynomial"
    """How the share that may be removed rises within a phase, for channels and heads."""
    safety_margin: float = Field(default=0.1, ge=0, lt=1)
    """Share of a phase's limit that is left unused."""
    round_to: int = Field(default=1, ge=1)
    """Groups keep a multiple of this many channels, for devices that compute in such steps."""
    max_predicted_shift: float = Field(default=0.2, gt=0)
    """Limit for the predicted mean squared change of the outputs, as a share of their mean square.
    Cuts below it are measured, or approved where nothing can be measured. On small networks .2
    stopped three of four cuts that lose over two points of accuracy, .1 nine of ten, and one in
    seven harmless ones. Set .1 where cuts are not measured (decision 0066)."""

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Self:
        return require_sum_one(self, "taylor_weight", "magnitude_weight", "frequency_weight")


class AttentionAnalysis(Section):
    """How attention heads are scored and selected."""

    entropy_weight: float = Field(default=0.3, ge=0, le=1)
    """Weight of a head's focus (low entropy) in the mix of heads (scorer ``multi_metric``) in the
    conservative and moderate phases. The three weights sum to 1."""
    diversity_weight: float = Field(default=0.3, ge=0, le=1)
    """Weight of the divergence from other heads in that mix."""
    gradient_weight: float = Field(default=0.4, ge=0, le=1)
    """Weight of the gradient sensitivity in that mix."""
    similarity_threshold: float = Field(default=0.95, gt=0, le=1)
    """Heads whose attention patterns have a higher cosine similarity are redundant."""
    min_heads_per_layer: int = Field(default=2, ge=1)
    """Minimum number of heads that every attention keeps."""
    safety_margin: float = Field(default=0.15, ge=0, lt=1)
    """Share of a phase's limit that is left unused."""

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Self:
        return require_sum_one(self, "entropy_weight", "diversity_weight", "gradient_weight")


class LayerAnalysis(Section):
    """Conditions under which a whole layer may be removed."""

    taylor_threshold: float = Field(default=0.001, ge=0, json_schema_extra={"unit": "nats"})
    """A layer goes only if its Taylor importance a sample is lower."""
    similarity_threshold: float = Field(default=0.95, gt=0, le=1)
    """A layer goes only if the cosine of its input and output is higher."""
    skip_potential_threshold: float = Field(default=0.8, ge=0, le=1)
    """A layer goes only if its skip potential is higher."""
    max_layer_removal_ratio: float = Field(default=0.2, ge=0, le=1)
    """Share of the original layers that may be removed in all."""


class SafetySchedule(Section):
    """Lengths of the phases in epochs, and the share of channels that each may have removed."""

    validation_epochs: int = Field(default=30, ge=0)
    """Length of the preparation phase: telemetry only, nothing is removed."""
    conservative_epochs: int = Field(default=30, ge=0)
    """Length of the next phase: channels only."""
    moderate_epochs: int = Field(default=30, ge=0)
    """Length of the next phase: attention heads, too."""
    aggressive_epochs: int = Field(default=30, ge=0)
    """Length of the last pruning phase: whole layers, too. After it, only monitoring."""
    conservative_limit: float = Field(default=0.05, ge=0, le=1)
    """Share of the original units that may be gone at the end of the conservative phase."""
    moderate_limit: float = Field(default=0.10, ge=0, le=1)
    """The same at the end of the moderate phase."""
    aggressive_limit: float = Field(default=0.20, ge=0, le=1)
    """The same at the end of the aggressive phase."""

    @model_validator(mode="after")
    def _limits_rise(self) -> Self:
        if not self.conservative_limit <= self.moderate_limit <= self.aggressive_limit:
            raise ValueError("conservative_limit <= moderate_limit <= aggressive_limit must hold")
        return self

    @property
    def total_epochs(self) -> int:
        """Epochs until the last pruning phase has ended."""
        pruning = self.conservative_epochs + self.moderate_epochs + self.aggressive_epochs
        return self.validation_epochs + pruning


class RollbackTriggers(Section):
    """Accuracy drops at which the trainer rolls a decision back."""

    channel_accuracy_drop: float = Field(default=0.02, ge=0, le=1)
    """Limit for a decision that removes channels; with several levels the strictest counts."""
    head_accuracy_drop: float = Field(default=0.03, ge=0, le=1)
    """Limit for a decision that removes attention heads."""
    layer_accuracy_drop: float = Field(default=0.05, ge=0, le=1)
    """Limit for a decision that removes layers."""


class StructuredPruning(Section):
    """The structured pruning block of the design document."""

    channel_analysis: ChannelAnalysis = ChannelAnalysis()
    attention_analysis: AttentionAnalysis = AttentionAnalysis()
    layer_analysis: LayerAnalysis = LayerAnalysis()
    safety_schedule: SafetySchedule = SafetySchedule()
    rollback_triggers: RollbackTriggers = RollbackTriggers()


class AccuracyTarget(Section):
    """One accuracy target: its metric and the figure to reach."""

    metric: str
    """What is measured."""
    target: float
    """The figure to reach."""


class RankingTarget(AccuracyTarget):
    """The order of single channels against the loss with each one masked."""

    metric: Literal["kendall_tau", "spearman", "top_20_precision"] = "kendall_tau"
    """What is measured."""
    target: float = Field(default=0.90, ge=-1, le=1)
    """The figure to reach."""


class RedundancyTarget(AccuracyTarget):
    """The share of redundant pairs in which one unit can replace the other."""

    metric: Literal["cosine_similarity_precision"] = "cosine_similarity_precision"
    """What is measured."""
    target: float = Field(default=0.95, ge=0, le=1)
    """The figure to reach."""


class FlowTarget(AccuracyTarget):
    """The share of the gradient flow that remains when the first layers are skipped."""

    metric: Literal["gradient_flow_preservation"] = "gradient_flow_preservation"
    """What is measured."""
    target: float = Field(default=0.85, ge=0, le=1)
    """The figure to reach."""


class EstimationTarget(AccuracyTarget):
    """The error of importance read from a sketch, as a share; lower is better."""

    metric: Literal["MAPE_vs_Taylor"] = "MAPE_vs_Taylor"
    """What is measured."""
    target: float = Field(default=0.03, ge=0)
    """The error to stay under."""


class AccuracyTargets(Section):
    """What ``elesh validate`` measures a checkpoint against."""

    channel_importance_ranking: RankingTarget = RankingTarget()
    attention_redundancy_detection: RedundancyTarget = RedundancyTarget()
    layer_skip_potential: FlowTarget = FlowTarget()
    structured_pruning_accuracy: EstimationTarget = EstimationTarget()


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


_STEPS = ((0.02, 0.05), (0.03, 0.08), (0.05, 0.12), (0.08, 0.15), (0.12, 0.20))
"""Accuracy drop, and loss increase in nats, from the strictest step on (FACTS, "Selection")."""
_BY_RULE = "the limits follow one rule; verification.limit_factor moves all of them"


def _limits(first: int) -> PhaseLimits:
    """The limits of the level that begins with this step."""
    steps = [CutLimits(accuracy_drop=drop, loss_rise=rise) for drop, rise in _STEPS[first:]]
    return PhaseLimits(conservative=steps[0], moderate=steps[1], aggressive=steps[2])


class VerificationSettings(Section):
    """How cuts are measured on held-out data, and what is allowed if they cannot be measured."""

    channel: PhaseLimits = retired(_limits(0), _BY_RULE)
    """What a cut of channels may cost."""
    head: PhaseLimits = retired(_limits(1), _BY_RULE)
    """What a cut of heads may cost."""
    layer: PhaseLimits = retired(_limits(2), _BY_RULE)
    """What a cut of layers may cost."""
    programs: Literal["signed", "authenticated", "any"] = "authenticated"
    """Whose networks a worker runs. ``signed``: from a bus where every message must be signed;
    ``authenticated``: also from a bus that asks for a password, as the embedded one does; ``any``:
    from any client."""
    accuracy_retention: float = Field(default=0.95, ge=0, le=1)
    """Minimum accuracy after the cut, as a share of that before."""
    class_accuracy_drop: float = Field(default=0.15, ge=0, le=1)
    """Maximum accuracy drop within one class of at least ten samples, beyond what sampling
    explains."""
    gradient_flow_change: float = Field(default=0.15, ge=0)
    """Maximum relative change of the norm of the outputs' gradients in the remaining parameters;
    the document's target is to keep 85% (decision 0031)."""
    kept_share: float = retired(
        0.5, "a ranking of which less than half is safe says nothing of the rest", ge=0, le=1
    )
    """The share of the proposed units that must be measured as safe; with fewer, nothing is cut."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of the bounds that are compared with limits, and of the stated intervals."""
    bootstrap_samples: int = retired(2000, "the usual number of draws for 95% bounds", ge=100)
    """Draws behind each of them."""
    rounds: int = Field(default=4, ge=1, le=64)
    """Number of rounds in which a cut is chosen if the checkpoint carries its network; after each,
    the remaining units are measured again on the masked network. 1: once, from the statistics."""
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
    """If nothing was measured, the predicted loss increase times this must stay within the limit,
    since predictions from derivatives may be too low."""

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
    """Factor for all limits on accuracy drop and loss increase; below 1 is stricter."""
