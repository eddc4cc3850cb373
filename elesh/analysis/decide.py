"""``analyze``: a checkpoint in, a decision out. No I/O, no clock: the same input, the same bytes.

Promises: every gate is listed whether it passed or not; a rejected decision names what rejected it
and still carries its analysis as telemetry; nothing raises but :class:`leyline.ContractError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elesh import safety
from elesh.safety import BreakerStatus
from elesh.settings import Settings
from leyline import (
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    GateResult,
    IdempotencyKey,
    InvalidField,
    Level,
    Outcome,
    PrunedArchitecture,
    PruningStatistics,
    SafetyValidation,
    StructuralPruningDecision,
)

from .channels import (
    ChannelPlan,
    Eligible,
    choose_scorer,
    eligible_groups,
    plan_channels,
)
from .choosing import Scorer
from .decide_layers import decide_layers
from .heads import HeadPlan, choose_head_scorer, plan_heads
from .schedule import Allowance, allowance, counted_groups
from .scores import single_removal
from .verdicts import elesh_version, rejection

__all__ = ["analyze"]

_CONFIDENCE: Mapping[Scorer, float] = {
    "output_projection": 0.9,
    "multi_metric": 0.6,
    "magnitude": 0.3,
}
"""An order, not a probability: 1 is kept for cuts measured on held-out data; projections predict
the outputs, the mix only follows them, magnitude hardly does (measured in ARCHITECTURE)."""
_FALLBACK_DISCOUNT = 0.8
"""What each rung of the failure table leaves of the confidence."""


@dataclass(frozen=True)
class _Cut:
    """The figures of one proposed cut, as the gates look at them."""

    units: Mapping[str, Sequence[int]]
    count: int
    structure: GateResult
    after: PrunedArchitecture | None
    """None where the cut does not hold together (the structure gate says why)."""
    loss_rise: float | None
    shift: float | None
    error: float | None


def analyze(
    bundle: CheckpointBundle,
    settings: Settings | None = None,
    *,
    level: Level = Level.CHANNEL,
    threads: int = 1,
    breaker: BreakerStatus | None = None,
    key: IdempotencyKey | None = None,
    scorer: Literal["output_projection", "multi_metric", "magnitude"] | None = None,
    fallbacks: Sequence[Fallback] = (),
) -> StructuralPruningDecision:
    """Decide what can be removed from the network of ``bundle``.

    Args:
        bundle: a checkpoint's architecture and statistics.
        settings: the defaults of the design document if not given.
        level: which level to decide on.
        threads: numerical work runs on so many threads; the decision does not depend on it.
        breaker: the level's circuit breaker; closed if not given.
        key: the key of the decision; the bundle's own for this level if not given.
        scorer: overrides the scorer of request and settings, where a fallback asks for another
            (channels only).
        fallbacks: rungs of the failure table that led here, to be recorded in the decision.

    Raises:
        InvalidField: if the level is not analysed here, or the request names unknown layers.
        IdentityMismatch: if the key speaks of another checkpoint.
    """
    settings = settings or Settings()
    if level is Level.LAYER:
        return decide_layers(
            bundle,
            settings,
            breaker=breaker or BreakerStatus(),
            key=key or bundle.key(level),
            fallbacks=fallbacks,
        )
    if level not in _PLANNERS:
        here = ", ".join((*_PLANNERS, Level.LAYER))
        raise InvalidField("level", f"a level that is analysed here: {here}", level.value)
    choose_used, make_plan = _PLANNERS[level]
    allowed = _allowance(bundle, settings, level)
    used, taken = choose_used(bundle, scorer or _wanted(bundle, settings))
    eligible, plan = make_plan(bundle, settings, used, allowed, threads)
    cut = _cut(bundle, plan)
    gates = _gates(bundle, settings, level, allowed, plan, cut, breaker or BreakerStatus())
    outcome = safety.verdict(gates, measured=False)
    reason = _rejection(gates, cut, allowed, eligible, level)
    all_fallbacks = (*fallbacks, *taken)
    key = key or bundle.key(level)
    return StructuralPruningDecision(
        idempotency_key=str(key),
        run_id=bundle.metadata.run_id,
        epoch=bundle.metadata.epoch,
        model_hash=bundle.metadata.model_hash,
        channels=plan.targets if isinstance(plan, ChannelPlan) else (),
        attention_heads=plan.targets if isinstance(plan, HeadPlan) else (),
        statistics=_statistics(bundle, level, allowed, used, cut),
        safety=SafetyValidation(
            outcome=outcome,
            phase=allowed.phase,
            gates=gates,
            confidence=_CONFIDENCE[used] * _FALLBACK_DISCOUNT ** len(all_fallbacks),
        ),
        approved_for_application=not reason and outcome is not Outcome.NO_GO,
        rejection_reason=reason,
        fallbacks=all_fallbacks,
        ignored=eligible.ignored,
        settings_hash=settings.analysis_hash,
        elesh_version=elesh_version(),
    )


def _wanted(bundle: CheckpointBundle, settings: Settings) -> str:
    asked = bundle.parameters.scorer
    return settings.structured_pruning.channel_analysis.scorer if asked == "auto" else asked


def _round_to(bundle: CheckpointBundle, settings: Settings) -> int:
    asked = bundle.parameters.round_to
    return settings.structured_pruning.channel_analysis.round_to if asked == 1 else asked


def _allowance(bundle: CheckpointBundle, settings: Settings, level: Level) -> Allowance:
    pruning = settings.structured_pruning
    margin, schedule = pruning.channel_analysis.safety_margin, pruning.safety_schedule
    if level is Level.HEAD:
        # Heads come in with the moderate phase (section "Progressive safety schedule").
        margin = pruning.attention_analysis.safety_margin
        schedule = schedule.model_copy(update={"conservative_limit": 0.0})
    return allowance(
        bundle.architecture,
        bundle.metadata.epoch,
        schedule,
        shape=pruning.channel_analysis.schedule,
        margin=margin,
        target=bundle.parameters.target_ratio,
        level=level,
    )


def _plan_channels(
    bundle: CheckpointBundle, settings: Settings, scorer: Scorer, allowed: Allowance, threads: int
) -> tuple[Eligible, ChannelPlan]:
    channels, round_to = settings.structured_pruning.channel_analysis, _round_to(bundle, settings)
    eligible = eligible_groups(bundle, scorer, channels.min_channels_per_layer, round_to)
    plan = plan_channels(
        bundle,
        channels,
        eligible.groups,
        scorer,
        allowed.quota,
        allowed.phase,
        round_to=round_to,
        threads=threads,
    )
    return eligible, plan


def _plan_heads(
    bundle: CheckpointBundle, settings: Settings, scorer: Scorer, allowed: Allowance, threads: int
) -> tuple[Eligible, HeadPlan]:
    heads = settings.structured_pruning.attention_analysis
    eligible = eligible_groups(bundle, scorer, heads.min_heads_per_layer, level=Level.HEAD)
    plan = plan_heads(
        bundle, heads, eligible.groups, scorer, allowed.quota, allowed.phase, threads=threads
    )
    return eligible, plan


_Plan = ChannelPlan | HeadPlan
_ScorerChoice = Callable[[CheckpointBundle, str], tuple[Scorer, tuple[Fallback, ...]]]
_Planner = Callable[
    [CheckpointBundle, Settings, Scorer, Allowance, int], tuple[Eligible, ChannelPlan | HeadPlan]
]
_PLANNERS: Mapping[Level, tuple[_ScorerChoice, _Planner]] = {
    Level.CHANNEL: (choose_scorer, _plan_channels),
    Level.HEAD: (choose_head_scorer, _plan_heads),
}
"""What is particular to a level: which scorer, and which targets."""


def _minimum(settings: Settings, level: Level) -> int:
    """The fewest units that a group of this level must keep."""
    pruning = settings.structured_pruning
    if level is Level.HEAD:
        return pruning.attention_analysis.min_heads_per_layer
    return pruning.channel_analysis.min_channels_per_layer


def _cut(bundle: CheckpointBundle, plan: _Plan) -> _Cut:
    """What removing the targets leaves, exactly, and what it is predicted to do."""
    units = {
        target.layer_name: target.channel_indices
        if isinstance(target, ChannelPruningTarget)
        else target.head_indices
        for target in plan.targets
    }
    structure = safety.structure(bundle.architecture, units)
    prediction = plan.prediction
    known = prediction is not None and plan.energy > 0
    return _Cut(
        units=units,
        count=sum(map(len, units.values())),
        structure=structure,
        after=bundle.architecture.without(units) if structure.passed else None,
        loss_rise=_loss_rise(bundle, units),
        shift=prediction.damage / plan.energy if prediction and known else None,
        error=prediction.error / plan.energy if prediction and known else None,
    )


def _loss_rise(bundle: CheckpointBundle, units: Mapping[str, Sequence[int]]) -> float | None:
    """The sum of the single removals' second-order predictions: interactions are not in it."""
    if not units or not all(name in bundle.gates for name in units):
        return None
    return float(
        sum(
            float(single_removal(bundle.gates[name])[np.asarray(lost)].sum())
            for name, lost in units.items()
        )
    )


