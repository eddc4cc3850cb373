"""Levels whose groups lose units one by one: what channels and heads have in common.

With gate statistics units go in the joint order of their output projections; where the caller
redistributes, by what the kept units cannot make up for; without such statistics by a score of
their own level. A level says only what differs (:mod:`.channels`, :mod:`.heads`).

Promises: what was asked for and cannot be had is said (fallbacks, ignored groups, units kept near
the cut); nothing is chosen twice or against a group's minimum, multiple or the quota.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elesh.analysis.budgets.fitting import fitted, refuse_shard
from elesh.analysis.budgets.targets import all_budgets
from elesh.analysis.candidates import Candidates, Doubles, Floats
from elesh.analysis.importance.redundancy import pairs_of_groups
from elesh.analysis.importance.scores import fisher
from elesh.analysis.pruning_set.plans import (
    LevelPlan,
    Target,
    empty_plan,
    redistributes,
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
from elesh.analysis.selection.eligible import eligible_groups
from elesh.analysis.selection.reconstruction_order import reconstruction_fault
from elesh.analysis.selection.schedule import allowance, raised
from elesh.analysis.selection.shortfalls import sentence
from elesh.analysis.spans import stage
from elesh.settings import SafetySchedule, Settings, StructuredPruning
from leyline import (
    AnalysisParameters,
    CheckpointBundle,
    Fallback,
    Level,
    Phase,
    PruningGroup,
    Redundancy,
)

__all__ = ["Ranked", "UnitLevel"]


@dataclass(frozen=True)
class Ranked:
    """A level before the choice: its plan, everything ranked, and how many units may go."""

    plan: LevelPlan
    ranking: Ranking | None = None
    """None where nothing can, or may, be chosen."""
    quota: int = 0


class UnitLevel(ABC):
    """One level. It has no state."""

    level: Level
    own_order: str
    """What ranks units without gate statistics, in words."""
    redundancy: type[Redundancy] = Redundancy
    """What a target's pairs are."""

    @abstractmethod
    def minimum(self, settings: StructuredPruning) -> int:
        """Units that every group keeps."""

    @abstractmethod
    def threshold(self, settings: StructuredPruning) -> float:
        """The likeness above which units are redundant."""

    @abstractmethod
    def safety_margin(self, settings: StructuredPruning) -> float:
        """Share of a phase's limit that is left unused."""

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
        """By group [size, size]: how alike its units are, 1 for the same."""

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

    def schedule(self, schedule: SafetySchedule) -> SafetySchedule:
        """The schedule of this level."""
        return schedule

    def round_to(self, settings: StructuredPruning, parameters: AnalysisParameters) -> int:
        """The multiple that every group keeps, beside its own."""
        return 1

    def out_of_reach(self, bundle: CheckpointBundle, settings: Settings, plan: LevelPlan) -> str:
        """Why budgets cannot be reached within the whole schedule; empty where they can."""
        return ""

    def choose_scorer(
        self, bundle: CheckpointBundle, wanted: str, *, redistribute: bool = False
    ) -> tuple[Scorer, tuple[Fallback, ...]]:
        """The scorer that the statistics allow: ``auto`` takes projections where they are there,
        and ``reconstruction`` with its input moments where the caller redistributes.

        Each step down from what was wanted is a recorded fallback: ``moments_failure`` without
        input moments, ``gate_failure`` where projections are missing or all zero, and those of
        :meth:`own_scorer`.
        """
        taken = list(self.blind_spots(bundle))
        if wanted == "reconstruction" or (wanted == "auto" and redistribute):
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
        allowed = allowance(
            bundle.architecture,
            bundle.metadata.epoch,
            self.schedule(raised(pruning.safety_schedule, asked.removed_at_most)),
            shape=pruning.channel_analysis.schedule,
            margin=self.safety_margin(pruning),
            target=asked.target_ratio,
            level=self.level,
        )
        used = self.choose_scorer(
            bundle,
            scorer or wanted_scorer(bundle, settings),
            redistribute=redistributes(bundle, settings),
        )
        minimum, round_to = self.minimum(pruning), self.round_to(pruning, asked)
        eligible = eligible_groups(
            bundle, used[0], minimum, round_to, level=self.level, shard=shard
        )
        plan = empty_plan(bundle, self.level, allowed, used, eligible, minimum, round_to)
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
        candidates = Candidates.of(groups, self.minimum(settings), round_to)
        with stage("score"):
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
        redundant = pairs_of_groups(candidates, likeness, scores, self.threshold(settings))
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
        refuse_shard(bundle, shard)
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
        budgets = all_budgets(bundle)
        if not budgets:
            return Ranked(plan, ranking, plan.allowed.quota)
        fit = fitted(bundle, budgets, ranking, plan.allowed.quota)
        plan = replace(plan, budget=fit.use, ignored=plan.ignored + fit.ignored)
        if fit.use.of == "original" and not fit.quota and fit.use.left <= fit.use.at_most:
            left = f"{fit.use.left:.4g} of the original {fit.use.resource} are left"
            nothing = f"nothing to remove: the budget is reached, {left}"
            return Ranked(replace(plan, nothing=nothing))
        return Ranked(plan, fit.ranking, fit.quota)

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
        threshold = self.threshold(settings.structured_pruning)
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
        lost, pairs = candidates.by_group(selection.units), pairs_by_group(candidates, selection)
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
                "errors": choice.errors_of(places),
                "redundancy_pairs": tuple(
                    self.redundancy(kept=p.kept, removed=p.removed, similarity=p.similarity)
                    for p in pairs.get(number, ())
                ),
                "redundancy_threshold": threshold,
                "spared": kept_near_cut(candidates, choice, number),
            }
            yield self.target(bundle, group, units, costs, ranking.scores[span], common)
