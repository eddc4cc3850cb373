"""``analyze_level``: one level of a checkpoint, planned and judged by its own gates.

Promises: every gate is listed whether it passed or not; what a level would remove is there even
where a gate says no; all levels have the same gates, in the same order. Breakers and the other
levels come in when levels are joined (:mod:`.join`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from elesh import safety
from elesh.analysis.pruning_set.effects import Cut, Shift
from elesh.analysis.pruning_set.plans import BudgetUse, LevelPlan
from elesh.analysis.pruning_set.verdicts import FALLBACK_DISCOUNT, decided
from elesh.analysis.selection.choose import Scorer
from elesh.analysis.spans import stage
from elesh.settings import Settings
from leyline import (
    CheckpointBundle,
    Fallback,
    GateResult,
    IdempotencyKey,
    InvalidField,
    Level,
    LevelAnalysis,
    PredictedDamage,
)

from .channels import plan_channels
from .heads import plan_heads
from .layers import plan_layers
from .to_limits import shortened_plan

__all__ = ["analyze_level", "budget_gate", "judged"]

_PLANNERS: Mapping[Level, Callable[..., LevelPlan]] = {
    Level.CHANNEL: plan_channels,
    Level.HEAD: plan_heads,
    Level.LAYER: plan_layers,
}


def analyze_level(
    bundle: CheckpointBundle,
    settings: Settings | None = None,
    level: Level = Level.CHANNEL,
    *,
    key: IdempotencyKey | None = None,
    scorer: Scorer | None = None,
    fallbacks: Sequence[Fallback] = (),
    shard: Collection[str] | None = None,
    threads: int = 1,
) -> LevelAnalysis:
    """Analyse one level of the checkpoint.

    Args:
        bundle: a checkpoint's architecture and statistics.
        settings: the defaults of the design document if not given.
        level: channels, heads or layers.
        key: of the level's decision; the bundle's own for this level if not given.
        scorer: overrides the scorer of request and settings, where a fallback asks for another
            (layers have only one).
        fallbacks: fallbacks of the failure table that led here, to be recorded in the decision.
        shard: names of the level's groups to look at, where others look at the rest; shards are
            joined by :func:`join` under one quota. Not at the layer level.
        threads: numerical work runs on so many threads; the result does not depend on it.

    Raises:
        InvalidField: if the level is not analysed here, or request or shard name what is not
            there.
        IdentityMismatch: if the key speaks of another checkpoint.
    """
    settings = settings or Settings()
    if level not in _PLANNERS:
        here = ", ".join(_PLANNERS)
        raise InvalidField("level", f"a level that is analysed here: {here}", level.value)
    names = {} if shard is None else {"shard": _checked(bundle, level, shard)}
    plan = _PLANNERS[level](bundle, settings, scorer=scorer, threads=threads, **names)
    analysis = judged(bundle, settings, plan, key=key, fallbacks=fallbacks)
    return analysis.model_copy(update={**names, "halves": plan.halves}) if names else analysis


def _checked(bundle: CheckpointBundle, level: Level, shard: Collection[str]) -> tuple[str, ...]:
    """The shard's groups, each once, in the architecture's order."""
    if level is Level.LAYER:
        raise InvalidField("shard", "none at the layer level: it is analysed whole", sorted(shard))
    known = [group.name for group in bundle.architecture.groups if group.level is level]
    if not shard or set(shard) - set(known):
        raise InvalidField("shard", f"groups of the {level} level, at least one", sorted(shard))
    return tuple(name for name in known if name in set(shard))


def judged(
    bundle: CheckpointBundle,
    settings: Settings,
    plan: LevelPlan,
    *,
    key: IdempotencyKey | None = None,
    fallbacks: Sequence[Fallback] = (),
) -> LevelAnalysis:
    """A plan with its figures, gates and verdict."""
    plan = shortened_plan(bundle, settings, plan)
    cut, shift = Cut.of(bundle, plan.targets, plan.scorer), _shift(plan)
    taken = (*fallbacks, *plan.fallbacks)
    decision = decided(
        bundle,
        settings,
        key or bundle.key(plan.level),
        targets=plan.targets,
        statistics=cut.statistics(_counts(plan, cut), shift),
        phase=plan.allowed.phase,
        gates=_gates(bundle, settings, plan, cut, shift),
        confidence=plan.confidence * FALLBACK_DISCOUNT ** len(taken),
        reason="" if plan.targets else plan.nothing,
        fallbacks=taken,
        ignored=plan.ignored,
        spared=plan.spared,
    )
    return LevelAnalysis(decision=decision, order=plan.order, predicted=_predicted(plan))


def _shift(plan: LevelPlan) -> Shift:
    prediction, energy = plan.prediction, plan.energy
    if prediction is None or not energy > 0:
        return Shift()
    random = None if prediction.random is None else prediction.random / energy
    return Shift(prediction.damage / energy, prediction.error / energy, random)


def _predicted(plan: LevelPlan) -> PredictedDamage | None:
    prediction, energy = plan.prediction, plan.energy
    if prediction is None or not energy > 0:
        return None
    return PredictedDamage(damage=prediction.damage, error=prediction.error, energy=energy)


@stage("gates")
def _gates(
    bundle: CheckpointBundle, settings: Settings, plan: LevelPlan, cut: Cut, shift: Shift
) -> tuple[GateResult, ...]:
    architecture, allowed, level = bundle.architecture, plan.allowed, plan.level
    limit = settings.structured_pruning.channel_analysis.max_predicted_shift
    return (
        safety.phase_gate(allowed.phase, level),
        safety.statistics_sound(
            plan.samples, plan.measured, plan.prunable, bundle.metadata.distinct
        ),
        safety.cumulative_limit(allowed.removed, cut.count, allowed.original, allowed.limit, level),
        safety.minimum_layers(plan.present, cut.count, plan.minimum)
        if level is Level.LAYER
        else safety.minimum_units(architecture, cut.units, plan.minimum, level),
        cut.structure,
        safety.gradient_isolation(architecture, cut.units, cut.layers),
        safety.noise(shift.damage, shift.error, shift.random),
        safety.predicted_shift(shift.damage, shift.error, limit),
        safety.requirements(bundle.requirements, cut.loss_rise, cut.parameters_removed),
        *([budget_gate(plan.budget)] if plan.budget else []),
    )


def budget_gate(use: BudgetUse) -> GateResult:
    """Says how far the cut gets; it never rejects: the schedule takes several checkpoints."""
    reached = "reached" if use.left <= use.at_most else "not reached: quota, minimums or no savings"
    return GateResult(
        name="budget",
        passed=True,
        measured=use.left,
        limit=use.at_most,
        detail=f"share of the {use.of} {use.resource} that is left; {reached}",
    )


def _counts(plan: LevelPlan, cut: Cut) -> dict[str, object]:
    allowed = plan.allowed
    gone = allowed.removed + cut.count
    return {
        "scorer": plan.scorer,
        "channels_before": plan.present,
        "channels_after": plan.present - cut.count,
        "channels_original": allowed.original,
        "quota": allowed.quota,
        "shortfall": plan.shortfall,
        "phase_limit": allowed.limit,
        "cumulative_ratio": min(1.0, gone / allowed.original) if allowed.original else 0.0,
        "samples": plan.samples,
    }
