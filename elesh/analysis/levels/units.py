"""Levels whose groups lose units one by one: what channels and heads have in common, and the
channel level. :mod:`.heads` has what is special to heads.

With gate statistics units go in the joint order of their output projections; where cuts are
followed by weight reconstruction, by what the kept units cannot predict; without such statistics by
a score of their own level. :func:`select_channels` chooses to a budget of one's own, without
phases, gates or a decision, for those who have the network at hand and measure what a cut does.

Promises: what was asked for and cannot be had is said (fallbacks, ignored groups, units kept near
the cut); nothing is chosen twice or against a group's minimum, multiple or the quota.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from elesh.analysis.budgets.fitting import all_budgets, fitted, out_of_reach
from elesh.analysis.candidates import Candidates, Doubles, Floats
from elesh.analysis.importance.scores import (
    fisher,
    magnitude,
    multi_metric,
    pairs_of_groups,
    weights_at,
)
from elesh.analysis.pruning_set.plans import (
    LevelPlan,
    Target,
    empty_plan,
    wanted_scorer,
    with_choice,
)
from elesh.analysis.selection.choose import (
    Choice,
    Decide,
    Ranking,
    Scorer,
    fisher_fault,
    gates_of,
    kept_near_cut,
    pairs_by_group,
    projection_fault,
    usable_projections,
)
from elesh.analysis.selection.reconstruction_order import reconstruction_fault
from elesh.analysis.selection.schedule import (
    allowance,
    as_asked,
    counted_groups,
    eligible_groups,
    sentence,
)
from elesh.analysis.spans import span
from elesh.settings import ChannelAnalysis, SafetySchedule, Settings, StructuredPruning
from leyline import (
    AnalysisParameters,
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    InvalidField,
    Level,
    Phase,
    PruningGroup,
    Redundancy,
    ShapeMismatch,
)
from leyline.messages.parameters import WantedScorer


@dataclass(frozen=True)
class Ranked:
    """A level before the choice: its plan, everything ranked, and how many units may go."""

    plan: LevelPlan
    ranking: Ranking | None = None
    """None where nothing can, or may, be chosen."""
    quota: int = 0


class Limits(NamedTuple):
    """What settings and request say of a level."""

    schedule: SafetySchedule
    margin: float
    """Share of a phase's limit that is left unused."""
    minimum: int
    """Units that every group keeps."""
    redundancy: float
    """The likeness above which units are redundant."""
    round_to: int = 1
    """The multiple that every group keeps, beside its own."""