def _gates(
    bundle: CheckpointBundle,
    settings: Settings,
    level: Level,
    allowed: Allowance,
    plan: _Plan,
    cut: _Cut,
    breaker: BreakerStatus,
) -> tuple[GateResult, ...]:
    channels, architecture = settings.structured_pruning.channel_analysis, bundle.architecture
    random = plan.prediction.random / plan.energy if plan.prediction and plan.energy > 0 else None
    parameters = architecture.parameters
    smaller = 1 - cut.after.parameters / parameters if cut.after and parameters else 0.0
    prunable = {g.name for g in counted_groups(architecture, level)}
    measured = prunable & (bundle.gates.keys() | bundle.channels.keys() | bundle.heads.keys())
    return (
        safety.breaker_gate(breaker),
        safety.phase_gate(allowed.phase),
        safety.statistics_sound(_samples(bundle), len(measured), len(prunable)),
        safety.cumulative_limit(allowed.removed, cut.count, allowed.original, allowed.limit, level),
        safety.minimum_units(architecture, cut.units, _minimum(settings, level), level),
        cut.structure,
        safety.gradient_isolation(architecture, cut.units),
        safety.noise(cut.shift, cut.error, random),
        safety.predicted_shift(cut.shift, cut.error, channels.max_predicted_shift),
        safety.requirements(bundle.requirements, cut.loss_rise, smaller),
    )


