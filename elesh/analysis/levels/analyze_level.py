"""``draft_level``: one level of a checkpoint, planned and judged by its own gates.

Promises: every gate is listed whether it passed or not; what a level would remove is there even
where a gate says no; all levels have the same gates, in the same order. Breakers and the other
levels come in when levels are joined (:mod:`elesh.analysis.decision.join`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from elesh import safety
from elesh.analysis.pruning_set.draft import FALLBACK_DISCOUNT, Draft
from elesh.analysis.pruning_set.effects import Cut, RelativeOutputError
from elesh.analysis.pruning_set.plans import BudgetUse, LevelPlan
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
    RankedUnit,
)

from .channels import CHANNELS
from .heads import HEADS
from .layers import plan_layers
from .to_limits import shortened_plan
from .units import Ranked, UnitLevel

__all__ = ["UNIT_LEVELS", "LevelDraft", "analyze_level", "budget_gate", "draft_level", "judged"]

UNIT_LEVELS: Mapping[Level, UnitLevel] = {Level.CHANNEL: CHANNELS, Level.HEAD: HEADS}
"""The levels whose groups lose units one by one."""


@dataclass(frozen=True)
class LevelDraft:
    """One level of a checkpoint, analysed; :class:`leyline.LevelAnalysis` while it is not sent."""

    draft: Draft
    predicted: PredictedDamage | None = None
    shard: tuple[str, ...] = ()
    folds: tuple[tuple[RankedUnit, ...], ...] = ()
    ranked: Ranked | None = None
    """What it was chosen from, where that was here: rounds choose from the same."""

    @classmethod
    def of(cls, bundle: CheckpointBundle, settings: Settings, made: LevelAnalysis) -> LevelDraft:
        """What another process analysed."""
        draft = Draft.of(bundle, settings, made.decision, made.order)
        return cls(draft, made.predicted, made.shard, made.halves)

    @property
    def level(self) -> Level:
        """The level that was analysed."""
        return self.draft.key.level

    def frozen(self) -> LevelAnalysis:
        """The message."""
        return LevelAnalysis(
            decision=self.draft.frozen(),
            order=self.draft.order,
            shard=self.shard,
            halves=self.folds,
            predicted=self.predicted,
        )


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
    """Analyse one level for a join elsewhere; the arguments are those of :func:`draft_level`."""
    return draft_level(
        bundle,
        settings or Settings(),
        level,
        key=key,
        scorer=scorer,
        fallbacks=fallbacks,
        shard=shard,
        threads=threads,
    ).frozen()


def draft_level(
    bundle: CheckpointBundle,
    settings: Settings,
    level: Level,
    *,
    key: IdempotencyKey | None = None,
    scorer: Scorer | None = None,
    fallbacks: Sequence[Fallback] = (),
    shard: Collection[str] | None = None,
    threads: int = 1,
) -> LevelDraft:
    """Analyse one level of the checkpoint.

    Args:
        bundle: a checkpoint's architecture and statistics.
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
    names = () if shard is None else _checked(bundle, level, shard)
    if level is Level.LAYER:
        return judged(bundle, settings, plan_layers(bundle, settings), key=key, fallbacks=fallbacks)
    of_level = UNIT_LEVELS.get(level)
    if of_level is None:
        here = ", ".join((*UNIT_LEVELS, Level.LAYER))
        raise InvalidField("level", f"a level that is analysed here: {here}", level.value)
    ranked = of_level.ranked(bundle, settings, scorer=scorer, shard=names or None, threads=threads)
    plan = of_level.choose(bundle, settings, ranked)
    found = judged(bundle, settings, plan, key=key, fallbacks=fallbacks)
    return replace(found, ranked=ranked, shard=names, folds=plan.folds if names else ())


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
) -> LevelDraft:
    """A plan with its figures, gates and verdict."""
    plan = shortened_plan(bundle, settings, plan)
    cut, error = Cut.of(bundle, plan.targets, plan.scorer), _relative_error(plan)
    taken = (*fallbacks, *plan.fallbacks)
    draft = Draft(
        bundle,
        settings,
        key or bundle.key(plan.level),
        plan.targets,
        plan.order,
        cut.statistics(_counts(plan, cut), error),
        plan.allowed.phase,
        plan.confidence * FALLBACK_DISCOUNT ** len(taken),
        gates=_gates(bundle, settings, plan, cut, error),
        fallbacks=taken,
        ignored=plan.ignored,
        spared=plan.spared,
    )
    draft.judge(reason="" if plan.targets else plan.nothing)
    return LevelDraft(draft, _predicted(plan))


def _relative_error(plan: LevelPlan) -> RelativeOutputError:
    prediction, mean_square = plan.prediction, plan.output_mean_square
    if prediction is None or not mean_square > 0:
        return RelativeOutputError()
    random = None if prediction.random is None else prediction.random / mean_square
    return RelativeOutputError(
        prediction.output_error / mean_square, prediction.standard_error / mean_square, random
    )


def _predicted(plan: LevelPlan) -> PredictedDamage | None:
    prediction, mean_square = plan.prediction, plan.output_mean_square
    if prediction is None or not mean_square > 0:
        return None
    return PredictedDamage(
        damage=prediction.output_error, error=prediction.standard_error, energy=mean_square
    )


@stage("gates")
def _gates(
    bundle: CheckpointBundle,
    settings: Settings,
    plan: LevelPlan,
    cut: Cut,
    error: RelativeOutputError,
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
        safety.noise(error.value, error.standard_error, error.random),
        safety.predicted_shift(error.value, error.standard_error, limit),
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
