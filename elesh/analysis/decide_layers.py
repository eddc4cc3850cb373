"""The decision of the layer level: the plan, its gates and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elesh import safety
from elesh.safety import BreakerStatus
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Fallback,
    GateResult,
    IdempotencyKey,
    Outcome,
    Phase,
    PrunedArchitecture,
    PruningStatistics,
    SafetyValidation,
    StructuralPruningDecision,
)

from .layers import MIN_LAYERS, LayerPlan, plan_layers
from .schedule import phase_at
from .verdicts import elesh_version, rejection

__all__ = ["decide_layers"]

_CONFIDENCE = 0.6
"""As for the document's mix of channels: the five conditions follow the outputs, the projections
predict them, and nothing was measured on held-out data."""
_FALLBACK_DISCOUNT = 0.8


@dataclass(frozen=True)
class _Cut:
    """The figures of the proposed cut."""

    structure: GateResult
    after: PrunedArchitecture | None
    """None where the cut does not hold together (the structure gate says why)."""
    loss_rise: float | None
    shift: float | None
    error: float | None
    random: float | None


def decide_layers(
    bundle: CheckpointBundle,
    settings: Settings,
    *,
    breaker: BreakerStatus,
    key: IdempotencyKey,
    fallbacks: Sequence[Fallback] = (),
) -> StructuralPruningDecision:
    """Decide which whole layers can be removed; the layer level of ``analyze``.

    Raises:
        InvalidField: if the request names unknown layers.
    """
    pruning = settings.structured_pruning
    phase = phase_at(bundle.metadata.epoch, pruning.safety_schedule)
    plan = plan_layers(bundle, pruning.layer_analysis, phase)
    cut = _cut(bundle, plan)
    gates = _gates(bundle, settings, phase, plan, cut, breaker)
    outcome = safety.verdict(gates, measured=False)
    reason = rejection(gates) or ("" if plan.targets else _nothing(plan))
    return StructuralPruningDecision(
        idempotency_key=str(key),
        run_id=bundle.metadata.run_id,
        epoch=bundle.metadata.epoch,
        model_hash=bundle.metadata.model_hash,
        layers=plan.targets,
        statistics=_statistics(bundle, settings, plan, cut),
        safety=SafetyValidation(
            outcome=outcome,
            phase=phase,
            gates=gates,
            confidence=_CONFIDENCE * _FALLBACK_DISCOUNT ** len(fallbacks),
        ),
        approved_for_application=not reason and outcome is not Outcome.NO_GO,
        rejection_reason=reason,
        fallbacks=tuple(fallbacks),
        ignored=plan.ignored,
        settings_hash=settings.analysis_hash,
        elesh_version=elesh_version(),
    )


def _cut(bundle: CheckpointBundle, plan: LayerPlan) -> _Cut:
    """What removing the targets leaves, exactly, and what it is predicted to do."""
    data = [bundle.layers[name] for name in sorted(plan.names)]
    rise = sum(float(-x.first_order[0] + 0.5 * x.second_order[0]) for x in data)
    prediction, energy = plan.prediction, plan.energy
    known = prediction is not None and energy > 0
    structure, after = safety.layer_structure(bundle.architecture, plan.names)
    return _Cut(
        structure=structure,
        after=after,
        loss_rise=rise if data else None,
        shift=prediction.damage / energy if prediction and known else None,
        error=prediction.error / energy if prediction and known else None,
        random=prediction.random / energy if prediction and known else None,
    )


def _gates(
    bundle: CheckpointBundle,
    settings: Settings,
    phase: Phase,
    plan: LayerPlan,
    cut: _Cut,
    breaker: BreakerStatus,
) -> tuple[GateResult, ...]:
    pruning, architecture = settings.structured_pruning, bundle.architecture
    count, parameters = len(plan.targets), architecture.parameters
    smaller = 1 - cut.after.parameters / parameters if cut.after and parameters else 0.0
    limit = pruning.channel_analysis.max_predicted_shift
    return (
        safety.breaker_gate(breaker),
        safety.layer_phase(phase),
        safety.statistics_sound(_samples(bundle), plan.measured, plan.present),
        safety.cumulative_limit(
            plan.removed, count, plan.original, pruning.layer_analysis.max_layer_removal_ratio
        ),
        safety.minimum_layers(plan.present, count, MIN_LAYERS),
        cut.structure,
        safety.layer_isolation(architecture, plan.names),
        safety.noise(cut.shift, cut.error, cut.random),
        safety.predicted_shift(cut.shift, cut.error, limit),
        safety.requirements(bundle.requirements, cut.loss_rise, smaller),
    )


def _samples(bundle: CheckpointBundle) -> int:
    """Calibration samples behind the statistics."""
    counts = [len(data.projections) for data in bundle.layers.values()]
    return counts[0] if counts else bundle.metadata.samples


def _nothing(plan: LayerPlan) -> str:
    if not plan.original:
        return "nothing to remove: no layer of this network can be removed (see ignored)"
    if not plan.quota:
        return (
            f"nothing to remove: quota 0 ({plan.removed} of {plan.original} original layers are "
            f"removed, {MIN_LAYERS} must be left)"
        )
    return "nothing to remove: no layer meets all five conditions (see ignored)"


def _statistics(
    bundle: CheckpointBundle, settings: Settings, plan: LayerPlan, cut: _Cut
) -> PruningStatistics:
    before, count = bundle.architecture, len(plan.targets)
    after = cut.after or before
    gone = plan.removed + count
    return PruningStatistics(
        scorer="multi_metric",
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        macs_before=before.macs,
        macs_after=after.macs,
        channels_before=plan.present,
        channels_after=plan.present - count,
        channels_original=plan.original,
        quota=plan.quota,
        phase_limit=settings.structured_pruning.layer_analysis.max_layer_removal_ratio,
        cumulative_ratio=gone / plan.original if plan.original else 0.0,
        predicted_shift=cut.shift,
        predicted_shift_error=cut.error,
        predicted_loss_rise=cut.loss_rise,
        samples=_samples(bundle),
    )