class UnitLevel(ABC):
    """One level. It has no state."""

    level: Level
    own_order: str
    """What ranks units without gate statistics, in words."""
    redundancy: type[Redundancy] = Redundancy
    """What a target's pairs are."""

    @abstractmethod
    def limits(self, settings: StructuredPruning, asked: AnalysisParameters) -> Limits:
        """The limits of this level; the request goes before the settings."""

    @abstractmethod
    def own_scorer(
        self, bundle: CheckpointBundle, wanted: str
    ) -> tuple[Scorer, tuple[Fallback, ...]]:
        """What ranks units where gate statistics do not; a step down is a fallback."""

    @abstractmethod
    def own_scores(
        self,
        bundle: CheckpointBundle,
        names: Sequence[str],
        scorer: Scorer,
        settings: StructuredPruning,
        phase: Phase,
    ) -> Doubles:
        """[C]: what each unit of these groups is worth by such a scorer."""

    @abstractmethod
    def likeness(self, bundle: CheckpointBundle) -> Mapping[str, Floats | None]:
        """[size, size] by group: the similarity of its units, 1 for the same."""

    @abstractmethod
    def target(
        self,
        bundle: CheckpointBundle,
        group: PruningGroup,
        units: tuple[int, ...],
        costs: tuple[float, ...],
        scores: Doubles,
        common: Mapping[str, Any],
    ) -> Target:
        """The target of one group.

        Args:
            units: that go.
            costs: of each of them, in its own unit.
            scores: [size], the fixed scores of the whole group.
            common: fields that targets of every level have.
        """

    def blind_spots(self, bundle: CheckpointBundle) -> tuple[Fallback, ...]:
        """What the statistics do not show, whatever ranks."""
        return ()

    def out_of_reach(self, bundle: CheckpointBundle, settings: Settings, plan: LevelPlan) -> str:
        """Why budgets cannot be reached within the whole schedule; empty where they can."""
        return ""

    def choose_scorer(
        self, bundle: CheckpointBundle, wanted: str, *, reconstructs: bool = False
    ) -> tuple[Scorer, tuple[Fallback, ...]]:
        """The scorer that the statistics allow: ``auto`` takes projections where they are there,
        and ``reconstruction`` where cuts are followed by weight reconstruction.

        Each step down from what was wanted is a recorded fallback: ``moments_failure`` without
        input moments, ``gate_failure`` where projections are missing or all zero, and those of
        :meth:`own_scorer`.
        """
        taken = list(self.blind_spots(bundle))
        if wanted == "reconstruction" or (wanted == "auto" and reconstructs):
            fault = reconstruction_fault(gates_of(bundle, self.level))
            if not fault:
                return "reconstruction", tuple(taken)
            taken.append(Fallback(rung="moments_failure", reason=f"{fault}: ranked without"))
            wanted = "auto"
        if wanted == "fisher":
            fault = fisher_fault(bundle, self.level)
            if not fault:
                return "fisher", tuple(taken)
            taken.append(self._gate_failure(fault))
        elif wanted == "output_projection" or (wanted == "auto" and bundle.gates):
            fault = projection_fault(bundle)
            if not fault:
                return "output_projection", tuple(taken)
            taken.append(self._gate_failure(fault))
        scorer, fallbacks = self.own_scorer(bundle, wanted)
        return scorer, (*taken, *fallbacks)

    def _gate_failure(self, fault: str) -> Fallback:
        return Fallback(rung="gate_failure", reason=f"{fault}: ranked by {self.own_order}")

    def prepare(
        self,
        bundle: CheckpointBundle,
        settings: Settings,
        *,
        scorer: str | None = None,
        shard: Collection[str] | None = None,
    ) -> LevelPlan:
        """The plan before any unit is chosen: what may go, and by which score.

        Raises:
            InvalidField: if the request ignores a group or layer that does not exist.
        """
        pruning, asked = settings.structured_pruning, bundle.parameters
        limits = self.limits(pruning, asked)
        allowed = allowance(
            bundle.architecture,
            bundle.metadata.epoch,
            limits.schedule,
            shape=pruning.channel_analysis.schedule,
            margin=limits.margin,
            target=asked.target_ratio,
            level=self.level,
        )
        wanted, reconstructs = wanted_scorer(bundle, settings)
        used = self.choose_scorer(bundle, scorer or wanted, reconstructs=reconstructs)
        if not counted_groups(bundle.architecture, self.level):
            used = (used[0], ())  # Nothing is ranked: nothing was fallen back to.
        minimum, round_to = limits.minimum, limits.round_to
        eligible = eligible_groups(
            bundle, used[0], minimum, round_to, level=self.level, shard=shard
        )
        plan = empty_plan(bundle, self.level, allowed, used, eligible, minimum, round_to)
        if asked.budget is None:
            return plan
        short = sentence(plan.shortfall, self.out_of_reach(bundle, settings, plan))
        return replace(plan, shortfall=short)

    def rank(
        self,
        bundle: CheckpointBundle,
        settings: StructuredPruning,
        groups: Sequence[PruningGroup],
        scorer: Scorer,
        phase: Phase,
        *,
        round_to: int = 1,
        threads: int = 1,
    ) -> Ranking:
        """The ranking of ``groups``, of which there is at least one."""
        limits = self.limits(settings, bundle.parameters)
        candidates = Candidates.of(groups, limits.minimum, round_to)
        with span("score"):
            projections = usable_projections(bundle, candidates)
            if scorer in ("output_projection", "reconstruction") and projections is not None:
                scores = projections.sums_of_squares
            elif scorer == "fisher":
                scores = fisher([bundle.gates[name] for name in candidates.names])
            else:
                scores = self.own_scores(bundle, candidates.names, scorer, settings, phase)
        if scorer == "reconstruction":  # What is alike is predicted: no pairs are needed.
            return Ranking(candidates, scorer, projections, scores, (), threads, bundle.gates)
        likeness = self.likeness(bundle)
        redundant = pairs_of_groups(candidates, likeness, scores, limits.redundancy)
        return Ranking(candidates, scorer, projections, scores, redundant, threads)

    def ranked(
        self,
        bundle: CheckpointBundle,
        settings: Settings,
        *,
        scorer: str | None = None,
        shard: Collection[str] | None = None,
        threads: int = 1,
    ) -> Ranked:
        """What may go, ranked.

        Where the request has a budget, no group may lose more than the budget asks of it.

        Args:
            shard: groups to choose among; all of them if not given. The quota is the whole level's.

        Raises:
            InvalidField: if the request ignores a group or layer that does not exist, or a latency
                table is not of this architecture.
        """
        plan = self.prepare(bundle, settings, scorer=scorer, shard=shard)
        if shard is not None and bundle.parameters.budget is not None:
            expected = "none with a budget: it is fitted over all groups"
            raise InvalidField("shard", expected, len(shard))
        if not plan.groups or not plan.allowed.quota:
            return Ranked(plan)
        ranking = self.rank(
            bundle,
            settings.structured_pruning,
            plan.groups,
            plan.scorer,
            plan.allowed.phase,
            round_to=plan.round_to,
            threads=threads,
        )
        if bundle.parameters.budget is None:
            return Ranked(plan, ranking, plan.allowed.quota)
        quota = plan.allowed.quota
        in_all = max(quota, self._left_in_all(bundle, settings, plan))
        fit = fitted(bundle, all_budgets(bundle), ranking, quota, in_all)
        plan = replace(plan, budget=fit.use, ignored=plan.ignored + fit.ignored)
        if fit.use.of == "original" and not fit.quota and fit.use.left <= fit.use.at_most:
            left = f"{fit.use.left:.4g} of the original {fit.use.resource} are left"
            nothing = f"nothing to remove: the budget is reached, {left}"
            return Ranked(replace(plan, nothing=nothing))
        return Ranked(plan, fit.ranking, fit.quota)

    def _left_in_all(self, bundle: CheckpointBundle, settings: Settings, plan: LevelPlan) -> int:
        """Units that the last phase's limit leaves to remove."""
        limits = self.limits(settings.structured_pruning, bundle.parameters)
        share = limits.schedule.aggressive_limit * (1 - limits.margin)
        return math.floor(share * plan.allowed.original + 1e-6) - plan.allowed.removed

    def choose(
        self,
        bundle: CheckpointBundle,
        settings: Settings,
        ranked: Ranked,
        decide: Decide = Ranking.decide,
    ) -> LevelPlan:
        """The plan with its units chosen and what removing them is predicted to do.

        Args:
            decide: what chooses.
        """
        plan, ranking = ranked.plan, ranked.ranking
        if ranking is None:
            return plan
        choice = decide(ranking, bundle, ranked.quota)
        threshold = self.limits(settings.structured_pruning, bundle.parameters).redundancy
        targets = tuple(self._targets(bundle, plan.groups, ranking, choice, threshold))
        return with_choice(plan, bundle, ranking.candidates, choice, targets)

    def _targets(
        self,
        bundle: CheckpointBundle,
        groups: Sequence[PruningGroup],
        ranking: Ranking,
        choice: Choice,
        threshold: float,
    ) -> Iterator[Target]:
        """One target for each group that loses units; costs in their own unit."""
        candidates, selection = ranking.candidates, choice.selection
        lost = candidates.by_group(selection.units)
        pairs = pairs_by_group(candidates, selection.pairs) if selection.pairs else {}
        for number, group in enumerate(groups):
            units = lost.get(group.name)
            if not units:
                continue
            span = candidates.span(number)
            places = [span.start + unit for unit in units]
            costs = tuple(selection.marginal_costs[place] * choice.scale for place in places)
            common = {
                "layer_name": group.name,
                "original_indices": tuple(group.origin[unit] for unit in units),
                "errors": tuple(choice.errors[place] * choice.scale for place in places)
                if choice.errors
                else (),
                "redundancy_pairs": tuple(
                    self.redundancy(kept=p.kept, removed=p.removed, similarity=p.similarity)
                    for p in pairs.get(number, ())
                ),
                "redundancy_threshold": threshold,
                "spared": kept_near_cut(candidates, choice, number),
            }
            yield self.target(bundle, group, units, costs, ranking.scores[span], common)


