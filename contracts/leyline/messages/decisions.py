"""Elesh's answers: targets to remove, measurements on held-out data, gates; and the analysis of one
level, before levels are joined."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from leyline.base import (
    Count,
    Epoch,
    Finite,
    Fraction,
    Identifier,
    Label,
    Message,
    ModelHash,
    Name,
    NonNegative,
    Text,
    WireEnum,
    is_none,
)
from leyline.errors import IdentityMismatch, InvalidField
from leyline.identity import DecisionKey, IdempotencyKey, Level

from .parameters import Scorer


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
    the statistics. Their costs are then marginal increases of the loss in nats."""


class Phase(WireEnum):
    """Where a run stands in the progressive safety schedule."""

    PREPARATION = "preparation"
    CONSERVATIVE = "conservative"
    MODERATE = "moderate"
    AGGRESSIVE = "aggressive"
    VALIDATION = "validation"


class Outcome(WireEnum):
    """The verdict of the safety gates."""

    GO = "go"
    CONDITIONAL_GO = "conditional_go"
    NO_GO = "no_go"


class Redundancy(Message):
    """Two units of one group that say the same: one was kept, the other not."""

    kept: Count
    """In current numbering."""
    removed: Count
    similarity: Finite
    """Cosine similarity, up to 1."""


class HeadRedundancy(Redundancy):
    """Two heads whose attention patterns are alike."""


class SparedUnit(Message):
    """A unit near the cut that was left alone, and why."""

    index: Count
    """In current numbering."""
    cost: Finite
    """What it would cost next, on the scale of the target's importance."""
    reason: Literal[
        "minimum",
        "noise",
        "coupling",
        "quota",
        "budget",
        "rounding",
        "ignored",
        "redundancy_cost",
        "representative",
        "verification",
        "rolled_back",
        "limit",
    ]
    """``limit``: with it the set would not pass a gate of the predicted effect;
    ``representative``: a redundant unit went in its favour; ``verification``: measured on held-out
    data, the cut is safe only without it; ``rolled_back``: of a set that the trainer took
    back before, for the same evidence."""


class SparedGroup(Message):
    """A group that loses nothing although some of its units were near the cut."""

    layer_name: Name
    spared: tuple[SparedUnit, ...] = Field(min_length=1)


def _require_cut(unit: str, indices: tuple[int, ...], before: int, after: int) -> None:
    """Units to remove are listed once, in order, out of those that are there."""
    if any(a >= b for a, b in pairwise(indices)) or indices[-1] >= before:
        raise InvalidField(f"{unit}_indices", f"rising numbers below {before}", indices)
    if before - len(indices) != after:
        raise InvalidField(f"{unit}s_after", str(before - len(indices)), after)


class ChannelPruningTarget(Message):
    """Channels of one group to remove, in current and in original numbering."""

    layer_name: Name
    """Name of the group in the architecture."""
    channel_indices: tuple[Count, ...] = Field(min_length=1)
    """Channels to remove, rising, in current numbering."""
    original_indices: tuple[Count, ...]
    """The same in original numbering."""
    importance: tuple[Finite, ...]
    """The score that each was ranked by, in the order of ``channel_indices``; the marginal cost of
    a joint order is negative where a removal makes up for part of the earlier ones."""
    errors: tuple[NonNegative, ...] = Field(default=(), exclude_if=operator.not_)
    """Standard error of each importance, from the two halves of the samples; left out where
    units were not ranked by output projections."""
    predicted_loss_rise: Finite | None = Field(default=None, exclude_if=is_none)
    """Of removing these channels alone, in nats a sample, where gate statistics tell."""
    predicted_loss_rise_error: NonNegative | None = Field(default=None, exclude_if=is_none)
    """Its standard error over the samples, where known."""
    redundancy_pairs: tuple[Redundancy, ...] = ()
    redundancy_threshold: Finite = 0.95
    """Cosine similarity above which two channels are redundant."""
    channels_before: Count
    channels_after: Count
    spared: tuple[SparedUnit, ...] = ()
    """Units near the cut that were left alone."""

    @property
    def indices(self) -> tuple[int, ...]:
        """The units to remove, in current numbering."""
        return self.channel_indices

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        units = self.channel_indices
        _require_cut("channel", units, self.channels_before, self.channels_after)
        if not len(units) == len(self.original_indices) == len(self.importance):
            raise InvalidField(
                "original_indices, importance",
                f"{len(units)} entries each",
                (len(self.original_indices), len(self.importance)),
            )
        return self


