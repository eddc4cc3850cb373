"""``draft_level``: plans one level of a checkpoint, applies its gates and shortens the plan to what
they pass; and merges the shards of a level.

Promises: every gate is listed whether it passed or not; what a level would remove is there even
where a gate says no; all levels have the same gates, in the same order. What is left of a set that
is shortened is a beginning of the removal order that ends at the groups' multiples; the other units
are listed as kept near the cut. Breakers and the other levels come in when levels are joined
(:mod:`elesh.analysis.decision.join`).

Each shard has ranked its own groups as far as the whole quota, seeing nothing of the others. Their
orders are merged, cheapest first, and cut off at the quota; what is taken from one shard no longer
depends on what another gives up (decision 0026 says what that costs). The cut is judged as ever:
what one fold of the samples chooses, in every shard, is judged on the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from elesh import safety
from elesh.analysis.candidates import Candidates, Doubles, Floats, multiple_of
from elesh.analysis.importance.scores import Prediction, output_mean_square, predict, sample_weights
from elesh.analysis.pruning_set.draft import FALLBACK_DISCOUNT, Cut, Draft, RelativeOutputError
from elesh.analysis.pruning_set.plans import (
    BudgetUse,
    LevelPlan,
    merged,
    restricted,
    rounded_to_multiples,
)
from elesh.analysis.selection.choose import Scorer, usable_projections
from elesh.analysis.selection.schedule import near_the_cut, sentence
from elesh.analysis.spans import span
from elesh.safety import predicted_shift
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
    PruningStatistics,
    RankedUnit,
)

from .heads import HEADS
from .layers import plan_layers
from .units import CHANNELS, Ranked, UnitLevel


def largest(count: int, passes: Callable[[int], bool]) -> int:
    """The longest beginning that passes, of ``count`` units that do not, found by halving."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return low


def shortened_plan(bundle: CheckpointBundle, settings: Settings, plan: LevelPlan) -> LevelPlan:
    """The plan, with as much of its order as the predicted effect may be.

    Only where the checkpoint asks for that (``failing_gate``), and the level has groups.
    """
    prediction, mean_square = plan.prediction, plan.output_mean_square
    asked = bundle.parameters.failing_gate == "shorten" and plan.level is not Level.LAYER
    if not asked or prediction is None or not mean_square > 0 or not plan.order:
        return plan
    limit = settings.structured_pruning.channel_analysis.max_predicted_shift
    output_errors, whole = _output_errors(bundle, plan, prediction), prediction.output_error

    def passes(count: int) -> bool:
        share = output_errors[count - 1] / mean_square if count else 0.0
        relative = prediction.standard_error / whole if whole > 0 else 0.0
        return predicted_shift(share, share * relative, limit).passed

    if passes(len(plan.order)):
        return plan
    kept = _rounded(plan, plan.order[: largest(len(plan.order), passes)])
    scale = output_errors[len(kept) - 1] / whole if kept and whole > 0 else 0.0
    why = f"{len(kept)} of {len(plan.order)}: more would move the outputs beyond {limit:g}"
    return replace(
        plan,
        targets=restricted(plan.targets, plan.order, kept, "limit"),
        order=kept,
        prediction=_scaled(prediction, scale) if kept else None,
        shortfall=sentence(plan.shortfall, why),
        nothing=plan.nothing if kept else f"nothing to remove: {why}",
    )


def _scaled(prediction: Prediction, scale: float) -> Prediction:
    random = prediction.random
    return Prediction(
        output_error=prediction.output_error * scale,
        standard_error=prediction.standard_error * scale,
        random=random if random is None else random * min(1.0, math.sqrt(scale)),
    )


def _output_errors(bundle: CheckpointBundle, plan: LevelPlan, prediction: Prediction) -> Doubles:
    """[K]: the predicted movement after each unit of the order, rising to that of the whole."""
    if plan.scorer == "reconstruction":
        rising = np.cumsum([max(unit.cost, 0.0) for unit in plan.order])
    else:
        gate = bundle.gates[plan.order[0].layer_name]
        moved = np.zeros(len(gate.projections))
        weights, found = sample_weights(gate), []
        for unit in plan.order:
            moved += bundle.gates[unit.layer_name].projections[:, unit.index] * weights
            found.append(float(np.mean(moved * moved)))
        rising = np.maximum.accumulate(found)
    last = float(rising[-1])
    return np.asarray(rising * (prediction.output_error / last if last > 0 else 1.0), np.float64)


