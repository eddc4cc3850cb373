"""The channel level: what it has of its own. The rest is :class:`.units.UnitLevel`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from elesh.analysis.budgets.targets import all_budgets, out_of_reach
from elesh.analysis.candidates import Doubles, Floats
from elesh.analysis.importance.scores import magnitude, multi_metric, weights_at
from elesh.analysis.pruning_set.plans import LevelPlan, Target
from elesh.analysis.selection.choose import Scorer
from elesh.analysis.selection.schedule import counted_groups, raised
from elesh.settings import Settings, StructuredPruning
from leyline import (
    AnalysisParameters,
    ChannelPruningTarget,
    CheckpointBundle,
    Fallback,
    Level,
    Phase,
    PruningGroup,
)

from .units import UnitLevel

__all__ = ["CHANNELS", "Channels"]


class Channels(UnitLevel):
    """Channels, and the units of hidden layers: ranked by Taylor importance, magnitude and
    activation frequency where there are no gate statistics."""

    level = Level.CHANNEL
    own_order = "the vectors"

    def minimum(self, settings: StructuredPruning) -> int:
        return settings.channel_analysis.min_channels_per_layer

    def threshold(self, settings: StructuredPruning) -> float:
        return settings.channel_analysis.redundancy_threshold

    def safety_margin(self, settings: StructuredPruning) -> float:
        return settings.channel_analysis.safety_margin

    def round_to(self, settings: StructuredPruning, parameters: AnalysisParameters) -> int:
        asked = parameters.round_to
        return settings.channel_analysis.round_to if asked == 1 else asked

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
        schedule = raised(pruning.safety_schedule, bundle.parameters.removed_at_most)
        share = schedule.aggressive_limit * (1 - pruning.channel_analysis.safety_margin)
        units = math.floor(share * plan.allowed.original + 1e-6) - plan.allowed.removed
        if Level.HEAD in bundle.levels:
            heads = counted_groups(bundle.architecture, Level.HEAD)
            gone = sum(group.removed for group in heads)
            original = sum(group.original_size for group in heads)
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
