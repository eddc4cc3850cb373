"""The channel level: which scorer, which groups, which channels, and why the others stay.

Promises: what was asked for and cannot be had is said (fallbacks, ignored groups, spared units);
nothing is chosen twice or against a group's minimum, multiple or the quota.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from elesh.analysis.budgets.fitting import refuse_shard
from elesh.analysis.budgets.targets import all_budgets, out_of_reach
from elesh.analysis.candidates import Candidates, Doubles
from elesh.analysis.importance.output_projections import Projections
from elesh.analysis.importance.redundancy import pairs_of_groups
from elesh.analysis.importance.scores import fisher, magnitude, multi_metric, weights_at
from elesh.analysis.pruning_set.plans import LevelPlan, empty_plan, redistributes, wanted_scorer
from elesh.analysis.selection.choose import (
    Choice,
    Decide,
    Ranking,
    Scorer,
    fisher_fault,
    gates_of,
    pairs_by_group,
    projection_fault,
    spared_units,
    usable_projections,
)
from elesh.analysis.selection.eligible import eligible_groups
from elesh.analysis.selection.reconstruction_order import reconstruction_fault
from elesh.analysis.selection.schedule import allowance, counted_groups, raised
from elesh.analysis.selection.shortfalls import told
from elesh.analysis.spans import stage
from elesh.settings import ChannelAnalysis, Settings
from leyline import (
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    Level,
    Phase,
    PruningGroup,
    Redundancy,
)

from .planning import planned

__all__ = ["choose_scorer", "plan_channels", "prepare_channels", "rank_channels"]


def choose_scorer(
    bundle: CheckpointBundle, wanted: str, *, redistribute: bool = False
) -> tuple[Scorer, tuple[Fallback, ...]]:
    """The scorer that the statistics allow: ``auto`` takes projections where they are there, and
    ``reconstruction`` with its input moments where the caller redistributes.

    Each step down from what was wanted is a recorded fallback: ``gate_failure`` where projections
    are missing or all zero, ``taylor_failure`` where all Taylor importances are zero (the
    gradient computation failed; NaN never gets this far).
    """
    taken: list[Fallback] = []
    if wanted == "reconstruction" or (wanted == "auto" and redistribute):
        fault = reconstruction_fault(gates_of(bundle, Level.CHANNEL))
        if not fault:
            return "reconstruction", ()
        taken.append(Fallback(rung="moments_failure", reason=f"{fault}: ranked without"))
        wanted = "auto"
    if wanted == "fisher":
        fault = fisher_fault(bundle, Level.CHANNEL)
        if not fault:
            return "fisher", ()
        taken.append(Fallback(rung="gate_failure", reason=f"{fault}: ranked by the vectors"))
    if wanted == "output_projection" or (wanted == "auto" and bundle.gates):
        fault = projection_fault(bundle)
        if not fault:
            return "output_projection", tuple(taken)
        taken.append(Fallback(rung="gate_failure", reason=f"{fault}: ranked by the vectors"))
    if wanted == "magnitude":
        return "magnitude", ()
    if any(data.taylor_importance.any() for data in bundle.channels.values()):
        return "multi_metric", tuple(taken)
    if bundle.channels:
        taken.append(
            Fallback(
                rung="taylor_failure", reason="all Taylor importances are zero: ranked by magnitude"
            )
        )
    return "magnitude", tuple(taken)


def rank_channels(
    bundle: CheckpointBundle,
    settings: ChannelAnalysis,
    groups: Sequence[PruningGroup],
    scorer: Scorer,
    phase: Phase,
    *,
    round_to: int = 1,
    threads: int = 1,
) -> Ranking:
    """The ranking of ``groups``, of which there is at least one."""
    candidates = Candidates.of(groups, settings.min_channels_per_layer, round_to)
    with stage("score"):
        projections = usable_projections(bundle, candidates)
        scores = _scores(bundle, candidates, scorer, settings, phase, projections)
    if scorer == "reconstruction":  # What is alike is predicted: no pairs are needed.
        return Ranking(candidates, scorer, projections, scores, (), threads, bundle.gates)
    matrices = {name: data.channel_correlations for name, data in bundle.channels.items()}
    redundant = pairs_of_groups(candidates, matrices, scores, settings.redundancy_threshold)
    return Ranking(candidates, scorer, projections, scores, redundant, threads)


def prepare_channels(
    bundle: CheckpointBundle,
    settings: Settings,
    *,
    scorer: str | None = None,
    shard: Collection[str] | None = None,
) -> LevelPlan:
    """The plan before any channel is chosen: what may go, and by which score.

    Raises:
        InvalidField: if the request ignores a group or layer that does not exist.
    """
    pruning = settings.structured_pruning
    channels, asked = pruning.channel_analysis, bundle.parameters
    round_to = channels.round_to if asked.round_to == 1 else asked.round_to
    allowed = allowance(
        bundle.architecture,
        bundle.metadata.epoch,
        raised(pruning.safety_schedule, asked.removed_at_most),
        shape=channels.schedule,
        margin=channels.safety_margin,
        target=asked.target_ratio,
    )
    used = choose_scorer(
        bundle,
        scorer or wanted_scorer(bundle, settings),
        redistribute=redistributes(bundle, settings),
    )
    minimum = channels.min_channels_per_layer
    eligible = eligible_groups(bundle, used[0], minimum, round_to, shard=shard)
    plan = empty_plan(bundle, Level.CHANNEL, allowed, used, eligible, minimum, round_to)
    return replace(plan, shortfall=told(plan.shortfall, _out_of_reach(bundle, settings, plan)))


def _out_of_reach(bundle: CheckpointBundle, settings: Settings, plan: LevelPlan) -> str:
    """Why budgets of the original network cannot be reached within the schedule's last limit."""
    budgets = [budget for budget in all_budgets(bundle) if budget.of == "original"]
    if not budgets:
        return ""
    pruning, groups = settings.structured_pruning, list(plan.groups)
    schedule = raised(pruning.safety_schedule, bundle.parameters.removed_at_most)
    share = schedule.aggressive_limit * (1 - pruning.channel_analysis.safety_margin)
    units = math.floor(share * plan.allowed.original + 1e-6) - plan.allowed.removed
    if Level.HEAD in bundle.levels:
        heads = counted_groups(bundle.architecture, Level.HEAD)
        gone, original = (sum(getattr(g, n) for g in heads) for n in ("removed", "original_size"))
        units += math.floor(schedule.aggressive_limit * original + 1e-6) - gone
        groups += heads
    return out_of_reach(
        bundle.architecture,
        budgets,
        groups,
        units=max(units, 0),
        minimum=plan.minimum,
        round_to=plan.round_to,
    )


