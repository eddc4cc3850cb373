"""The head level: how heads are scored, which go, and why the others stay.

With gate statistics heads go in the joint order of their output projections, like channels: the
gate of a head scales what it sends to the output projection. Where the caller redistributes, they
go by what the kept heads cannot make up for. Without such statistics, by the document's
multi-factor score. Heads whose attention patterns are alike are considered first.

Promises: what was asked for and cannot be had is said (fallbacks, ignored groups, spared units).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from elesh.analysis.budgets.fitting import refuse_shard
from elesh.analysis.candidates import Candidates, Doubles
from elesh.analysis.importance.redundancy import pairs_of_groups
from elesh.analysis.importance.scores import fisher, shares, single_removal
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
from elesh.analysis.selection.schedule import allowance, raised
from elesh.analysis.spans import stage
from elesh.settings import AttentionAnalysis, Settings
from leyline import (
    AttentionHeadTarget,
    CheckpointBundle,
    Fallback,
    HeadImportanceData,
    HeadRedundancy,
    Level,
    Phase,
    PruningGroup,
)

from .planning import planned

__all__ = [
    "EARLY",
    "LATE",
    "HeadWeights",
    "choose_head_scorer",
    "head_weights_at",
    "multi_factor",
    "plan_heads",
    "prepare_heads",
    "rank_heads",
]


class HeadWeights(NamedTuple):
    """How much each factor counts in the mix; they sum to 1."""

    entropy: float
    diversity: float
    gradient: float


EARLY = HeadWeights(0.2, 0.3, 0.5)
LATE = HeadWeights(0.4, 0.4, 0.2)


def head_weights_at(phase: Phase, settings: AttentionAnalysis) -> HeadWeights:
    """The mix of a training phase (FACTS, "Importance").

    Early is the preparation phase, late from the aggressive phase on; in between the configured
    weights hold. (The documents name .3/.4/.3 for mid-training and .3/.3/.4 as configuration:
    where they differ, the configuration wins.)
    """
    if phase is Phase.PREPARATION:
        return EARLY
    if phase in (Phase.AGGRESSIVE, Phase.VALIDATION):
        return LATE
    return HeadWeights(settings.entropy_weight, settings.diversity_weight, settings.gradient_weight)


def multi_factor(groups: Sequence[HeadImportanceData], weights: HeadWeights) -> Doubles:
    """[C] of all groups side by side: focus, diversity and gradient sensitivity mixed, 0 to 1,
    higher is more important.

    Focus is 1 - entropy / its bound: a head of *low* entropy has specialised (counting high
    entropy as important ranks worse than chance, ARCHITECTURE). Diversity is the Jensen-Shannon
    divergence from the other heads as a share of ln 2, its largest value. Gradients, which are in
    the loss's units, count as shares of the layer's largest. Where attention weights could not be
    seen, only they are left.
    """
    sizes = np.array([data.size for data in groups], dtype=np.int64)
    gradient = shares(
        np.concatenate([data.gradient_sensitivity for data in groups]), np.cumsum(sizes) - sizes
    )
    seen = [data.entropy is not None and data.diversity is not None for data in groups]
    entropy, bound, diversity = (_side_by_side(groups, name) for name in _PATTERNS)
    spread = np.divide(entropy, bound, out=np.ones_like(bound), where=bound > 0)
    mixed = (
        weights.entropy * np.clip(1 - spread, 0, 1)
        + weights.diversity * np.clip(diversity / math.log(2), 0, 1)
        + weights.gradient * gradient
    )
    return np.where(np.repeat(seen, sizes), mixed, gradient)


_PATTERNS = ("entropy", "entropy_bound", "diversity")


def _side_by_side(groups: Sequence[HeadImportanceData], name: str) -> Doubles:
    """[C]: one vector of all groups, zeros where a group has none."""
    rows = [getattr(data, name) for data in groups]
    rows = [np.zeros(d.size) if r is None else r for r, d in zip(rows, groups, strict=True)]
    return np.concatenate(rows).astype(np.float64)


def choose_head_scorer(
    bundle: CheckpointBundle, wanted: str, *, redistribute: bool = False
) -> tuple[Scorer, tuple[Fallback, ...]]:
    """The scorer that the statistics allow: ``auto`` takes projections where they are there, and
    ``reconstruction`` with its input moments where the caller redistributes.

    Each step down is a recorded fallback. Besides those of the channel level:
    ``no_attention_patterns`` where attention weights could not be seen (redundancy is not judged
    there, the mix is gradients alone), and ``no_head_magnitude``, as heads are not ranked by
    magnitude.
    """
    taken: list[Fallback] = []
    blind = _without_patterns(bundle)
    if blind:
        reason = f"no attention weights could be seen in {', '.join(blind)}"[:2000]
        taken.append(Fallback(rung="no_attention_patterns", reason=reason))
    if wanted == "reconstruction" or (wanted == "auto" and redistribute):
        fault = reconstruction_fault(gates_of(bundle, Level.HEAD))
        if not fault:
            return "reconstruction", tuple(taken)
        taken.append(Fallback(rung="moments_failure", reason=f"{fault}: ranked without"))
        wanted = "auto"
    if wanted == "fisher":
        fault = fisher_fault(bundle, Level.HEAD)
        if not fault:
            return "fisher", tuple(taken)
        reason = f"{fault}: ranked by entropy, diversity and gradients"
        taken.append(Fallback(rung="gate_failure", reason=reason))
    if wanted == "output_projection" or (wanted == "auto" and bundle.gates):
        fault = projection_fault(bundle)
        if not fault:
            return "output_projection", tuple(taken)
        reason = f"{fault}: ranked by entropy, diversity and gradients"
        taken.append(Fallback(rung="gate_failure", reason=reason))
    elif wanted == "magnitude":
        reason = "heads have no magnitudes: ranked by entropy, diversity and gradients"
        taken.append(Fallback(rung="no_head_magnitude", reason=reason))
    if bundle.heads and not any(data.gradient_sensitivity.any() for data in bundle.heads.values()):
        reason = "all gradient sensitivities are zero: ranked by entropy and diversity"
        taken.append(Fallback(rung="taylor_failure", reason=reason))
    return "multi_metric", tuple(taken)


def _without_patterns(bundle: CheckpointBundle) -> list[str]:
    groups = [g for g in bundle.architecture.groups if g.level is Level.HEAD and g.prunable]
    known = {name for name, data in bundle.heads.items() if data.entropy is not None}
    return [group.name for group in groups if group.name not in known]


def prepare_heads(
    bundle: CheckpointBundle,
    settings: Settings,
    *,
    scorer: str | None = None,
    shard: Collection[str] | None = None,
) -> LevelPlan:
    """The plan before any head is chosen: what may go, and by which score.

    Raises:
        InvalidField: if the request ignores a group or layer that does not exist.
    """
    pruning = settings.structured_pruning
    heads = pruning.attention_analysis
    allowed = allowance(
        bundle.architecture,
        bundle.metadata.epoch,
        # Heads come in with the moderate phase (section "Progressive safety schedule").
        raised(pruning.safety_schedule, bundle.parameters.removed_at_most).model_copy(
            update={"conservative_limit": 0.0}
        ),
        shape=pruning.channel_analysis.schedule,
        margin=heads.safety_margin,
        target=bundle.parameters.target_ratio,
        level=Level.HEAD,
    )
    used = choose_head_scorer(
        bundle,
        scorer or wanted_scorer(bundle, settings),
        redistribute=redistributes(bundle, settings),
    )
    minimum = heads.min_heads_per_layer
    eligible = eligible_groups(bundle, used[0], minimum, level=Level.HEAD, shard=shard)
    return empty_plan(bundle, Level.HEAD, allowed, used, eligible, minimum)


def plan_heads(
    bundle: CheckpointBundle,
    settings: Settings,
    *,
    scorer: str | None = None,
    shard: Collection[str] | None = None,
    threads: int = 1,
    decide: Decide = Ranking.decide,
) -> LevelPlan:
    """Choose the heads to remove and predict what removing them does.

    Args:
        shard: groups to choose among; all of them if not given. The quota is the whole level's.
        decide: what chooses, once everything is ranked.

    Raises:
        InvalidField: if the request ignores a group or layer that does not exist.
    """
    plan = prepare_heads(bundle, settings, scorer=scorer, shard=shard)
    refuse_shard(bundle, shard)
    heads = settings.structured_pruning.attention_analysis

    def rank() -> Ranking:
        phase = plan.allowed.phase
        return rank_heads(bundle, heads, plan.groups, plan.scorer, phase, threads=threads)

    def targets(ranking: Ranking, choice: Choice) -> tuple[AttentionHeadTarget, ...]:
        return _targets(bundle, plan.groups, ranking, choice, heads.similarity_threshold)

    return planned(bundle, plan, rank, decide, targets)


def rank_heads(
    bundle: CheckpointBundle,
    settings: AttentionAnalysis,
    groups: Sequence[PruningGroup],
    scorer: Scorer,
    phase: Phase,
    *,
    threads: int = 1,
) -> Ranking:
    """The ranking of ``groups``, of which there is at least one."""
    candidates = Candidates.of(groups, settings.min_heads_per_layer)
    weights = head_weights_at(phase, settings)
    with stage("score"):
        projections = usable_projections(bundle, candidates)
        if scorer in ("output_projection", "reconstruction") and projections is not None:
            scores = projections.energies
        elif scorer == "fisher":
            scores = fisher([bundle.gates[group.name] for group in groups])
        else:
            scores = multi_factor([bundle.heads[group.name] for group in groups], weights)
    if scorer == "reconstruction":  # What is alike is predicted: no pairs are needed.
        return Ranking(candidates, scorer, projections, scores, (), threads, bundle.gates)
    matrices = {name: data.similarity for name, data in bundle.heads.items()}
    redundant = pairs_of_groups(candidates, matrices, scores, settings.similarity_threshold)
    return Ranking(candidates, scorer, projections, scores, redundant, threads)


def _targets(
    bundle: CheckpointBundle,
    groups: Sequence[PruningGroup],
    ranking: Ranking,
    choice: Choice,
    threshold: float,
) -> tuple[AttentionHeadTarget, ...]:
    """One target for each attention that loses heads."""
    candidates, selection = ranking.candidates, choice.selection
    lost, pairs = candidates.by_group(selection.units), pairs_by_group(candidates, selection)
    targets = []
    for number, group in enumerate(groups):
        heads = lost.get(group.name)
        if not heads:
            continue
        start = int(candidates.starts[number])
        data, gate = bundle.heads.get(group.name), bundle.gates.get(group.name)
        alone = ranking.scores[candidates.span(number)] if gate is None else single_removal(gate)
        entropy = () if data is None or data.entropy is None else data.entropy.tolist()
        targets.append(
            AttentionHeadTarget(
                layer_name=group.name,
                head_indices=heads,
                original_indices=tuple(group.origin[head] for head in heads),
                redundancy_pairs=tuple(
                    HeadRedundancy(kept=p.kept, removed=p.removed, similarity=p.similarity)
                    for p in pairs.get(number, ())
                ),
                redundancy_threshold=threshold,
                head_importance=tuple(alone.tolist()),
                costs=tuple(
                    selection.marginal_costs[start + head] * choice.scale for head in heads
                ),
                errors=choice.errors_of([start + head for head in heads]),
                attention_entropy=tuple(entropy),
                heads_before=group.size,
                heads_after=group.size - len(heads),
                spared=spared_units(candidates, choice, number),
            )
        )
    return tuple(targets)