class AttentionHeadTarget(Message):
    """Heads to remove from one attention layer (section 4.3)."""

    layer_name: Name
    head_indices: tuple[Count, ...] = Field(min_length=1)
    """Heads to remove, rising, in current numbering."""
    original_indices: tuple[Count, ...] = ()
    """The same in original numbering."""
    redundancy_pairs: tuple[HeadRedundancy, ...] = ()
    redundancy_threshold: Finite = 0.95
    """Cosine similarity above which two heads are redundant."""
    head_importance: tuple[Finite, ...] = ()
    """Score of every head before the cut: the predicted increase of the loss if it alone went, in
    nats, or the combined score where heads were ranked by that."""
    costs: tuple[Finite, ...] = Field(default=(), exclude_if=operator.not_)
    """What each head that goes was ranked by, in the order of ``head_indices``."""
    errors: tuple[NonNegative, ...] = Field(default=(), exclude_if=operator.not_)
    """Standard error of each cost; left out where heads were not ranked by output projections."""
    predicted_loss_rise: Finite | None = Field(default=None, exclude_if=is_none)
    """Of removing these heads alone, in nats a sample, where gate statistics tell."""
    predicted_loss_rise_error: NonNegative | None = Field(default=None, exclude_if=is_none)
    """Its standard error over the samples, where known."""
    attention_entropy: tuple[NonNegative, ...] = ()
    """Entropy of the attention pattern of every head before the cut, in nats."""
    heads_before: Count
    heads_after: Count
    spared: tuple[SparedUnit, ...] = ()
    """Heads near the cut that were left alone."""

    @property
    def indices(self) -> tuple[int, ...]:
        """The units to remove, in current numbering."""
        return self.head_indices

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        _require_cut("head", self.head_indices, self.heads_before, self.heads_after)
        if self.original_indices and len(self.original_indices) != len(self.head_indices):
            expected = f"{len(self.head_indices)} entries or none"
            raise InvalidField("original_indices", expected, len(self.original_indices))
        return self


class LayerPruningTarget(Message):
    """A layer to replace by its identity path."""

    layer_name: Name
    importance: NonNegative
    """Taylor importance of the layer."""
    gradient_flow: NonNegative
    """Strength of the gradient flow through the layer."""
    similarity: Finite
    """Cosine similarity of the layer's input and output."""
    skip_potential: Fraction
    """How well an identity or projection can stand in for it."""
    skip_strategy: Literal["identity", "residual", "linear_projection", "conv_projection"]
    architecture_impact: Fraction
    """How much the network depends on it; lower is safer."""
    predicted_loss_rise: Finite | None = Field(default=None, exclude_if=is_none)
    """Of removing this layer alone, in nats a sample."""
    predicted_loss_rise_error: NonNegative | None = Field(default=None, exclude_if=is_none)
    """Its standard error over the samples, where known."""


class PruningStatistics(Message):
    """What the decision does to the size of the network, and what it is predicted to cost."""

    scorer: Scorer
    """What ranked the units; ``margins``: in rounds, on the masked network."""
    parameters_before: Count
    parameters_after: Count
    macs_before: Count
    macs_after: Count
    channels_before: Count
    channels_after: Count
    channels_original: Count
    """Units of prunable groups before the first cut; in decisions of the layer level, all three
    count removable layers. In a joint decision units, quota and shares are those of its first
    level; sizes and predictions are of the whole cut."""
    quota: Count
    """Units that the schedule allowed to remove at this checkpoint."""
    shortfall: Text = Field(default="", exclude_if=operator.not_)
    """What was asked for or allowed and is not removed: how much, and why."""
    phase_limit: Fraction
    """Share of the original units that the phase allows to have removed."""
    cumulative_ratio: Fraction
    """Share of the original units removed after this decision."""
    predicted_shift: NonNegative | None = None
    """Mean square of the predicted movement of the outputs, in squared output units, as a share of
    their variance along the same directions where known; only for output projections."""
    predicted_shift_error: NonNegative | None = None
    """Its standard error from the two halves of the samples."""
    predicted_loss_rise: Finite | None = None
    """In nats a sample: what the units are predicted to do together where margins are known, else
    the sum of the single removals, which is far too low for sets. Meant for explaining."""
    samples: Count = 0
    """Calibration samples behind the scores."""


class GateResult(Message):
    """One safety gate: what it measured against which limit."""

    name: Name
    passed: bool
    measured: Finite | None = None
    limit: Finite | None = None
    detail: Text = ""


class Fallback(Message):
    """A fallback of the failure table that was taken instead of the full analysis."""

    rung: Name
    """Which row of the failure table."""
    reason: Text


class SafetyValidation(Message):
    """All gates, passed or not, and the verdict."""

    outcome: Outcome
    phase: Phase
    gates: tuple[GateResult, ...]
    confidence: Fraction = 1.0
    """0 to 1; reduced by every fallback."""
    measured: bool = False
    """Whether the cut was measured on held-out data or only predicted."""
    verification: Verification | None = Field(default=None, exclude_if=is_none)
    """What was measured; left out where the cut was only predicted."""