class Channels(UnitLevel):
    """Channels, and the units of hidden layers: ranked by Taylor importance, magnitude and
    activation frequency where there are no gate statistics."""

    level = Level.CHANNEL
    own_order = "the vectors"

    def limits(self, settings: StructuredPruning, asked: AnalysisParameters) -> Limits:
        own = settings.channel_analysis
        return Limits(
            as_asked(settings.safety_schedule, asked),
            own.safety_margin,
            own.min_channels_per_layer,
            own.redundancy_threshold,
            own.round_to if asked.round_to == 1 else asked.round_to,
        )

    def own_scorer(
        self, bundle: CheckpointBundle, wanted: str
    ) -> tuple[Scorer, tuple[Fallback, ...]]:
        """The mix of three metrics; magnitude where it is asked for, or where all Taylor
        importances are zero (the gradients failed; a NaN never gets this far)."""
        if wanted == "magnitude":
            return "magnitude", ()
        if any(data.taylor_importance.any() for data in bundle.channels.values()):
            return "multi_metric", ()
        if not bundle.channels:
            return "magnitude", ()
        reason = "all Taylor importances are zero: ranked by magnitude"
        return "magnitude", (Fallback(rung="taylor_failure", reason=reason),)

    def own_scores(
        self,
        bundle: CheckpointBundle,
        names: Sequence[str],
        scorer: Scorer,
        settings: StructuredPruning,
        phase: Phase,
    ) -> Doubles:
        data = [bundle.channels[name] for name in names]
        if scorer == "magnitude":
            return magnitude(data)
        return multi_metric(data, weights_at(phase, settings.channel_analysis))

    def likeness(self, bundle: CheckpointBundle) -> Mapping[str, Floats | None]:
        return {name: data.channel_correlations for name, data in bundle.channels.items()}

    def out_of_reach(self, bundle: CheckpointBundle, settings: Settings, plan: LevelPlan) -> str:
        """Of budgets of the original network: why the schedule's last limit is too low for them."""
        budgets = [budget for budget in all_budgets(bundle) if budget.of == "original"]
        if not budgets:
            return ""
        pruning, groups = settings.structured_pruning, list(plan.groups)
        last = self.limits(pruning, bundle.parameters).schedule.aggressive_limit
        units = self._left_in_all(bundle, settings, plan)
        if Level.HEAD in bundle.levels:
            heads = counted_groups(bundle.architecture, Level.HEAD)
            gone = sum(group.removed for group in heads)
            original = sum(group.original_size for group in heads)
            units += math.floor(last * original + 1e-6) - gone
            groups += heads
        return out_of_reach(
            bundle.architecture,
            budgets,
            groups,
            units=max(units, 0),
            minimum=plan.minimum,
            round_to=plan.round_to,
        )

    def target(
        self,
        bundle: CheckpointBundle,
        group: PruningGroup,
        units: tuple[int, ...],
        costs: tuple[float, ...],
        scores: Doubles,
        common: Mapping[str, Any],
    ) -> Target:
        return ChannelPruningTarget(
            channel_indices=units,
            importance=costs,
            channels_before=group.size,
            channels_after=group.size - len(units),
            **common,
        )