def plan_channels(
    bundle: CheckpointBundle,
    settings: Settings,
    *,
    scorer: str | None = None,
    shard: Collection[str] | None = None,
    threads: int = 1,
    decide: Decide = Ranking.decide,
) -> LevelPlan:
    """Choose the channels to remove and predict what removing them does.

    Args:
        shard: groups to choose among; all of them if not given. The quota is the whole level's.
        decide: what chooses, once everything is ranked.

    Raises:
        InvalidField: if the request ignores a group or layer that does not exist.
    """
    plan = prepare_channels(bundle, settings, scorer=scorer, shard=shard)
    refuse_shard(bundle, shard)
    channels = settings.structured_pruning.channel_analysis

    def rank() -> Ranking:
        return rank_channels(
            bundle,
            channels,
            plan.groups,
            plan.scorer,
            plan.allowed.phase,
            round_to=plan.round_to,
            threads=threads,
        )

    def targets(ranking: Ranking, choice: Choice) -> tuple[ChannelPruningTarget, ...]:
        return _targets(plan.groups, ranking.candidates, choice, channels.redundancy_threshold)

    return planned(bundle, plan, rank, decide, targets)


def _scores(
    bundle: CheckpointBundle,
    candidates: Candidates,
    scorer: Scorer,
    settings: ChannelAnalysis,
    phase: Phase,
    projections: Projections | None,
) -> Doubles:
    """[C]: what each unit is worth alone; with projections, the mean square of its own column."""
    if scorer in ("output_projection", "reconstruction") and projections is not None:
        return projections.energies
    if scorer == "fisher":
        return fisher([bundle.gates[name] for name in candidates.names])
    data = [bundle.channels[name] for name in candidates.names]
    if scorer == "magnitude":
        return magnitude(data)
    return multi_metric(data, weights_at(phase, settings))


def _targets(
    groups: Sequence[PruningGroup], candidates: Candidates, choice: Choice, threshold: float
) -> tuple[ChannelPruningTarget, ...]:
    """One target for each group that loses channels; costs in their own unit."""
    selection, scale = choice.selection, choice.scale
    lost, targets = candidates.by_group(selection.units), []
    pairs = pairs_by_group(candidates, selection)
    for number, group in enumerate(groups):
        units = lost.get(group.name)
        if not units:
            continue
        start = int(candidates.starts[number])
        targets.append(
            ChannelPruningTarget(
                layer_name=group.name,
                channel_indices=units,
                original_indices=tuple(group.origin[unit] for unit in units),
                importance=tuple(selection.marginal_costs[start + unit] * scale for unit in units),
                errors=choice.errors_of([start + unit for unit in units]),
                redundancy_pairs=tuple(
                    Redundancy(kept=p.kept, removed=p.removed, similarity=p.similarity)
                    for p in pairs.get(number, ())
                ),
                redundancy_threshold=threshold,
                channels_before=group.size,
                channels_after=group.size - len(units),
                spared=spared_units(candidates, choice, number),
            )
        )
    return tuple(targets)