class LevelPart(Message):
    """What one level gave to a joint decision."""

    level: Level
    verdict: Literal["taken", "rejected", "nothing", "missing"]
    """``taken``: its targets are in the decision; ``nothing``: it had none; ``missing``: it was not
    analysed (it failed, or missed its deadline)."""
    reason: Text = ""
    """Why it was not taken, or what the other levels took from it."""
    statistics: PruningStatistics | None = None
    """Of this level by itself; None where it is missing."""


class AnalysedPart(Message):
    """One part of a checkpoint that was analysed by itself, and how: a replay does the same."""

    level: Level
    groups: tuple[Name, ...] = ()
    """The groups that it looked at; empty for all of the level."""
    fallbacks: tuple[Fallback, ...] = ()
    """Fallbacks that failures of the compute child led to; those that an analysis takes by itself
    follow from its data."""


class RolledBackCut(Message):
    """A cut that the trainer took back, with the evidence that had spoken for it."""

    idempotency_key: DecisionKey
    """Of the decision that proposed it."""
    epoch: Epoch
    """When it was taken back."""
    units: tuple[tuple[Name, tuple[Count, ...]], ...]
    """Groups with the units that went, in original numbering; a layer has no units."""
    scores: tuple[Finite, ...] = ()
    """The importance of each of them at the time, in that order."""
    scorers: tuple[tuple[Level, Scorer], ...] = Field(default=(), exclude_if=operator.not_)
    """What ranked the units of each level: only scores of the same one are compared. Empty: not
    known."""
    shift: NonNegative | None = None
    """The predicted shift at the time, where known."""
    shift_error: NonNegative | None = None
    detail: Text = ""
    """What the trainer said."""


class WouldBeCut(Message):
    """A cut that is not proposed: measured in the preparation phase, beside what was predicted."""

    units: Count
    """Channels that were masked."""
    predicted: Finite
    """Predicted loss increase in nats a sample."""
    measured: Finite
    """Measured on the held-out samples, in nats a sample."""


class LossFactor(Message):
    """What a run's predicted loss increase is multiplied by, where nothing can be measured."""

    version: int = Field(default=1, ge=1)
    """Of the rule that makes it from measurements."""
    factor: Annotated[Finite, Field(ge=1)]
    measurements: Count
    """Calibration probes of the run's preparation phase that it was calibrated from."""


class Reconstructed(Message):
    """Whether the cut includes refitting what reads the kept units, and what that brings."""

    applied: bool
    """False: the trainer is to cut without refitting, as ``reason`` says."""
    reason: Text = Field(default="", exclude_if=operator.not_)
    """Why not; empty where it is."""
    skip: tuple[Name, ...] = Field(default=(), exclude_if=operator.not_)
    """Consumers that keep their weights."""
    batch_statistics: bool = Field(default=False, exclude_if=operator.not_)
    """Whether the running statistics of batch normalisations move along with refitting."""
    loss: Finite | None = Field(default=None, exclude_if=is_none)
    """Mean loss on the held-out samples with the cut and refitted weights, where measured."""
    loss_without: Finite | None = Field(default=None, exclude_if=is_none)
    """The same with the weights as they were."""