CHANNELS = Channels()


def select_channels(
    bundle: CheckpointBundle,
    count: int,
    *,
    settings: ChannelAnalysis | None = None,
    scorer: WantedScorer = "auto",
    moved: npt.ArrayLike | None = None,
) -> dict[str, tuple[int, ...]]:
    """Up to ``count`` channels by group name, chosen as ``analyze`` chooses.

    Minimum, multiples and redundancy threshold of the settings hold; schedule and safety gates do
    not. Fewer come back only where the minimums leave no more.

    Args:
        moved: [N] what earlier cuts have already moved the outputs by, sample by sample, along the
            directions of the bundle's projections (the difference of ``Recorder.project`` now and
            before them). Joint costs then count from there, and not from the present network.

    Raises:
        InvalidField: if the count is negative, or ``moved`` comes with scores that are not joint.
        ShapeMismatch: if ``moved`` is not one number a sample.
    """
    if count < 0:
        raise InvalidField("count", "a number >= 0", count)
    settings = settings or ChannelAnalysis()
    asked = settings.redistribute or bundle.parameters.redistribute
    used, _ = CHANNELS.choose_scorer(bundle, scorer, reconstructs=asked)
    row = None if moved is None else _checked(moved, bundle, used)
    minimum, round_to = settings.min_channels_per_layer, settings.round_to
    groups = eligible_groups(bundle, used, minimum, round_to).groups
    if not groups or not count:
        return {}
    pruning = StructuredPruning(channel_analysis=settings)
    ranking = CHANNELS.rank(bundle, pruning, groups, used, Phase.MODERATE, round_to=round_to)
    if row is not None and ranking.projections is not None:
        row = ranking.projections.moved(row)
    return ranking.candidates.by_group(ranking.choose(count, moved=row).removal_order.units)


def _checked(moved: npt.ArrayLike, bundle: CheckpointBundle, scorer: str) -> Doubles:
    row = np.asarray(moved, dtype=np.float64)
    if scorer != "output_projection":
        raise InvalidField("moved", "nothing where scores are not joint", scorer)
    samples = len(next(iter(bundle.gates.values())).projections)
    if row.shape != (samples,):
        raise ShapeMismatch("moved", f"shape {(samples,)}", f"shape {row.shape}")
    return row