def _samples(bundle: CheckpointBundle) -> int:
    """Calibration samples behind the statistics."""
    counts = [len(gate.projections) for gate in bundle.gates.values()]
    return counts[0] if counts else bundle.metadata.samples


def _rejection(
    gates: Sequence[GateResult], cut: _Cut, allowed: Allowance, eligible: Eligible, level: Level
) -> str:
    """Why the decision is not approved; empty where it is."""
    if failed := rejection(gates):
        return failed
    if cut.count:
        return ""
    if not eligible.groups:
        return f"nothing to remove: no group can lose {level}s (see ignored)"
    if allowed.quota:
        return f"nothing to remove: no group can lose a whole multiple within quota {allowed.quota}"
    return (
        f"nothing to remove: quota 0 ({allowed.removed} of {allowed.original} original {level}s "
        f"are removed, {allowed.share:.2%} may be at this epoch)"
    )


def _statistics(
    bundle: CheckpointBundle, level: Level, allowed: Allowance, scorer: Scorer, cut: _Cut
) -> PruningStatistics:
    before = bundle.architecture
    after = cut.after or before
    groups = counted_groups(before, level)
    present = sum(group.size for group in groups)
    gone = allowed.removed + cut.count
    return PruningStatistics(
        scorer=scorer,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        macs_before=before.macs,
        macs_after=after.macs,
        channels_before=present,
        channels_after=present - cut.count,
        channels_original=allowed.original,
        quota=allowed.quota,
        phase_limit=allowed.limit,
        cumulative_ratio=min(1.0, gone / allowed.original) if allowed.original else 0.0,
        predicted_shift=cut.shift,
        predicted_shift_error=cut.error,
        predicted_loss_rise=cut.loss_rise,
        samples=_samples(bundle),
    )
