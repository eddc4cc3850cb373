"""The design document's own sections: structured pruning and the accuracy targets."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from leyline.messages.decisions import Phase
from leyline.messages.parameters import WantedScorer

from ._base import Section, require_sum_one


class ChannelAnalysis(Section):
    """How channels are scored and selected."""

    taylor_weight: float = Field(default=0.5, ge=0, le=1)
    """Of Taylor importance in the mix (scorer ``multi_metric``) in the conservative and moderate
    phases; earlier and later phases have the document's own mixes. The three sum to 1."""
    magnitude_weight: float = Field(default=0.3, ge=0, le=1)
    """Of the weights' magnitude in the same mix."""
    frequency_weight: float = Field(default=0.2, ge=0, le=1)
    """Of the activation frequency in the same mix."""
    redundancy_threshold: float = Field(default=0.95, gt=0, le=1)
    """Channels whose activations have a higher cosine similarity are redundant: one of them is
    considered first."""
    min_channels_per_layer: int = Field(default=16, ge=1)
    """So many channels every group keeps."""
    scorer: WantedScorer = "auto"
    """What channels and heads are ranked by; ``auto``: the best that a checkpoint's statistics
    allow. A request that names one goes over it."""
    redistribute: bool = False
    """Cuts are followed by re-solving the consumers: ``auto`` ranks channels and heads for that."""
    schedule: Literal["polynomial", "linear", "exponential"] = "polynomial"
    """How the share that may be removed rises within a phase, for channels and heads."""
    safety_margin: float = Field(default=0.1, ge=0, lt=1)
    """Share of a phase's limit that is left unused."""
    round_to: int = Field(default=1, ge=1)
    """Groups keep a multiple of so many channels, for devices that compute in such steps."""
    max_predicted_shift: float = Field(default=0.2, gt=0)
    """Highest predicted mean squared movement of the outputs, as a share of their own mean
    square, that goes on to be measured, or is approved where nothing can be. On small networks
    .2 stopped three of four cuts that lose over two points of accuracy, .1 nine of ten, and one in
    seven that are harmless: where cuts are not measured, take .1 (decision 0066)."""

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Self:
        return require_sum_one(self, "taylor_weight", "magnitude_weight", "frequency_weight")


class AttentionAnalysis(Section):
    """How attention heads are scored and selected."""

    entropy_weight: float = Field(default=0.3, ge=0, le=1)
    """Of a head's focus (low entropy) in the mix of heads (scorer ``multi_metric``) in the
    conservative and moderate phases. The three sum to 1."""
    diversity_weight: float = Field(default=0.3, ge=0, le=1)
    """Of the divergence from the other heads in the same mix."""
    gradient_weight: float = Field(default=0.4, ge=0, le=1)
    """Of the gradient sensitivity in the same mix."""
    similarity_threshold: float = Field(default=0.95, gt=0, le=1)
    """Heads whose attention patterns have a higher cosine similarity are redundant."""
    min_heads_per_layer: int = Field(default=2, ge=1)
    """So many heads every attention keeps."""
    safety_margin: float = Field(default=0.15, ge=0, lt=1)
    """Share of a phase's limit that is left unused."""

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Self:
        return require_sum_one(self, "entropy_weight", "diversity_weight", "gradient_weight")


class LayerAnalysis(Section):
    """When a whole layer may go."""

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
    """Of the preparation phase: telemetry only, nothing is removed."""
    conservative_epochs: int = Field(default=30, ge=0)
    """Of the phase after it: channels only."""
    moderate_epochs: int = Field(default=30, ge=0)
    """Of the phase after that: attention heads as well."""
    aggressive_epochs: int = Field(default=30, ge=0)
    """Of the last phase that prunes: whole layers as well. After it, monitoring only."""
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
    def boundaries(self) -> tuple[tuple[Phase, int], ...]:
        """Each phase that ends, with its last epoch (epochs count from 1)."""
        lengths = (
            (Phase.PREPARATION, self.validation_epochs),
            (Phase.CONSERVATIVE, self.conservative_epochs),
            (Phase.MODERATE, self.moderate_epochs),
            (Phase.AGGRESSIVE, self.aggressive_epochs),
        )
        last, ends = 0, []
        for phase, length in lengths:
            last += length
            ends.append((phase, last))
        return tuple(ends)

    @property
    def total_epochs(self) -> int:
        """Epochs until the last pruning phase has ended."""
        return self.boundaries[-1][1]


class RollbackTriggers(Section):
    """Accuracy drops at which the trainer rolls a decision back."""

    channel_accuracy_drop: float = Field(default=0.02, ge=0, le=1)
    """Of a decision that removes channels; of several levels the strictest counts."""
    head_accuracy_drop: float = Field(default=0.03, ge=0, le=1)
    """Of a decision that removes attention heads."""
    layer_accuracy_drop: float = Field(default=0.05, ge=0, le=1)
    """Of a decision that removes layers."""


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
    """Of the order of single channels against the loss with each one masked."""

    metric: Literal["kendall_tau", "spearman", "top_20_precision"] = "kendall_tau"
    """What is measured."""
    target: float = Field(default=0.90, ge=-1, le=1)
    """The figure to reach."""


class RedundancyTarget(AccuracyTarget):
    """Of the pairs called redundant, the share of which one can stand in for the other."""

    metric: Literal["cosine_similarity_precision"] = "cosine_similarity_precision"
    """What is measured."""
    target: float = Field(default=0.95, ge=0, le=1)
    """The figure to reach."""


class FlowTarget(AccuracyTarget):
    """Of the gradient flow, the share that is left with the first layers skipped."""

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