class StructuralPruningDecision(Message):
    """The one decision of a key. The same input gives the same bytes: no clock is in it."""

    contract_of: ClassVar[str] = "Elesh to Emrakul"

    idempotency_key: DecisionKey
    """``<epoch>:<model_hash>:<decision_id>:<level>``."""
    run_id: Identifier
    epoch: Epoch
    model_hash: ModelHash
    channels: tuple[ChannelPruningTarget, ...] = ()
    attention_heads: tuple[AttentionHeadTarget, ...] = ()
    layers: tuple[LayerPruningTarget, ...] = ()
    statistics: PruningStatistics
    safety: SafetyValidation
    approved_for_application: bool
    """Whether the trainer may apply it."""
    rejection_reason: Text = ""
    """Empty if and only if approved."""
    fallbacks: tuple[Fallback, ...] = ()
    """Fallbacks of the failure table that were taken."""
    ignored: tuple[tuple[Name, Text], ...] = ()
    """Groups that cannot be pruned, each with the reason."""
    spared: tuple[SparedGroup, ...] = Field(default=(), exclude_if=operator.not_)
    """Groups that lose nothing although some of their units were near the cut, with reasons."""
    levels: tuple[LevelPart, ...] = Field(default=(), exclude_if=operator.not_)
    """In joint decisions: every level that was asked for, and what became of it."""
    parts: tuple[AnalysedPart, ...] = Field(default=(), exclude_if=operator.not_)
    """What it was joined from, where a level was split or fallbacks were taken on the way;
    otherwise
    left out: every level was analysed as a whole."""
    reconstruction: Reconstructed | None = Field(default=None, exclude_if=is_none)
    """How the kept weights are refitted; left out where the checkpoint did not ask for that."""
    stands_in: DecisionKey | None = Field(default=None, exclude_if=is_none)
    """The earlier decision whose analysis stands in, where this checkpoint's data was corrupt."""
    rolled_back: tuple[RolledBackCut, ...] = Field(default=(), exclude_if=operator.not_)
    """Cuts of this run and these levels that were taken back before; what this decision proposes
    was compared with them."""
    would_be: tuple[WouldBeCut, ...] = Field(default=(), exclude_if=operator.not_)
    """In the preparation phase, where the checkpoint carries its network: cuts that were measured
    to calibrate predictions."""
    loss_factor: LossFactor | None = Field(default=None, exclude_if=is_none)
    """The run's own factor, where it was calibrated; None: the setting's default."""
    settings_hash: Label = ""
    """Which settings decided: the first 16 hex digits of SHA-256 over them."""
    elesh_version: Label = ""

    @property
    def key(self) -> IdempotencyKey:
        """The parsed idempotency key."""
        return IdempotencyKey.parse(self.idempotency_key)

    @property
    def units(self) -> dict[str, tuple[int, ...]]:
        """Units to remove by group, in current numbering: what a Surgeon takes."""
        targets: list[ChannelPruningTarget | AttentionHeadTarget]
        targets = [*self.channels, *self.attention_heads]
        return {target.layer_name: target.indices for target in targets}

    @property
    def taken(self) -> tuple[Level, ...]:
        """The levels whose targets are in it."""
        if not self.levels:
            return (self.key.level,)
        return tuple(part.level for part in self.levels if part.verdict == "taken")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        key = self.key
        if (key.epoch, key.model_hash) != (self.epoch, self.model_hash):
            raise IdentityMismatch(
                "idempotency_key", f"{self.epoch}:{self.model_hash}:...", str(key)
            )
        if self.approved_for_application == bool(self.rejection_reason):
            raise InvalidField(
                "rejection_reason", "a reason if and only if not approved", self.rejection_reason
            )
        if self.approved_for_application and self.safety.outcome is Outcome.NO_GO:
            raise InvalidField("approved_for_application", "false after a no-go", True)
        return self


class RankedUnit(Message):
    """One unit of a cut at its place in the order of removal."""

    level: Level
    layer_name: Name
    """The group that loses the unit, or the layer that goes whole."""
    index: Count = 0
    """In current numbering; 0 for a layer."""
    cost: Finite
    """What it cost when it was chosen, on the scale of its target's importance."""


class PredictedDamage(Message):
    """What a level's cut is predicted to do to the outputs, judged on samples that did not choose
    it, in squared output units."""

    damage: NonNegative
    error: NonNegative
    """Standard error of ``damage``."""
    energy: NonNegative
    """The outputs' own mean square along the same directions."""


class LevelAnalysis(Message):
    """One level of one checkpoint, analysed; :func:`elesh.analysis.decision.join` decides by it."""

    contract_of: ClassVar[str] = "Elesh internal"

    decision: StructuralPruningDecision
    """The level by itself, with key ``<epoch>:<model_hash>:<decision_id>:<level>`` and every gate
    but the breaker's, which is looked at when the levels are joined."""
    order: tuple[RankedUnit, ...] = ()
    """The units of the cut as they were chosen: redundant ones first, then the cheapest. So a
    prefix of the cut is a cut, too."""

    shard: tuple[Name, ...] = Field(default=(), exclude_if=operator.not_)
    """The groups that were looked at, where those were not all of the level. Its order goes as
    far as the whole level's quota: how much of it is cut is known when the shards are joined."""
    halves: tuple[tuple[RankedUnit, ...], ...] = Field(default=(), exclude_if=operator.not_)
    """Of a shard: the orders that the even and the odd samples alone would choose; what one half
    chooses is judged on the other when the shards are joined."""
    predicted: PredictedDamage | None = None
    """Where there are output projections of all candidates."""

    @property
    def level(self) -> Level:
        """The level that was analysed."""
        return self.decision.key.level

    @model_validator(mode="after")
    def _orders_the_cut(self) -> Self:
        ordered = sorted((unit.layer_name, unit.index) for unit in self.order)
        targets = [(name, index) for name, lost in self.decision.units.items() for index in lost]
        targets += [(target.layer_name, 0) for target in self.decision.layers]
        if ordered != sorted(targets):
            raise InvalidField("order", "the units of the decision's targets", ordered[:5])
        return self
