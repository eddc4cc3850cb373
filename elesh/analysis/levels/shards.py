"""Shards of one level become its analysis: removal curves merged under the one quota.

Each shard has ranked its own groups as far as the whole quota, seeing nothing of the others. Here
the orders are merged, cheapest first, and cut off at the quota; what is taken from one shard no
longer depends on what another gives up (decision 0026 says what that costs). The
cut is judged as ever: what one fold of the samples chooses, in every shard, is judged on the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from elesh.analysis.candidates import Candidates, Floats, multiple_of
from elesh.analysis.importance.output_projections import Prediction, output_mean_square, predict
from elesh.analysis.pruning_set.plans import LevelPlan
from elesh.analysis.pruning_set.subsets import merged, restricted, rounded_to_multiples
from elesh.analysis.selection.choose import usable_projections
from elesh.analysis.selection.shortfalls import near_the_cut, sentence
from elesh.settings import Settings
from leyline import CheckpointBundle, InvalidField, RankedUnit

from .analyze_level import UNIT_LEVELS, LevelDraft, judged

__all__ = ["merge_shards"]


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
    joint = scorer == "output_projection" and order
    max_cost = max(unit.cost for unit in order) if joint else None
    ignored = near_the_cut(bundle, plan.level, plan.ignored, max_cost)
    plan = replace(
        plan,
        ignored=(*ignored, *_left_out(bundle, shards, scorer)),
        targets=targets,
        order=order,
        spared=tuple(group for shard in alike for group in shard.draft.spared),
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
