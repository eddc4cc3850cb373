"""The channel level: which scorer, which groups, which channels, and why the others stay.

Promises: what was asked for and cannot be had is said (fallbacks, ignored groups, spared units);
nothing is chosen twice or against a group's minimum, multiple or the quota.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elesh.safety import mixed_owners
from elesh.settings import ChannelAnalysis
from leyline import (
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    InvalidField,
    Level,
    Phase,
    PruningGroup,
    Redundancy,
)

from .candidates import Candidates, Doubles, floor_of
from .choosing import (
    Choice,
    Ranking,
    Scorer,
    pairs_by_group,
    projection_fault,
    spared_units,
    usable_projections,
)
from .projections import Prediction, Projections
from .redundancy import Pair, redundant_pairs
from .scores import magnitude, multi_metric, weights_at

__all__ = [
    "ChannelPlan",
    "Eligible",
    "choose_scorer",
    "eligible_groups",
    "plan_channels",
    "rank_channels",
]


@dataclass(frozen=True)
class Eligible:
    """The groups that can lose units, and why each other group cannot."""

    groups: tuple[PruningGroup, ...]
    ignored: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ChannelPlan:
    """What the channel level proposes; gates and verdict come after it."""

    targets: tuple[ChannelPruningTarget, ...] = ()
    prediction: Prediction | None = None
    """Where output projections of all candidates are there."""
    energy: float = 0.0
    """The outputs' mean square, estimated from the same projections."""


def choose_scorer(bundle: CheckpointBundle, wanted: str) -> tuple[Scorer, tuple[Fallback, ...]]:
    """The scorer that the statistics allow: ``auto`` takes projections where they are there.

    Each step down from what was wanted is a recorded fallback: ``gate_failure`` where projections
    are missing or all zero, ``taylor_failure`` where all Taylor importances are zero (the
    gradient computation failed; NaN never gets this far).
    """
    taken: list[Fallback] = []
    if wanted == "output_projection" or (wanted == "auto" and bundle.gates):
        fault = projection_fault(bundle)
        if not fault:
            return "output_projection", ()
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


def eligible_groups(
    bundle: CheckpointBundle,
    scorer: Scorer,
    minimum: int,
    round_to: int = 1,
    *,
    level: Level = Level.CHANNEL,
) -> Eligible:
    """Which groups of a level can lose units.

    Raises:
        InvalidField: if the request ignores a group or layer that does not exist.
    """
    architecture, unwanted = bundle.architecture, frozenset(bundle.parameters.ignored_layers)
    known = {name for g in architecture.groups for name in (g.name, *g.layers)}
    known |= {layer.name for layer in architecture.layers}
    if unknown := sorted(unwanted - known):
        raise InvalidField("parameters.ignored_layers", "names of groups or layers", unknown)
    groups, ignored = [], []
    for group in architecture.groups:
        if group.level is not level:
            continue
        reason = _why_not(bundle, group, scorer, unwanted)
        floor = floor_of(group, minimum, round_to)
        if not reason and group.size <= floor:
            reason = f"has {group.size} {level}s, must keep {floor}"
        if reason:
            ignored.append((group.name, reason))
        else:
            groups.append(group)
    return Eligible(tuple(groups), tuple(ignored))


def _why_not(
    bundle: CheckpointBundle, group: PruningGroup, scorer: Scorer, unwanted: frozenset[str]
) -> str:
    if not group.prunable:
        return group.reason or "not prunable"
    if named := unwanted.intersection((group.name, *group.layers)):
        return f"ignored by the request: {', '.join(sorted(named))}"
    if mixed_owners(bundle.architecture, group):
        return "couples host and seed tensors (gradient isolation)"
    if scorer == "output_projection":
        return "" if group.name in bundle.gates else "no gate statistics"
    vectors = bundle.heads if group.level is Level.HEAD else bundle.channels
    return "" if group.name in vectors else f"no {group.level} statistics"


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
    projections = usable_projections(bundle, candidates)
    scores = _scores(bundle, candidates, scorer, settings, phase, projections)
    redundant = _redundant(bundle, candidates, scores, settings.redundancy_threshold)
    return Ranking(candidates, scorer, projections, scores, redundant, threads)


def plan_channels(
    bundle: CheckpointBundle,
    settings: ChannelAnalysis,
    groups: Sequence[PruningGroup],
    scorer: Scorer,
    quota: int,
    phase: Phase,
    *,
    round_to: int = 1,
    threads: int = 1,
) -> ChannelPlan:
    """Choose up to ``quota`` channels of ``groups`` and predict what removing them does."""
    if not groups or not quota:
        return ChannelPlan()
    ranking = rank_channels(
        bundle, settings, groups, scorer, phase, round_to=round_to, threads=threads
    )
    choice = ranking.decide(bundle, quota)
    targets = _targets(groups, ranking.candidates, choice, settings.redundancy_threshold)
    return ChannelPlan(targets, choice.prediction, choice.energy)


def _scores(
    bundle: CheckpointBundle,
    candidates: Candidates,
    scorer: Scorer,
    settings: ChannelAnalysis,
    phase: Phase,
    projections: Projections | None,
) -> Doubles:
    """[C]: what each unit is worth alone; with projections, the mean square of its own column."""
    if scorer == "output_projection" and projections is not None:
        columns = projections.columns
        return np.asarray(np.einsum("ij,ij->i", columns, columns, dtype=np.float64))
    data = [bundle.channels[name] for name in candidates.names]
    if scorer == "magnitude":
        return magnitude(data)
    return multi_metric(data, weights_at(phase, settings))


def _redundant(
    bundle: CheckpointBundle, candidates: Candidates, scores: Doubles, threshold: float
) -> tuple[Pair, ...]:
    """Redundant pairs of all candidates, as places in the row."""
    pairs: list[Pair] = []
    for group, name in enumerate(candidates.names):
        data = bundle.channels.get(name)
        if data is None or data.channel_correlations is None:
            continue
        span = candidates.span(group)
        found = redundant_pairs(data.channel_correlations, scores[span], threshold)
        pairs += [Pair(p.kept + span.start, p.removed + span.start, p.similarity) for p in found]
    return tuple(pairs)


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
                importance=tuple(selection.prices[start + unit] * scale for unit in units),
                redundancy_pairs=tuple(
                    Redundancy(kept=p.kept, removed=p.removed, similarity=p.similarity)
                    for p in pairs.get(number, ())
                ),
                redundancy_threshold=threshold,
                channels_before=group.size,
                channels_after=group.size - len(units),
                spared=spared_units(candidates, selection, number, scale),
            )
        )
    return tuple(targets)