def _rounded(plan: LevelPlan, units: Sequence[RankedUnit]) -> tuple[RankedUnit, ...]:
    groups = [group for group in plan.groups if any(u.layer_name == group.name for u in units)]
    multiples = {
        group.name: multiple_of(group, plan.round_to if plan.level is Level.CHANNEL else 1)
        for group in groups
    }
    return rounded_to_multiples(units, {group.name: group.size for group in groups}, multiples)


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
    scorer: Scorer | None = None,
    shard: Collection[str] | None = None,
) -> LevelAnalysis:
    """Analyse one level for a join elsewhere; the arguments are those of :func:`draft_level`."""
    return draft_level(bundle, settings or Settings(), level, scorer=scorer, shard=shard).frozen()


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
    cut, error, predicted = Cut.of(bundle, plan.targets, plan.scorer), RelativeOutputError(), None
    prediction, mean_square = plan.prediction, plan.output_mean_square
    if prediction is not None and mean_square > 0:
        moved, deviation = prediction.output_error, prediction.standard_error
        random = None if prediction.random is None else prediction.random / mean_square
        error = RelativeOutputError(moved / mean_square, deviation / mean_square, random)
        predicted = PredictedDamage(damage=moved, error=deviation, energy=mean_square)
    taken, allowed = (*fallbacks, *plan.fallbacks), plan.allowed
    gone = allowed.removed + cut.count
    counts = {
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
    draft = Draft(
        bundle,
        settings,
        key or bundle.key(plan.level),
        plan.targets,
        plan.order,
        PruningStatistics.model_validate({**counts, **cut.figures(error)}),
        allowed.phase,
        plan.confidence * FALLBACK_DISCOUNT ** len(taken),
        gates=_gates(bundle, settings, plan, cut, error),
        fallbacks=taken,
        ignored=plan.ignored,
        near_cut=plan.near_cut,
    )
    draft.judge(reason="" if plan.targets else plan.nothing)
    return LevelDraft(draft, predicted)


@span("gates")
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
        safety.requirements(bundle.requirements, cut.loss_increase, cut.parameters_removed),
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


def merge_shards(
    bundle: CheckpointBundle, settings: Settings, shards: Sequence[LevelDraft]
) -> LevelDraft:
    """The analysis of a level from its shards.

    Groups that no shard looked at, and shards that had to rank by another score than most (their
    costs cannot be compared), lose nothing: they are listed as ignored.

    Raises:
        InvalidField: if two shards looked at one group.
    """
    looked_at = [name for shard in shards for name in shard.shard]
    if len(set(looked_at)) < len(looked_at):
        raise InvalidField("analyses", "shards that have no group in common", sorted(looked_at))
    scorer = _usual_scorer(shards)
    alike = [s for s in shards if s.draft.statistics.scorer == scorer]
    names = {name for shard in alike for name in shard.shard}
    plan = UNIT_LEVELS[shards[0].level].prepare(bundle, settings, scorer=scorer, shard=names)
    sizes = {group.name: group.size for group in plan.groups}
    multiples = {group.name: multiple_of(group, plan.round_to) for group in plan.groups}

    def within_quota(orders: Sequence[Sequence[RankedUnit]]) -> tuple[RankedUnit, ...]:
        return rounded_to_multiples(merged(orders)[: plan.allowed.quota], sizes, multiples)

    orders = [shard.draft.order for shard in alike]
    order = within_quota(orders)
    targets = restricted(
        [target for shard in alike for target in shard.draft.targets],
        [unit for one in orders for unit in one],
        order,
        "quota",
    )
    folds = [within_quota(fold) for fold in zip(*(s.folds for s in alike), strict=False)]
    prediction, mean_square = _prediction(bundle, plan, order, folds)
    ignored = plan.ignored
    if scorer == "output_projection" and order:
        max_cost = max(unit.cost for unit in order)
        ignored = tuple(near_the_cut(bundle, plan.level, ignored, max_cost))
    plan = replace(
        plan,
        ignored=(*ignored, *_left_out(bundle, shards, scorer)),
        targets=targets,
        order=order,
        near_cut=tuple(group for shard in alike for group in shard.draft.near_cut),
        shortfall=_shortfall(plan, shards, len(order)),
        prediction=prediction,
        output_mean_square=mean_square,
    )
    own = set(plan.fallbacks)
    others = dict.fromkeys(f for s in shards for f in s.draft.fallbacks if f not in own)
    return judged(bundle, settings, plan, key=shards[0].draft.key, fallbacks=tuple(others))


def _shortfall(plan: LevelPlan, shards: Sequence[LevelDraft], count: int) -> str:
    """How much of the quota is not used; the shards say why."""
    own = dict.fromkeys(shard.draft.statistics.shortfall for shard in shards)
    short = plan.allowed.quota - count
    if len(shards) == 1:
        return next(iter(own))
    if not short:
        return plan.shortfall
    unused = f"{short} of the {plan.allowed.quota} {plan.level}s that may go stay"
    return sentence(plan.shortfall, unused, *(words for words in own if words != plan.shortfall))


def _left_out(
    bundle: CheckpointBundle, shards: Sequence[LevelDraft], scorer: str
) -> Iterator[tuple[str, str]]:
    """The groups that cannot be compared with the others, each with the reason."""
    scorer_of = {n: s.draft.statistics.scorer for s in shards for n in s.shard}
    for group in bundle.architecture.groups:
        if group.level is not shards[0].level:
            continue
        other = scorer_of.get(group.name)
        if other is None:
            yield group.name, "no shard looked at it: its analysis is missing"
        elif other != scorer:
            yield group.name, f"its shard was ranked by {other}, the others by {scorer}"


def _usual_scorer(shards: Sequence[LevelDraft]) -> str:
    """What ranked most groups."""
    counts = Counter(s.draft.statistics.scorer for s in shards for _ in s.shard)
    return max(sorted(counts), key=lambda scorer: counts[scorer])


def _prediction(
    bundle: CheckpointBundle,
    plan: LevelPlan,
    order: Sequence[RankedUnit],
    folds: Sequence[Sequence[RankedUnit]],
) -> tuple[Prediction | None, float]:
    """What the cut does, judged on samples that did not choose it (see :func:`predict`)."""
    candidates = Candidates.of(plan.groups, plan.minimum, plan.round_to)
    projections = usable_projections(bundle, candidates) if order else None
    if projections is None:
        return None, 0.0
    starts = dict(zip(candidates.names, candidates.starts.tolist(), strict=False))
    chosen = iter(folds or (order, order))

    def choose(_: Floats) -> list[int]:
        return sorted(starts[unit.layer_name] + unit.index for unit in next(chosen))

    prediction = predict(projections, candidates, len(order), choose)
    return prediction, output_mean_square(bundle.gates.values(), projections.weights)
