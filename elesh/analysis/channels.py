"""The channel level: which scorer, which groups, which channels, and why the others stay.

Promises: what was asked for and cannot be had is said (fallbacks, ignored groups, spared units);
nothing is chosen twice or against a group's minimum, multiple or the quota.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    SparedUnit,
)

from .candidates import Candidates, Doubles, Floats, floor_of
from .orders import JointOrder, Order, StaticOrder
from .projections import Prediction, Projections, output_energy, predict
from .redundancy import Pair, redundant_pairs
from .scores import magnitude, multi_metric, weights_at
from .selection import Selection, select

__all__ = [
    "ChannelPlan",
    "Eligible",
    "Ranking",
    "choose_scorer",
    "eligible_groups",
    "plan_channels",
]

Scorer = Literal["output_projection", "multi_metric", "magnitude"]
Reason = Literal["representative", "rounding", "redundancy_cost", "minimum", "quota"]
_MAX_SPARED = 16
_NEAR = 2.0
"""A spared unit is near the cut if it costs at most so many times the dearest that went."""


@dataclass(frozen=True)
class Eligible:
    """The groups that can lose channels, and why each other group cannot."""

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
        fault = _projection_fault(bundle)
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


def _projection_fault(bundle: CheckpointBundle) -> str:
    projections = [gate.projections for gate in bundle.gates.values()]
    if not projections:
        return "no gate statistics"
    if len(projections[0]) < 2:
        return "gate statistics of fewer than two samples"
    return "" if any(g.any() for g in projections) else "all output projections are zero"


def eligible_groups(
    bundle: CheckpointBundle, scorer: Scorer, minimum: int, round_to: int
) -> Eligible:
    """Which channel groups can lose channels.

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
        if group.level is not Level.CHANNEL:
            continue
        reason = _why_not(bundle, group, scorer, unwanted)
        floor = floor_of(group, minimum, round_to)
        if not reason and group.size <= floor:
            reason = f"has {group.size} channels, must keep {floor}"
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
    return "" if group.name in bundle.channels else "no channel statistics"


@dataclass(frozen=True)
class Ranking:
    """The candidates of some groups with everything that a selection looks at."""

    candidates: Candidates
    scorer: Scorer
    projections: Projections | None
    scores: Doubles
    redundant: tuple[Pair, ...]
    threads: int

    @classmethod
    def of(
        cls,
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
        projections = _projections(bundle, candidates)
        scores = _scores(bundle, candidates, scorer, settings, phase, projections)
        redundant = _redundant(bundle, candidates, scores, settings.redundancy_threshold)
        return cls(candidates, scorer, projections, scores, redundant, threads)

    def choose(
        self, quota: int, columns: Floats | None = None, moved: Doubles | None = None
    ) -> Selection:
        """Up to ``quota`` units.

        Args:
            columns: some samples of the projections; all of them if not given.
            moved: r at the start, in the order and scale of the columns.
        """
        if columns is None and self.projections is not None:
            columns = self.projections.columns

        def make_order() -> Order:
            if columns is None or self.scorer != "output_projection":
                return StaticOrder(self.candidates, self.scores)
            return JointOrder(self.candidates, columns, moved=moved, threads=self.threads)

        return select(make_order, quota, self.redundant)


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
    ranking = Ranking.of(
        bundle, settings, groups, scorer, phase, round_to=round_to, threads=threads
    )
    candidates, projections = ranking.candidates, ranking.projections
    selection = ranking.choose(quota)
    scale = projections.unit**2 if projections and scorer == "output_projection" else 1.0
    targets = _targets(groups, candidates, selection, scale, settings.redundancy_threshold)
    if projections is None or not selection.units:
        return ChannelPlan(targets)

    def choose(columns: Floats) -> Sequence[int]:
        joint = scorer == "output_projection"
        return ranking.choose(quota, columns).units if joint else selection.units

    prediction = predict(projections, candidates, len(selection.units), choose)
    return ChannelPlan(targets, prediction, output_energy(bundle.gates.values()))


def _projections(bundle: CheckpointBundle, candidates: Candidates) -> Projections | None:
    """Projections of all candidates, where every one has some that can be used."""
    if _projection_fault(bundle) or not all(name in bundle.gates for name in candidates.names):
        return None
    return Projections.of(bundle.gates, candidates)


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
    groups: Sequence[PruningGroup],
    candidates: Candidates,
    selection: Selection,
    scale: float,
    threshold: float,
) -> tuple[ChannelPruningTarget, ...]:
    """One target for each group that loses channels; costs times ``scale`` in their own unit."""
    lost, targets = candidates.by_group(selection.units), []
    pairs: dict[int, list[Pair]] = {}
    for pair in selection.pairs:
        pairs.setdefault(int(candidates.group_of[pair.removed]), []).append(pair)
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
                    Redundancy(
                        kept=p.kept - start, removed=p.removed - start, similarity=p.similarity
                    )
                    for p in pairs.get(number, ())
                ),
                redundancy_threshold=threshold,
                channels_before=group.size,
                channels_after=group.size - len(units),
                spared=_spared(candidates, selection, number, scale),
            )
        )
    return tuple(targets)


def _spared(
    candidates: Candidates, selection: Selection, group: int, scale: float
) -> tuple[SparedUnit, ...]:
    """The cheapest units of the group that stayed although they were near the cut, with reasons."""
    order, span = selection.order, candidates.span(group)
    stayed = np.flatnonzero(~order.taken[span]) + span.start
    near = stayed[order.costs[stayed] <= _NEAR * max(selection.dearest, 0.0)]
    near = near[np.argsort(order.costs[near], kind="stable")][:_MAX_SPARED]
    full = bool(order.room[group] == 0)
    return tuple(
        SparedUnit(
            index=unit - span.start,
            cost=float(order.costs[unit]) * scale,
            reason=_reason(selection, unit, full=full),
        )
        for unit in sorted(near.tolist())
    )


def _reason(selection: Selection, unit: int, *, full: bool) -> Reason:
    if unit in selection.kept:
        return "representative"
    if unit in selection.given_back:
        return "rounding"
    if unit in selection.too_dear:
        return "redundancy_cost"
    return "minimum" if full else "quota"
